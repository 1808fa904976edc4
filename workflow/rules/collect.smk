rule collect:
    input:
        records="<results>/plan/records.parquet",
        plan="<results>/plan/plan.json",
        model="<results>/model/model.json",
        runs=expand("<results>/embed/group-{group}/run.json", group=GROUPS),
        failures=expand("<results>/embed/group-{group}/failures.tsv", group=GROUPS),
        fasta=get_fasta_to_read_again,
    output:
        embeddings=directory("<results>/embeddings"),
        manifest="<results>/manifest.parquet",
        manifest_tsv="<results>/manifest.tsv",
        failures="<results>/failures.tsv",
        summary="<results>/summary.json",
    log:
        "<logs>/collect.log",
    conda:
        "../../environment.yml"
    threads: 4
    params:
        method=get_method(),
        store=get_store(),
        formats=config["formats"],
        pooled_precision=config["pooled_precision"],
        reading=get_reading,
        note=NOTE_OF_EMBEDDINGS,
        written=get_written,
    script:
        "../scripts/collect.py"


# The last step, so that the policy "error" fails only after everything that could be done is done.
rule finish:
    input:
        summary="<results>/summary.json",
        certificate=get_certificate(),
        model="<results>/model/model.json",
        embeddings="<results>/embeddings",
        manifest="<results>/manifest.parquet",
        failures="<results>/failures.tsv",
        report=get_report(),
        variants=get_variants("summary"),
        runs=expand("<results>/embed/group-{group}/run.json", group=GROUPS),
    output:
        "<results>/summary.txt",
    log:
        "<logs>/finish.log",
    conda:
        "../../environment.yml"
    params:
        failure_policy=config["failures"]["policy"],
        logs=get_logs_to_join(),
        # No output of the rule: Snakemake would remove it where the run is ended with an error.
        joined_log=f"{RESULTS}/run.log",
        shows_summary=is_module(),
    script:
        "../scripts/finish.py"
