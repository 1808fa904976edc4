"""What a configuration says reaches the stage that it is for: every key, through the real rules, in the right unit.

Every key is at a value that is not its default. For each script a table says which key ends up in which field of the
settings, and as what; whatever else the settings hold is listed too, so that nothing is compared by chance.
"""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path
from types import SimpleNamespace

import collect
import embed
import fetch_model
import finish
import plan
import pytest
import report
import variants
import verify
import yaml
from workflow_run import PROJECT, SNAKEFILE

from esmflow.checkpoint.file import CheckpointInfo
from esmflow.checkpoint.models import ModelDimensions
from esmflow.collect.formats import FORMATS
from esmflow.collect.summary import Summary, VariantSummary
from esmflow.config.configuration import with_defaults
from esmflow.embedding.run_record import RunRecord
from esmflow.method import ARITHMETIC, METHOD_VERSION, Fingerprint
from esmflow.plan.run_plan import Plan
from esmflow.store.segments import Store
from esmflow.verify.certificate import Certificate

SCHEMA = yaml.safe_load((PROJECT / "workflow" / "schemas" / "config.schema.yaml").read_text())
DEMO = PROJECT / "tests" / "data" / "demo_run"
MODEL = CheckpointInfo("made up", "c" * 32, "a.pt", "s" * 64, ModelDimensions(6, 320, 20, True, True))
PLAN = Plan(fingerprint="f", records=2, groups=(), checkpoint_stamp=(5, 6), stored_segments=("one", "another"))
CONFIG = {
    "samples": "samples.tsv",
    "model": "adapter",
    "base_model": "8M",
    "model_folder": "models",
    "download": False,
    "variants": "variants.tsv",
    "layers": [3, -1],
    "include": ["per_residue", "mean"],
    "per_residue_precision": "fp16",
    "engine": "reference",
    "precision": "bf16",
    "batch_tokens": 512,
    "long_sequences": "reject",
    "max_residues": 77,
    "window_overlap": 33,
    "invalid_residues": "replace_with_x",
    "nucleotide_sequences": "keep",
    "gaps": "keep",
    "id": "accession",
    "groups": 3,
    "assignment": "round_robin",
    "shard_residues": 555,
    "threads": 3,
    "gpus_per_job": 2,
    "grace_seconds": 11,
    "hang_minutes": 7,
    "device": "cpu",
    "device_tflops": 1.5,
    "cpu_slots": 5,
    "slot_wait_minutes": 13,
    "slot_lock_folder": "locks",
    "store": "shared/store",
    "disk_check": False,
    "formats": ["npy", "h5"],
    "pooled_precision": "fp16",
    "report": False,
    "failures": {"policy": "error", "retries": 4},
    "attention": {"max_residues": 90, "max_gigabytes": 7},
    "verify": {"sample": 5, "seed": 9, "min_cosine": 0.5, "max_relative_error": 0.25},
}

# Key of the configuration: field of the settings, and its value there.
METHOD = {
    "layers": ("fingerprint.layers", (3, 6)),
    "include": ("fingerprint.include", ("mean", "per_residue")),
    "per_residue_precision": ("fingerprint.per_residue_precision", "fp16"),
    "engine": ("fingerprint.engine", "reference"),
    "precision": ("fingerprint.precision", "bf16"),
    "long_sequences": ("fingerprint.long_sequences", "reject"),
    "invalid_residues": ("fingerprint.invalid_residues", "replace_with_x"),
    "store": ("store", "shared/store"),
}
REST_OF_METHOD = {
    "fingerprint.checkpoint": MODEL.digest,
    "fingerprint.arithmetic": ARITHMETIC["reference", "bf16"],
    # What is rejected is neither cut nor embedded in windows.
    "fingerprint.max_residues": None,
    "fingerprint.window_overlap": None,
    "fingerprint.method_version": METHOD_VERSION,
}
SLOTS = {
    "device": ("slots.device", "cpu"),
    "cpu_slots": ("slots.cpu_slots", 5),
    "slot_lock_folder": ("slots.lock_folder", "locks"),
    "slot_wait_minutes": ("slots.wait_seconds", 13 * 60),
}
OF_PLAN = {"checkpoint": "results/model/checkpoint.safetensors", "checkpoint_stamp": (5, 6)}
ANNOTATED = {"annotations": (("host", "bat"),)}
INPUTS = [{"sample": "one", "path": "a.fasta", **ANNOTATED}, {"sample": "two", "path": "b.fasta", **ANNOTATED}]
RUNS = [f"results/embed/group-{group}/run.json" for group in range(3)]


