import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError

SCRIPTS = Path(str(workflow.current_basedir)).parent / "scripts"
if not SCRIPTS.is_dir():
    # Deployed from a git host, file by file: fetch the library to where Snakemake puts the scripts that import it.
    for name in Path(workflow.source_path("../library.files")).read_text().split():
        workflow.source_path(f"../{name}")
    SCRIPTS = Path(workflow.source_path("../scripts/esmflow/__init__.py")).parents[1]
sys.path.insert(0, str(SCRIPTS))

from esmflow.checkpoint_sources import is_path
from esmflow.configuration import ConfigurationError, read_samples, validated

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
    """The checkpoint as an input file, if the configuration names one by its path."""
    return [config["model"]] if is_path(config["model"]) else []


def get_max_residues():
    """Residues after which a sequence is cut, if any is."""
    return config["max_residues"] if config["long_sequences"] in ("truncate", "window") else None


def get_window_overlap():
    return config["window_overlap"] if config["long_sequences"] == "window" else None


def get_store():
    return config["store"] or f"{RESULTS}/store"


def get_method():
    """What, besides the checkpoint, the fingerprint is made of."""
    return {
        "layers": config["layers"],
        "include": config["include"],
        "per_residue_precision": config["per_residue_precision"],
        "engine": config["engine"],
        "precision": config["precision"],
        "long_sequences": config["long_sequences"],
        "max_residues": get_max_residues(),
        "window_overlap": get_window_overlap(),
        "invalid_residues": config["invalid_residues"],
    }


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
