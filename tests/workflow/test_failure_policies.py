"""What a run does about sequences and shards that fail, under both policies."""

from __future__ import annotations

import csv
import json
import re

import pytest
import torch
from made_up import fetch, random_model, stored_tensors, write_fair_esm
from workflow_run import Hold, kill, wait_until

from esmflow.inputs.residues import RESIDUE_TOKEN
from esmflow.plan.shards import list_shards, read_shard, shard_name

GOOD = {f"good{n}": "MKVLAAGIVGLLLAQWERTYDE"[: 12 + n] for n in range(8)}
FAILING = {"with_pyrrolysine": "MKVLAOGIVG", "another": "OMKVLAAG"}


@pytest.fixture(scope="module")
def model_without_pyrrolysine(tmp_path_factory):
    """A model so damaged that every sequence with an O gives NaN: failures as they really come."""
    model = random_model(2, 32, 2)
    with torch.no_grad():
        model.embed_tokens.weight[RESIDUE_TOKEN["O"]] = float("nan")
    path = write_fair_esm(tmp_path_factory.mktemp("damaged") / "damaged.pt", stored_tensors(model))
    fetch(path, path.parent)
    return path


@pytest.fixture
def run(quick_run, model_without_pyrrolysine):
    """Two groups of several shards; two sequences fail."""
    run = quick_run(0, model=model_without_pyrrolysine, groups=2, shard_residues=40)
    run.has_fetched(model_without_pyrrolysine.parent)
    (run.folder / "part0.faa").write_text("".join(f">{i}\n{s}\n" for i, s in {**GOOD, **FAILING}.items()))
    return run


def failures(run):
    with open(run.results / "failures.tsv", newline="") as handle:
        return {row["id"]: row["reason"] for row in csv.DictReader(handle, delimiter="\t")}


def test_error_fails_after_all_is_done_the_next_run_tries_only_failed_shards_and_report_ends_with_success(run):
    run.configure(failures={"policy": "error"}, report=True)
    ended = run.run()
    assert ended.returncode == 1
    assert "2 records have no embedding" in ended.stdout
    # Everything that could be done is done: the results are there, for the good records.
    assert (run.results / "embeddings" / "mean_layer2" / "embeddings.h5").exists()
    assert "8 of 10 records have an embedding" in (run.results / "report.html").read_text()
    assert run.summary()["embedded"] == 8
    before = {path: path.stat().st_mtime_ns for path in run.segments()}
    good = {path for path in before if not segment_failures(path)}
    assert 0 < len(good) < len(before)

    run.configure(report=False)
    again = run.run()
    assert again.returncode == 1
    after = {path: path.stat().st_mtime_ns for path in run.segments()}
    failed = set(before) - good
    assert {path for path in after if after[path] != before[path]} == failed
    withdrawn = [json.loads(path.read_text()) for path in run.results.glob("embed/group-*/failed-run.json")]
    assert {name for group in withdrawn for name in group["segments_written"]} == {path.stem for path in failed}
    assert {name for group in withdrawn for name in group["segments_reused"]} <= {path.stem for path in good}

    run.configure(failures={"policy": "report"})
    printed = run.succeed()
    assert "2 × non_finite" in printed
    assert failures(run) == dict.fromkeys(FAILING, "non_finite")
    assert (run.summary()["embedded"], run.summary()["failed"]) == (8, 2)
    assert not (run.results / "report.html").exists()
    assert {path: path.stat().st_mtime_ns for path in run.segments()} == after
    assert "Nothing to be done" in run.succeed()


def segment_failures(path):
    with open(path, "rb") as handle:
        header = json.loads(handle.read(int.from_bytes(handle.read(8), "little")))
    return json.loads(header["__metadata__"]["failures"])


@pytest.fixture
def kill_two_workers():
    """Runs whose first shard ends two workers, each when it has it in hand; then everything is released."""

    def start(run):
        hold = Hold(run.folder, segments=0)
        process = run.start(cores=1, gpus=1, environment=hold.environment)
        killed: set[int] = set()
        for _ in range(2):
            (worker,) = wait_until(lambda: hold.held() - killed, what="a worker with a shard in hand")
            kill(worker)
            killed.add(worker)
        hold.release()
        assert process.wait(240) == 0
        return (run.folder / "snakemake.out").read_text()

    return start


