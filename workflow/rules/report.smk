rule report:
    input:
        manifest="<results>/manifest.parquet",
        embeddings="<results>/embeddings",
        summary="<results>/summary.json",
        checkpoint="<results>/model/checkpoint.safetensors",
        model="<results>/model/model.json",
        plan="<results>/plan/plan.json",
        runs=expand("<results>/embed/group-{group}/run.json", group=GROUPS),
        certificate=get_certificate(),
        variants=get_variants("summary"),
    output:
        page="<results>/report.html",
        flow=report(
            "<results>/report/flow.svg",
            caption="../report/flow.rst",
            category="Records",
            labels={"figure": "Records"},
        ),
        failures=report(
            "<results>/report/failures.svg",
            caption="../report/failures.rst",
            category="Records",
            labels={"figure": "Rejected and failed"},
        ),
        lengths=report(
            "<results>/report/lengths.svg",
            caption="../report/lengths.rst",
            category="Records",
            labels={"figure": "Lengths"},
        ),
        map=report(
            "<results>/report/map.svg",
            caption="../report/map.rst",
            category="Embeddings",
            labels={"figure": "Map"},
        ),
        certificate=report(
            "<results>/report/certificate.svg",
            caption="../report/certificate.rst",
            category="Embeddings",
            labels={"figure": "Certificate"},
        ),
        timeline=report(
            "<results>/report/timeline.svg",
            caption="../report/timeline.rst",
            category="Run",
            labels={"figure": "Slots over time"},
        ),
        speed=report(
            "<results>/report/speed.svg",
            caption="../report/speed.rst",
            category="Run",
            labels={"figure": "Speed and memory"},
        ),
        disk=report(
            "<results>/report/disk.svg",
            caption="../report/disk.rst",
            category="Run",
            labels={"figure": "Files"},
        ),
    log:
        "<logs>/report.log",
    conda:
        "../../environment.yml"
    params:
        store=get_store(),
    script:
        "../scripts/report.py"
