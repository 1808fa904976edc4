rule plan:
    input:
        fasta=get_fasta_files,
        model="<results>/model/model.json",
        checkpoint="<results>/model/checkpoint.safetensors",
        variants=get_variants_table,
    output:
        records="<results>/plan/records.parquet",
        plan="<results>/plan/plan.json",
        candidates="<results>/plan/candidates.fasta",
        variants=get_variants("planned"),
        groups=directory(expand("<results>/plan/shards/group-{group}", group=GROUPS)),
    log:
        "<logs>/plan.log",
    conda:
        "../../environment.yml"
    threads: 4
    params:
        samples=get_sample_names,
        annotations=get_annotations,
        method=get_method(),
        max_residues=config["max_residues"],
        nucleotide_sequences=config["nucleotide_sequences"],
        reading=get_reading,
        assignment=config["assignment"],
        shard_residues=config["shard_residues"],
        gpus_per_job=config["gpus_per_job"],
        store=get_store(),
        groups=get_cut,
        plan_number=get_plan_number,
    script:
        "../scripts/plan.py"
