"""Jobs with several slots and workers, and jobs that are asked to end."""

from __future__ import annotations

import os
import signal
from itertools import chain

import psutil
import pytest
from workflow_run import Hold, kill, wait_until


@pytest.fixture
def started(quick_run):
    """Starts runs, and leaves none behind."""
    processes = []

    def start(run, **limits):
        processes.append(run.start(**limits))
        return processes[-1]

    yield start
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def test_workers_of_one_job_share_its_shards_and_survive_the_death_of_one(quick_run, started):
    # More than the run is given: Snakemake clamps the job to two.
    run = quick_run(120, groups=1, shard_residues=1500, cpu_slots=2, gpus_per_job=4)
    hold = Hold(run.folder)
    process = started(run, cores=2, gpus=2, environment=hold.environment)
    wait_until(lambda: len(hold.held()) == 2, what="two workers with a shard in hand")
    killed = min(hold.held())
    kill(killed)
    # The other one could finish everything before the new process has its model.
    wait_until(lambda: len(hold.held()) == 3, what="the new process with a shard in hand")
    hold.release()
    assert process.wait(240) == 0
    (group,) = run.groups()
    assert group["attempt"] == 1
    assert [worker["device"] for worker in group["workers"]] == [0, 1]
    assert {worker["slot"]["token"] for worker in group["workers"]} == {"CPU-0", "CPU-1"}
    (death,) = chain.from_iterable(worker["exits"] for worker in group["workers"])
    assert (death["process"], death["signal"]) == (killed, "SIGKILL")
    assert all(worker["processed"] > 0 and worker["status"] == "completed" for worker in group["workers"])
    assert sum(worker["processed"] for worker in group["workers"]) == len(group["shards"])
    assert {shard["device"] for shard in group["shards"]} == {0, 1}
    assert len(set(group["segments_written"])) == len(group["shards"])
    assert run.summary()["embedded"] == run.summary()["records"] == 120
    assert "using that" in (run.folder / "logs" / "embed" / "group-0.log").read_text()


def test_a_job_for_more_slots_than_there_are_is_an_error_that_names_the_key(quick_run):
    run = quick_run(8, groups=1, cpu_slots=2, gpus_per_job=3, failures={"retries": 0})
    ended = run.run(cores=4, gpus=8)
    assert ended.returncode == 1
    assert "gpus_per_job: one job is to lease 3 slots, and there are 2 here (CPU-0, CPU-1)" in ended.stdout


def test_sigterm_commits_the_shard_in_hand_and_ends_with_143_and_the_next_run_goes_on(quick_run, started):
    run = quick_run(120, groups=1, shard_residues=1500, cpu_slots=2, gpus_per_job=2)
    hold = Hold(run.folder)
    process = started(run, cores=2, gpus=2, environment=hold.environment)
    wait_until(lambda: len(hold.held()) == 2, what="two workers with a shard in hand")
    before = {path.stem for path in run.segments()}
    # As a scheduler does it: every process of the job.
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        member.terminate()
    hold.release()
    assert process.wait(240) != 0
    printed = (run.folder / "snakemake.out").read_text()
    assert "returned non-zero exit status 143" in printed
    assert "asked to end (SIGTERM)" in printed
    assert "Traceback" not in (run.folder / "logs" / "embed" / "group-0.log").read_text()
    assert not any(member.is_running() and member.status() != psutil.STATUS_ZOMBIE for member in family)
    assert not list(run.results.rglob("*.part"))
    committed = {path.stem for path in run.segments()}
    assert committed > before

    run.succeed(cores=2, gpus=2)
    (group,) = run.groups()
    assert set(group["segments_reused"]) == committed
    assert committed.isdisjoint(group["segments_written"])
    assert group["segments_written"]
    assert run.summary()["embedded"] == 120
