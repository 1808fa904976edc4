import sys
from functools import cache
from pathlib import Path

import psutil

SCRIPTS = Path(str(workflow.current_basedir)).parent / "scripts"
if not SCRIPTS.is_dir():
    # Deployed from a git host, file by file: fetch the library to where Snakemake puts the scripts that import it.
    for name in Path(workflow.source_path("../library.files")).read_text().split():
        workflow.source_path(f"../{name}")
    SCRIPTS = Path(workflow.source_path("../scripts/esmflow/__init__.py")).parents[1]
sys.path.insert(0, str(SCRIPTS))

from esmflow.checkpoint.models import FORMAT as CHECKPOINT_FORMAT
from esmflow.checkpoint.models import files_of_checkpoint, guess_model
from esmflow.collect.formats import FORMATS, named_after_inputs
from esmflow.config.configuration import validated
from esmflow.config.job_estimates import (
    Given,
    decide_groups,
    estimate_job,
    estimate_verification,
    group_names,
    guess_work,
    has_gpu_driver,
    job_settings,
    resolve_threads,
)
from esmflow.errors import EsmflowError
from esmflow.inputs.sheet import read_samples
from esmflow.method import computing_method
from esmflow.plan.freshness import embeddings_number, input_stamps, plan_number
from esmflow.workers.lifetime import check_system, jobs_import_from, note_run

try:
    check_system()
    config = validated(config, Path(workflow.source_path("../schemas/config.schema.yaml")))
    INPUTS = read_samples(config["samples"], named_after_inputs(config["formats"]))
except EsmflowError as error:
    raise SystemExit(f"esmflow: {error}")

note_run()
jobs_import_from(SCRIPTS)

RESULTS = workflow.pathvars.apply("<results>")
LOGS = workflow.pathvars.apply("<logs>")
NOTE_OF_EMBEDDINGS = f"{RESULTS}/embeddings.json"
# A cluster's jobs are counted, those of one machine share its cores.
ON_CLUSTER = workflow.nodes is not None


def get_kind_of_device():
    """`cuda` or `cpu`: what embed jobs will run on, as far as it can be told from here."""
    if config["device"] != "auto":
        return config["device"]
    # A cluster's login node has no GPU, while its jobs have.
    return "cuda" if ON_CLUSTER or has_gpu_driver() else "cpu"


def get_given():
    """What Snakemake was given on its command line or by a profile."""
    gpus = workflow.global_resources.get("gpu")
    return Given(
        cores=workflow.resource_settings.cores,
        jobs=workflow.nodes,
        gpus=getattr(gpus, "value", gpus),
        memory_mb=psutil.virtual_memory().total / 1e6,
    )


PATHS = [file.path for file in INPUTS]
config["threads"] = resolve_threads(config, get_kind_of_device(), get_given(), PATHS)
CUT = decide_groups(config, get_kind_of_device(), get_given(), f"{RESULTS}/plan/plan.json", PATHS)
GROUPS = group_names(CUT.number)


wildcard_constraints:
    group="[0-9]{1,5}",


# Functions, since Snakemake looks for wildcards in what is written out: names may have braces in them.
def get_fasta_files(wildcards=None):
    return PATHS


def get_cut(wildcards):
    """How many shard groups there are, and why."""
    return {"groups": CUT.number, "work": CUT.work, "least": CUT.least}


def get_sample_names(wildcards):
    return [file.sample for file in INPUTS]


def get_annotations(wildcards):
    return [file.annotations for file in INPUTS]


def get_reading(wildcards):
    """How records are read and named. None of it is in the fingerprint: a sequence is known by what is left of it."""
    return {"gaps": config["gaps"], "id": config["id"]}


def get_fasta_to_read_again(wildcards):
    """The inputs of collecting in formats that hold sequences beside their vectors."""
    again = any(FORMATS[name].with_sequences for name in config["formats"])
    return get_fasta_files() if again else []


def get_local_checkpoint():
    """The files of the checkpoint as inputs, if the configuration names one by its path."""
    named = [config[key] for key in ("model", "base_model") if config[key]]
    return [file for model in named for file in files_of_checkpoint(model)]


def get_checkpoint_stamps():
    """Sizes and times of these files: they change even if a file is replaced by an older one."""
    return sorted(input_stamps(get_local_checkpoint()).items())


def get_store():
    return config["store"] or f"{RESULTS}/store"


def get_method():
    """What, besides the checkpoint, the fingerprint is made of."""
    return computing_method(config)


