rule model:
    input:
        get_local_checkpoint(),
    output:
        checkpoint="<results>/model/checkpoint.safetensors",
        info="<results>/model/model.json",
    log:
        "<logs>/model.log",
    # With `--cache` a site converts each checkpoint once: what becomes of it is in the parameters, no package matters.
    cache: "omit-software"
    conda:
        "../../environment.yml"
    params:
        model=config["model"],
        base_model=config["base_model"],
        folder=config["model_folder"],
        download=config["download"],
        stamps=get_checkpoint_stamps(),
        converted_format=CHECKPOINT_FORMAT,
    script:
        "../scripts/fetch_model.py"
