# Only where the configuration names a table of variants does anything ask for this.
rule variants:
    input:
        planned="<results>/plan/variants.parquet",
        model="<results>/model/model.json",
        runs=expand("<results>/embed/group-{group}/run.json", group=GROUPS),
        failures=expand("<results>/embed/group-{group}/failures.tsv", group=GROUPS),
    output:
        table="<results>/variants.parquet",
        table_tsv="<results>/variants.tsv",
        summary="<results>/variants.json",
    log:
        "<logs>/variants.log",
    conda:
        "../../environment.yml"
    threads: 4
    params:
        method=get_method(),
        store=get_store(),
    script:
        "../scripts/variants.py"