# Found out once: Snakemake keeps what a parameter is at first, and gives a job what it is when the outputs are deleted.
@cache
def number_of_plan():
    return plan_number(
        f"{RESULTS}/plan/plan.json",
        [*get_fasta_files(), *get_variants_table()],
        get_run_records(),
        get_store(),
    )


@cache
def number_of_embeddings():
    return embeddings_number(NOTE_OF_EMBEDDINGS, f"{RESULTS}/embeddings")


def get_plan_number(wildcards):
    """What changes when what the plan counts on changes behind Snakemake's back.

    Snakemake compares the values of all parameters as one set, without their names: a bare number would hide among others.
    """
    return {"plan number": number_of_plan()}


def get_run_records():
    """What the jobs of the groups that have run wrote down."""
    # Here and not above: nobody asks before there is a plan, and a first dry run does without.
    from esmflow.embedding.run_record import read_run_records

    yield from read_run_records(f"{RESULTS}/embed/group-{group}/run.json" for group in GROUPS)


def get_written(wildcards):
    """What changes when a file of the embeddings is deleted or cut behind Snakemake's back."""
    return {"written": number_of_embeddings()}


def get_gpus_to_verify():
    """The certificate's GPUs: a job on CPUs asks for none."""
    return 0 if config["device"] == "cpu" else 1


def get_variants_table(wildcards=None):
    return [config["variants"]] if config["variants"] else []


def get_variants(of):
    """The files of the variants that a step reads or writes, if the configuration names a table of them."""
    files = {
        "planned": ["<results>/plan/variants.parquet"],
        "summary": ["<results>/variants.json"],
        "results": ["<results>/variants.parquet", "<results>/variants.tsv"],
    }
    return files[of] if config["variants"] else []


def get_report():
    """The report as an input file, if the run gets one."""
    return ["<results>/report.html"] if config["report"] else []


def get_certificate():
    """The certificate as an input file, if the run gets one."""
    return ["<results>/certificate.json"] if config["verify"]["sample"] else []


def get_embed_estimate(wildcards):
    """Seconds and memory of one embed job: from the plan once it is there, before that from the inputs' sizes."""
    return estimate_job(
        guess_work(
            int(wildcards.group), len(GROUPS), f"{RESULTS}/plan/plan.json", get_fasta_files()
        ),
        guess_model(config["base_model"] or config["model"], f"{RESULTS}/model/model.json"),
        job_settings(config, get_kind_of_device()),
    )


def get_attempt(wildcards, attempt):
    """For scripts, which Snakemake does not tell."""
    return attempt


def get_embed_memory(wildcards, attempt):
    return get_embed_estimate(wildcards).memory_mb_to_ask_for(attempt)


def get_embed_runtime(wildcards, attempt):
    return get_embed_estimate(wildcards).runtime_minutes(attempt)


def get_verify_estimate():
    """Seconds and memory of the certificate's job."""
    return estimate_verification(
        guess_model(config["base_model"] or config["model"], f"{RESULTS}/model/model.json"),
        job_settings(config, get_kind_of_device()),
        config["verify"]["sample"],
        f"{RESULTS}/plan/plan.json",
    )


def get_verify_memory(wildcards, attempt):
    return get_verify_estimate().memory_mb_to_ask_for(attempt)


def get_verify_runtime(wildcards, attempt):
    return get_verify_estimate().runtime_minutes(attempt)


def get_logs_to_join():
    embed_logs = [f"{LOGS}/embed/group-{group}.log" for group in GROUPS]
    asked_for = {
        "variants": config["variants"],
        "verify": config["verify"]["sample"],
        "report": config["report"],
    }
    steps = [
        step
        for step in ("collect", "variants", "verify", "report", "finish")
        if asked_for.get(step, True)
    ]
    return [
        f"{LOGS}/model.log",
        f"{LOGS}/plan.log",
        *embed_logs,
        *(f"{LOGS}/{step}.log" for step in steps),
    ]


def is_module():
    """Whether another workflow uses this one: Snakemake does not run a module's handlers, so that its end must speak."""
    return Path(workflow.main_snakefile).parent != Path(str(workflow.current_basedir)).parent


def show_summary():
    summary = Path(RESULTS) / "summary.txt"
    if summary.exists():
        print(f"\n{summary.read_text()}", file=sys.stderr)


def show_what_to_do():
    # Here and not above: a run that ends well, and a dry run, do without.
    from esmflow.report.summary import command_of, unfinished_lines

    lines = unfinished_lines(RESULTS, LOGS, command_of(psutil.Process().cmdline()))
    print("\n" + "\n".join(lines) + "\n", file=sys.stderr)
