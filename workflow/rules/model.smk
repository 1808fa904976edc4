rule model:
    input:
        get_local_checkpoint(),
    output:
        checkpoint="<results>/model/checkpoint.safetensors",
        info="<results>/model/model.json",
    log:
        "<logs>/model.log",
    conda:
        "../../environment.yml"
    params:
        model=config["model"],
        folder=config["model_folder"],
        download=config["download"],
        layers=config["layers"],
        include=config["include"],
    script:
        "../scripts/fetch_model.py"
