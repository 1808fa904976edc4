"""A whole run on the demo's input, looked at as a user would: what came out, and does all of it add up."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections import Counter

import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from workflow_run import PROJECT, WorkflowRun

from esmflow.arrays import Outputs
from esmflow.checkpoint.models import guess_model
from esmflow.config.configuration import validated
from esmflow.config.job_estimates import estimate_job, guess_work, job_settings
from esmflow.engine.fair_esm import ReferenceEngine
from esmflow.inputs.fasta import read_records

FILES = {
    "reviewed": "reviewed.fasta",
    "unreviewed": "unreviewed.fasta.gz",
    "difficult": "difficult.fasta",
}
MODEL_LAYERS = 6


@pytest.fixture(scope="module")
def run(tmp_path_factory, real_model_folder) -> WorkflowRun:
    run = WorkflowRun(
        tmp_path_factory.mktemp("run"),
        real_model_folder,
        layers=[-1, 3],
        include=["mean", "bos"],
        groups=2,
        shard_residues=10000,
    )
    run.write_samples({sample: PROJECT / "resources" / "demo" / name for sample, name in FILES.items()})
    run.printed = run.succeed(cores=2, gpus=2)
    return run


@pytest.fixture(scope="module")
def records():
    """Every record of the input, as the library reads it."""
    return [record for name in FILES.values() for record in read_records(PROJECT / "resources" / "demo" / name)]


def manifest(run):
    return pq.read_table(run.results / "manifest.parquet").to_pylist()


def test_the_manifest_has_one_row_for_every_record_in_input_order(run, records):
    rows = manifest(run)
    assert [(row["file"], row["record"], row["id"]) for row in rows] == [(r.file, r.position, r.id) for r in records]
    assert [row["reason"] for row in rows] == [r.reason and r.reason.value for r in records]
    assert Counter(row["status"] for row in rows) == {"embedded": 146, "rejected": 4}


def test_the_manifest_as_tsv_is_the_same_table(run):
    with open(run.results / "manifest.tsv", newline="") as handle:
        text = list(csv.DictReader(handle, delimiter="\t"))
    assert [(row["id"], row["digest"], row["status"]) for row in text] == [
        (row["id"], row["digest"] or "", row["status"]) for row in manifest(run)
    ]


def test_failures_has_one_row_for_each_record_without_an_embedding(run, records):
    with open(run.results / "failures.tsv", newline="") as handle:
        rows = list(csv.DictReader(handle, delimiter="\t"))
    assert list(rows[0]) == ["file", "record", "id", "reason", "detail"]
    expected = [(r.file, str(r.position), r.id, r.reason.value) for r in records if r.reason]
    assert [(row["file"], row["record"], row["id"], row["reason"]) for row in rows] == expected
    assert all(row["detail"] for row in rows)


@pytest.mark.parametrize("array", ["mean_layer6", "bos_layer6", "mean_layer3", "bos_layer3"])
def test_h5_and_pt_hold_the_same_vectors_in_input_order(run, records, array):
    embedded = [record for record in records if record.reason is None]
    with h5py.File(run.results / "embeddings" / array / "embeddings.h5") as file:
        ids, vectors = file["ids"].asstr()[:], file["embeddings"][:]
        assert file.attrs["layer"] == int(array[-1])
        assert file.attrs["pooling"] == array.split("_")[0]
        assert file.attrs["precision"] == "fp32"
        assert file.attrs["fingerprint"] == json.loads((run.results / "plan" / "plan.json").read_text())["fingerprint"]
        assert file.attrs["version_torch"] == torch.__version__
    assert list(ids) == [record.id for record in embedded]
    proteins, data = [], []
    for name in ("reviewed", "unreviewed", "difficult"):
        loaded = torch.load(run.results / "embeddings" / array / "pt" / f"{name}_ESM.pt", weights_only=True)
        proteins += loaded["proteins"]
        data += loaded["data"]
    assert proteins == list(ids)
    assert {vector.dtype for vector in data} == {torch.float32}
    assert np.array_equal(torch.stack(data).numpy(), vectors)


def test_the_vectors_are_those_of_the_model_computed_one_by_one(run, records, real_checkpoint):
    engine = ReferenceEngine.load(str(real_checkpoint), Outputs((6,), ("mean",)), "fp32", "cpu")
    embedded = [record for record in records if record.reason is None]
    with h5py.File(run.results / "embeddings" / "mean_layer6" / "embeddings.h5") as file:
        vectors = file["embeddings"][:]
    for i in range(0, len(embedded), 10):
        alone = engine.fetch(engine.launch(engine.prepare([embedded[i].sequence])))["mean_layer6"][0]
        assert np.linalg.norm(vectors[i] - alone) / np.linalg.norm(alone) < 1e-5


def test_equal_sequences_are_computed_once_and_both_records_get_the_vector(run):
    rows = manifest(run)
    by_digest = Counter(row["digest"] for row in rows if row["digest"])
    (twice,) = [digest for digest, count in by_digest.items() if count > 1]
    first, second = [row for row in rows if row["digest"] == twice]
    assert (first["segment"], first["row"]) == (second["segment"], second["row"])
    assert second["id"] == "copy_of_a_reviewed_protein"
    assert sum(group["sequences"] for group in run.groups()) == len(by_digest)


def test_each_group_says_where_and_when_it_ran_and_what_it_did(run):
    groups = run.groups()
    assert [group["group"] for group in groups] == ["0", "1"]
    for group in groups:
        (worker,) = group["workers"]
        assert worker["slot"]["token"] in ("CPU-0", "CPU-1")
        assert group["started"] <= worker["leased"] < worker["released"] <= group["ended"]
        assert group["residues"] > 0
        assert group["residues_per_second"] > 0
        assert group["model_load_seconds"] > 0
        assert group["peak_memory_bytes"] > 0
        assert group["engine"] == "packed"
        assert group["token_budget"] > 1000
        assert len({shard["worker"] for shard in group["shards"]}) == 1
        assert [shard["segment"] for shard in group["shards"]] == group["segments_written"]


def test_the_memory_that_each_job_asks_for_was_estimated_within_a_factor_of_two(run):
    config = validated(run.config, PROJECT / "workflow/schemas/config.schema.yaml")
    model = guess_model(config["model"], run.results / "model" / "model.json")
    for number, group in enumerate(run.groups()):
        work = guess_work(number, 2, run.results / "plan" / "plan.json", [])
        assert (work.residues, work.planned) == (group["residues"], True)
        estimate = estimate_job(work, model, job_settings(config, "cpu"))
        assert 0.5 < estimate.memory_mb * 1e6 / group["job_memory_bytes"] < 2
        assert estimate.memory_mb_to_ask_for(attempt=1) * 1e6 > group["job_memory_bytes"]


def test_logs_are_joined_and_say_precision_progress_and_rejections(run):
    log = (run.results / "run.log").read_text()
    steps = ["model", "plan", *(f"embed/group-{n}" for n in range(2)), "collect", "finish"]
    assert re.findall(r"^===== .*logs/(.*)\.log =====$", log, re.MULTILINE) == steps
    assert "precision auto: fp32, because this runs on a CPU" in log
    assert "residues/s" in log
    assert re.search(r"\d\d:\d\d left", log)
    assert "rejected" in log
    assert log.count("model loaded on CPU") == 2


def test_the_run_ends_with_a_summary_of_what_came_of_the_records(run):
    ending = run.printed[run.printed.index("records    150") :]
    assert "146 embedded, 4 rejected, 0 failed" in ending
    assert "1 × empty_sequence" in ending
    assert "2 × invalid_residue" in ending
    assert "residues/s" in ending
    assert "results/embeddings" in ending


def test_a_second_run_has_nothing_to_do(run):
    assert "Nothing to be done" in run.succeed()


def test_after_the_results_are_deleted_but_not_the_store_no_model_is_loaded(run):
    for path in run.results.iterdir():
        if path.is_file():
            path.unlink()
        elif path.name not in ("store", "model"):
            shutil.rmtree(path)
    run.succeed()
    assert [(group["workers"], group["segments_written"]) for group in run.groups()] == [([], [])] * 2
    assert run.summary()["embedded"] == 146