def test_a_shard_that_ends_two_workers_on_the_last_attempt_is_recorded_and_the_others_are_embedded(
    quick_run, kill_two_workers
):
    run = quick_run(200, groups=2, failures={"retries": 0})
    kill_two_workers(run)
    crashed, good = sorted(run.groups(), key=lambda group: not group["shards_failed"])
    (failed,) = crashed["shards_failed"]
    assert "SIGKILL" in failed["detail"]
    assert "model loaded" in failed["detail"]
    assert not good["shards_failed"]
    summary = run.summary()
    assert summary["failed"] == summary["reasons"]["worker_crashed"] == crashed["failed_sequences"] > 0
    assert summary["embedded"] == good["sequences"] > 0
    assert summary["embedded"] + summary["failed"] == summary["records"] > 0


def test_a_shard_that_failed_is_tried_again_with_half_the_tokens_and_more_memory_and_time(quick_run, kill_two_workers):
    run = quick_run(12, groups=1, batch_tokens=1000, failures={"retries": 1})
    printed = kill_two_workers(run)
    assert "1 of 1 shards failed on attempt 1" in printed
    (group,) = run.groups()
    assert (group["attempt"], group["token_budget"], group["shards_failed"]) == (2, 500, [])
    assert run.summary()["embedded"] == run.summary()["records"] == 12
    for resource in ("mem_mb", "runtime"):
        first, second = map(int, re.findall(rf"resources: .*gpu=1, .*\b{resource}=(\d+)", printed))
        assert second == 2 * first


def test_a_damaged_checkpoint_is_noticed_before_a_slot_is_taken(quick_run):
    run = quick_run(12, groups=1, failures={"retries": 0})
    run.succeed("--until", "plan")
    checkpoint = run.results / "model" / "checkpoint.safetensors"
    intact = checkpoint.read_bytes()
    # By the embed job, and by the plan that is made anew because of the change.
    for triggers, damaged, complaint in (
        (("--rerun-triggers", "input"), intact[:-1000], "not a whole .safetensors file"),
        ((), intact[:-1000] + bytes(1000), "not the ones that were converted"),
    ):
        checkpoint.write_bytes(damaged)
        ended = run.run(*triggers)
        assert ended.returncode == 1
        assert complaint in ended.stdout
        assert not (run.folder / "slots").exists()
    checkpoint.write_bytes(intact)
    run.succeed()
    assert run.summary()["embedded"] == 12


def test_what_fails_shard_after_shard_aborts_the_job_without_losing_a_record(quick_run):
    run = quick_run(12, groups=1, shard_residues=300, batch_tokens=1, threads=1, failures={"retries": 0})
    # A store in which no file can be created: every shard fails when it is committed, wherever it runs.
    run.configure(store="store", report=True)
    run.succeed("--until", "plan")
    fingerprint = json.loads((run.results / "plan" / "plan.json").read_text())["fingerprint"]
    for path in planned_segments(run, run.folder / "store" / fingerprint):
        path.mkdir(parents=True)
    ended = run.run()
    assert ended.returncode == 1
    assert "nothing was embedded: none of 12 records; results/failures.tsv says why of each" in ended.stdout
    assert "could not be shown" not in (run.results / "report.html").read_text()
    summary = run.summary()
    assert sum(summary["reasons"].values()) == summary["failed"] == summary["records"] == 12
    failed = [shard["reason"] for shard in run.groups()[0]["shards_failed"]]
    assert failed == ["worker_error"] * 3 + ["systemic_abort"] * (len(failed) - 3)
    assert len(failed) > 3
    log = (run.folder / "logs" / "embed" / "group-0.log").read_text()
    assert log.count("starting worker 0 again") == 2
    assert "3 failures in a row" in log


def planned_segments(run, folder):
    """Where the segments of a run's shards will be written."""
    for shard in list_shards(run.results / "plan" / "shards" / "group-0"):
        yield folder / f"{shard_name(digest for digest, _ in read_shard(shard))}.safetensors"
