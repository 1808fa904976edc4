rule embed:
    input:
        shards="<results>/plan/shards/group-{group}",
        checkpoint="<results>/model/checkpoint.safetensors",
        model="<results>/model/model.json",
        plan="<results>/plan/plan.json",
    output:
        run="<results>/embed/group-{group}/run.json",
        failures="<results>/embed/group-{group}/failures.tsv",
    log:
        "<logs>/embed/group-{group}.log",
    retries: config["failures"]["retries"]
    conda:
        "../../environment.yml"
    threads: config["threads"] * config["gpus_per_job"]
    resources:
        gpu=config["gpus_per_job"],
        mem_mb=get_embed_memory,
        runtime=get_embed_runtime,
        attempt=get_attempt,
    params:
        method=get_method(),
        store=get_store(),
        batch_tokens=config["batch_tokens"],
        gpus_per_job=config["gpus_per_job"],
        grace_seconds=config["grace_seconds"],
        hang_minutes=config["hang_minutes"],
        device=config["device"],
        cpu_slots=config["cpu_slots"],
        lock_folder=config["slot_lock_folder"],
        wait_minutes=config["slot_wait_minutes"],
        failure_policy=config["failures"]["policy"],
        last_attempt=config["failures"]["retries"] + 1,
    script:
        "../scripts/embed.py"
