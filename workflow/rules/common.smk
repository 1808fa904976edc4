import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError

SCRIPTS = Path(str(workflow.current_basedir)).parent / "scripts"
if not SCRIPTS.is_dir():
    # Deployed from a git host, file by file: the library is fetched to where Snakemake puts the scripts that import it.
    files = Path(workflow.source_path("../scripts/esmflow.files")).read_text().split()
    SCRIPTS = [Path(workflow.source_path(f"../scripts/{name}")) for name in files][0].parents[1]
sys.path.insert(0, str(SCRIPTS))

from esmflow.basis import basis_number, input_stamps
from esmflow.checkpoint_sources import files_of_checkpoint
from esmflow.configuration import ConfigurationError, computing_method, read_samples, validated
from esmflow.lifetime import note_run

note_run()

try:
    config = validated(config, Path(workflow.source_path("../schemas/config.schema.yaml")))
    INPUTS = read_samples(config["samples"], config["formats"])
except ConfigurationError as error:
    raise WorkflowError(str(error))

GROUPS = [f"{number:0{len(str(config['groups'] - 1))}d}" for number in range(config["groups"])]
RESULTS = workflow.pathvars.apply("<results>")
LOGS = workflow.pathvars.apply("<logs>")


wildcard_constraints:
    group="[0-9]{1,5}",


def get_fasta_files():
    return [file.path for file in INPUTS]


def get_local_checkpoint():
    """The files of the checkpoint as inputs, if the configuration names one by its path."""
    return files_of_checkpoint(config["model"])


def get_checkpoint_stamps():
    """Sizes and times of these files: they change even if a file is replaced by an older one."""
    return sorted(input_stamps(get_local_checkpoint()).items())


def get_store():
    return config["store"] or f"{RESULTS}/store"


def get_method():
    """What, besides the checkpoint, the fingerprint is made of."""
    return computing_method(config)


def get_basis(wildcards):
    """A number that changes when what the plan counts on changes behind Snakemake's back."""
    runs = [f"{RESULTS}/embed/group-{group}/run.json" for group in GROUPS]
    return basis_number(f"{RESULTS}/plan/basis.json", get_fasta_files(), runs, get_store())


def get_certificate():
    """The certificate as an input file, if the run gets one."""
    return []


def get_logs_to_join():
    embed_logs = [f"{LOGS}/embed/group-{group}.log" for group in GROUPS]
    return [f"{LOGS}/model.log", f"{LOGS}/plan.log", *embed_logs]


def show_summary():
    summary = Path(RESULTS) / "summary.txt"
    if summary.exists():
        print(f"\n{summary.read_text()}", file=sys.stderr)


def show_what_to_do():
    print(
        f"\nThe run did not finish. What went wrong is above and in {LOGS}/. The same command again goes on from here:\n"
        "finished shards are kept. If it says that the directory is locked, no other run is using it and the last one\n"
        "was killed: run it once with --unlock.\n",
        file=sys.stderr,
    )
