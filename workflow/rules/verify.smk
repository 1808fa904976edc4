rule verify:
    input:
        candidates="<results>/plan/candidates.fasta",
        manifest="<results>/manifest.parquet",
        embeddings="<results>/embeddings",
        checkpoint="<results>/model/checkpoint.safetensors",
        model="<results>/model/model.json",
        plan="<results>/plan/plan.json",
    output:
        "<results>/certificate.json",
    log:
        "<logs>/verify.log",
    retries: config["failures"]["retries"]
    conda:
        "../../environment.yml"
    threads: config["threads"]
    resources:
        gpu=get_gpus_to_verify(),
        mem_mb=get_verify_memory,
        runtime=get_verify_runtime,
        attempt=get_attempt,
    params:
        method=get_method(),
        store=get_store(),
        formats=config["formats"],
        sample=config["verify"]["sample"],
        seed=config["verify"]["seed"],
        min_cosine=config["verify"]["min_cosine"],
        max_relative_error=config["verify"]["max_relative_error"],
        device=config["device"],
        cpu_slots=config["cpu_slots"],
        lock_folder=config["slot_lock_folder"],
        wait_minutes=config["slot_wait_minutes"],
    script:
        "../scripts/verify.py"