@dataclasses.dataclass(frozen=True)
class Stage:
    """A script's settings: which function makes them, which keys end up where, and what else is in them."""

    rule: str
    make: object
    keys: dict
    rest: dict


STAGES = [
    Stage(
        "model",
        fetch_model.model_settings,
        {
            "model": ("model", "adapter"),
            "base_model": ("base", "esm2_t6_8M_UR50D"),
            "model_folder": ("folder", "models"),
            "download": ("download", False),
        },
        {"checkpoint": "results/model/checkpoint.safetensors", "info": "results/model/model.json"},
    ),
    Stage(
        "plan",
        plan.plan_settings,
        METHOD
        | {
            "samples": ("inputs", INPUTS),
            "max_residues": ("policy.max_residues", 77),
            "nucleotide_sequences": ("policy.nucleotides", "keep"),
            "gaps": ("policy.gaps", "keep"),
            "id": ("id_rule", "accession"),
            "groups": ("groups", [f"results/plan/shards/group-{group}" for group in range(3)]),
            "assignment": ("assignment", "round_robin"),
            "shard_residues": ("shard_residues", 555),
            "gpus_per_job": ("workers", 2),
            "formats": ("formats", [dataclasses.asdict(FORMATS[name]) for name in ("npy", "h5")]),
            "attention.max_gigabytes": ("most_bytes_of_maps", 7e9),
            "pooled_precision": ("pooled_precision", "fp16"),
            "disk_check": ("disk_check", False),
            "variants": ("variants", ("variants.tsv", "results/plan/variants.parquet")),
        },
        REST_OF_METHOD
        | {
            "policy.invalid": "replace_with_x",
            "records": "results/plan/records.parquet",
            "candidates": "results/plan/candidates.fasta",
            "plan": "results/plan/plan.json",
            "checkpoint": "results/model/checkpoint.safetensors",
            "processes": 4,
            "number": 17,
            # The configuration says how many groups there are.
            "work": 0.0,
            "least_cost": 0.0,
            "cost_model.long.max_residues": None,
            "cost_model.long.window_overlap": None,
            **{f"cost_model.dimensions.{name}": n for name, n in dataclasses.asdict(MODEL.dimensions).items()},
        },
    ),
    Stage(
        "embed",
        embed.embed_settings,
        METHOD
        | SLOTS
        | {
            "batch_tokens": ("token_budget", 512),
            "threads": ("threads", 3),
            "gpus_per_job": ("workers", 2),
            "grace_seconds": ("grace_seconds", 11),
            "hang_minutes": ("hang_seconds", 7 * 60),
            "failures.policy": ("retry_failed", True),
            "failures.retries": ("last_attempt", 5),
        },
        REST_OF_METHOD
        | OF_PLAN
        | {
            "group": "2",
            "shards": "results/plan/shards/group-2",
            "run": "results/embed/group-2/run.json",
            "failures": "results/embed/group-2/failures.tsv",
            "attempt": 2,
            "log_file": "logs/embed/group-2.log",
        },
    ),
    Stage(
        "collect",
        collect.collect_settings,
        METHOD
        | {
            "groups": ("runs", RUNS),
            "gaps": ("gaps", "keep"),
            "formats": ("formats", ["npy", "h5"]),
            "pooled_precision": ("pooled_precision", "fp16"),
        },
        REST_OF_METHOD
        | {
            "records": "results/plan/records.parquet",
            "plan": "results/plan/plan.json",
            "failure_lists": [run.replace("run.json", "failures.tsv") for run in RUNS],
            "embeddings": "results/embeddings",
            "manifest": "results/manifest.parquet",
            "manifest_tsv": "results/manifest.tsv",
            "failures": "results/failures.tsv",
            "summary": "results/summary.json",
            "note": "results/embeddings.json",
            "note_number": 0,
            "model": "made up",
            "threads": 4,
        },
    ),
    Stage(
        "variants",
        variants.variant_settings,
        METHOD | {"groups": ("failure_lists", [run.replace("run.json", "failures.tsv") for run in RUNS])},
        REST_OF_METHOD
        | {
            "planned": "results/plan/variants.parquet",
            "table": "results/variants.parquet",
            "table_tsv": "results/variants.tsv",
            "summary": "results/variants.json",
            "threads": 4,
        },
    ),
    Stage(
        "verify",
        verify.verify_settings,
        METHOD
        | SLOTS
        | {
            "threads": ("threads", 3),
            "formats": ("formats", ["npy", "h5"]),
            "verify.sample": ("sample", 5),
            "verify.seed": ("seed", 9),
            "verify.min_cosine": ("min_cosine", 0.5),
            "verify.max_relative_error": ("max_relative_error", 0.25),
        },
        REST_OF_METHOD
        | OF_PLAN
        | {
            "candidates": "results/plan/candidates.fasta",
            "manifest": "results/manifest.parquet",
            "embeddings": "results/embeddings",
            "stored_segments": ("one", "another"),
            "model": "made up",
            "log_file": "logs/verify.log",
        },
    ),
    Stage(
        "finish",
        finish.finish_settings,
        {
            "report": ("places.report", None),
            "variants": ("variants", "results/variants.json"),
            "verify.sample": ("certificate", "results/certificate.json"),
            "failures.policy": ("fail_without_embedding", True),
            "groups": ("runs", RUNS),
        },
        {
            "summary": "results/summary.json",
            "model": "made up",
            "places.embeddings": "results/embeddings",
            "places.manifest": "results/manifest.parquet",
            "places.failures": "results/failures.tsv",
            "places.command": "snakemake",
            "output": "results/summary.txt",
            "logs": [
                *("logs/model.log", "logs/plan.log"),
                *(f"logs/embed/group-{group}.log" for group in range(3)),
                *("logs/collect.log", "logs/variants.log", "logs/verify.log", "logs/finish.log"),
            ],
            "joined_log": "results/run.log",
            "shows_summary": False,
        },
    ),
]
# Keys that only rules use, for what they ask a scheduler for.
OF_RULES_ONLY = {"device_tflops", "attention.max_residues"}
# Told by another test here: under `long_sequences: reject` there are no windows.
OF_WINDOWS = {"window_overlap"}
SNAKEMAKES_OWN = {"pathvars"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working directory with what earlier steps leave."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "config").mkdir()
    (folder / "config" / "config.yaml").write_text("groups: 9\n")
    (folder / "variants.tsv").write_text("id\tvariant\n")
    (folder / "samples.tsv").write_text("sample\tfasta\thost\none\ta.fasta\tbat\ntwo\tb.fasta\tbat\n")
    for name in ("a", "b"):
        (folder / f"{name}.fasta").write_text(">p\nMKV\n")
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    MODEL.write(folder / "results" / "model" / "model.json")
    PLAN.write(folder / "results" / "plan" / "plan.json")
    return folder


def rules_of(folder: Path, config: dict) -> dict:
    """The workflow's own rules under a configuration, by name."""
    # Here alone: every process of tests reads this file, and Snakemake takes its time.
    from snakemake.api import SnakemakeApi
    from snakemake.settings.types import ConfigSettings, OutputSettings, Quietness, ResourceSettings

    given = ConfigSettings(config=config)
    with SnakemakeApi(OutputSettings(quiet={Quietness.ALL})) as api:
        limits = ResourceSettings(cores=8, resources={"gpu": 2})
        loaded = api.workflow(limits, config_settings=given, snakefile=SNAKEFILE, workdir=folder)
        return {rule.name: rule for rule in loaded._workflow.rules}


@pytest.fixture(scope="module")
def rules(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        # The workflow notes here which run its jobs belong to.
        patch.setenv("ESMFLOW_RUN", "")
        yield rules_of(folder, CONFIG)


GROUP = SimpleNamespace(group="2")


class Files(list):
    """Files of a rule by number and by name, as Snakemake hands them to a script."""

    def __init__(self, files) -> None:
        super().__init__()
        for name, value in [*files.items()] or [(None, list(files))]:
            value = named(value)
            self.extend([value] if isinstance(value, str) else value)
            if name:
                setattr(self, name, value)


def named(files) -> str | list[str]:
    """One file or several, or what a function of the wildcards gives, for group 2."""
    if callable(files):
        files = files(GROUP)
    if isinstance(files, str):
        return re.sub(r"\{group(,\[0-9\]\{1,5\})?\}", "2", str(files))
    return [named(file) for file in files]


def job(rule, config: dict) -> SimpleNamespace:
    """Snakemake's object for a script: the second attempt of a job of a rule, for group 2."""
    params = {name: value(GROUP) if callable(value) else value for name, value in rule.params.items()}
    if "plan_number" in params:
        params["plan_number"] = {"plan number": 17}
    return SimpleNamespace(
        input=Files(rule.input),
        output=Files(rule.output),
        params=SimpleNamespace(**params),
        log=Files(rule.log),
        config=with_defaults(config, SCHEMA),
        threads=rule.resources["_cores"].value,
        resources=SimpleNamespace(gpu=2, attempt=2),
        wildcards=GROUP,
    )


def flat(settings, before: str = "") -> dict:
    """Fields of a dataclass by name, those of dataclasses inside it with dots."""
    found = {}
    for field in dataclasses.fields(settings):
        value, name = getattr(settings, field.name), f"{before}{field.name}"
        if dataclasses.is_dataclass(value):
            found |= flat(value, f"{name}.")
        elif isinstance(value, list) and value and dataclasses.is_dataclass(value[0]):
            found[name] = [dataclasses.asdict(entry) for entry in value]
        else:
            found[name] = value
    return found


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.rule)
def test_every_key_reaches_its_stage(rules, stage):
    expected = stage.rest | dict(stage.keys.values())
    assert flat(stage.make(job(rules[stage.rule], CONFIG))) == expected


def test_the_report_reads_what_the_run_wrote(rules, folder):
    fingerprint = Fingerprint("c", (6,), ("mean",), None, "packed", "", "auto", "whole", None, None, "reject")
    store = Store("shared/store", fingerprint)
    store.create()
    Plan(fingerprint=store.fingerprint, records=2, groups=()).write("results/plan/plan.json")
    Summary(records=2, embedded=2, failed=0, rejected=0).write("results/summary.json")
    VariantSummary(rows=3, scored=3).write("results/variants.json")
    Certificate(passed=True, sample=5).write("results/certificate.json")
    for number, run in enumerate(RUNS):
        RunRecord(group=str(number)).write(run)
    found = report.report_files(job(rules["report"], CONFIG))
    PLAN.write("results/plan/plan.json")
    assert (found.fingerprint, found.store.folder) == (fingerprint, store.folder)
    assert [run.group for run in found.runs] == ["0", "1", "2"]
    assert (found.summary.records, found.certificate.sample, found.model) == (2, 5, MODEL)
    assert found.variants.rows == 3
    assert (found.manifest, found.embeddings) == ("results/manifest.parquet", "results/embeddings")
    assert (found.results, found.checkpoint) == ("results", "results/model/checkpoint.safetensors")
    assert found.configuration == with_defaults(CONFIG, SCHEMA)
    assert found.command


def test_windows_and_what_is_automatic(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("ESMFLOW_RUN", os.environ.get("ESMFLOW_RUN", ""))
    config = {**CONFIG, "long_sequences": "window", "batch_tokens": "auto", "report": True, "verify": {"sample": 0}}
    del config["failures"], config["store"], config["variants"]
    rules = rules_of(folder, config)
    planned = plan.plan_settings(job(rules["plan"], config))
    assert (planned.fingerprint.max_residues, planned.fingerprint.window_overlap) == (77, 33)
    assert (planned.cost_model.long.max_residues, planned.cost_model.long.window_overlap) == (77, 33)
    assert planned.policy.max_residues is None
    embedded = embed.embed_settings(job(rules["embed"], config))
    assert (embedded.token_budget, embedded.retry_failed, embedded.last_attempt) == (None, False, 3)
    assert embedded.store == "results/store"
    verified = verify.verify_settings(job(rules["verify"], config))
    assert (verified.min_cosine, verified.max_relative_error) == (None, None)
    finished = finish.finish_settings(job(rules["finish"], config))
    assert (finished.certificate, finished.places.report) == (None, "results/report.html")
    assert (finished.variants, planned.variants) == (None, None)
    assert finished.fail_without_embedding is False


def test_a_job_with_fewer_gpus_than_it_asked_for_has_as_many_workers_and_no_more_threads_each(rules):
    given = job(rules["embed"], CONFIG)
    given.resources.gpu = 1
    settings = embed.embed_settings(given)
    assert (settings.workers, settings.threads) == (1, 3)


def keys_of(schema: dict, before: str = "") -> set[str]:
    """All keys of a schema, nested ones with dots."""
    found = set()
    for key, rule in schema["properties"].items():
        found |= keys_of(rule, f"{before}{key}.") if "properties" in rule else {f"{before}{key}"}
    return found


def test_every_key_of_the_configuration_is_in_a_table():
    told = {key for stage in STAGES for key in stage.keys}
    assert told | OF_RULES_ONLY | OF_WINDOWS | SNAKEMAKES_OWN == keys_of(SCHEMA)


def test_every_key_is_at_another_value_than_its_default():
    defaults, given = with_defaults({}, SCHEMA), with_defaults(CONFIG, SCHEMA)
    for key in CONFIG:
        if isinstance(given[key], dict):
            assert all(given[key][part] != defaults[key][part] for part in defaults[key]), key
        elif key != "samples":
            assert given[key] != defaults[key], key
