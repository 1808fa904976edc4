"""GPU slots under Snakemake: what a run's `run.json` files show, and what is left when something is killed."""

from __future__ import annotations

import fcntl
import os
import signal
from itertools import combinations

import psutil
import pytest
from workflow_run import Hold, kill, wait_until


def leases(run):
    return [
        (worker["slot"]["token"], worker["leased"], worker["released"])
        for group in run.groups()
        for worker in group["workers"]
    ]


def assert_no_overlap(held):
    for (slot, start, end), (other, other_start, other_end) in combinations(held, 2):
        assert slot != other or end <= other_start or other_end <= start


def held_slots(run) -> list[str]:
    """The slots that some process holds right now."""
    held = []
    for path in (run.folder / "slots").glob("*.lock"):
        with open(path) as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                held.append(path.name)
    return held


def processes(run, script: str) -> list[psutil.Process]:
    """Processes of a run that execute one of the workflow's scripts, or are its spawned workers."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.cwd() == str(run.folder) and any(script in word for word in process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_two_runs_at_once_never_share_a_slot_and_both_finish(quick_run, tmp_path):
    runs = [
        quick_run(16, folder=name, groups=2, cpu_slots=2, slot_lock_folder=str(tmp_path / "slots"))
        for name in ("one", "two")
    ]
    # No limit on gpu: both jobs of each run are started at once, and four must wait for one of the two slots.
    started = [run.start(cores=4, gpus=8) for run in runs]
    assert [process.wait(240) for process in started] == [0, 0]
    held = [lease for run in runs for lease in leases(run)]
    assert len(held) == 4
    assert {slot for slot, _, _ in held} == {"CPU-0", "CPU-1"}
    assert_no_overlap(held)
    assert [run.summary()["embedded"] for run in runs] == [16, 16]


@pytest.fixture
def run_in_the_middle(quick_run):
    """A run with one group of many shards, two of them committed, and held with the third in hand until released."""
    run = quick_run(120, groups=1, shard_residues=1500, cpu_slots=1)
    hold = Hold(run.folder)
    process = run.start(environment=hold.environment)
    (worker,) = wait_until(hold.held, what="a worker with a shard in hand")
    yield run, process, worker, hold.release
    if process.poll() is None:
        process.kill()
        process.wait()


def test_a_second_run_is_refused_and_the_shard_of_a_killed_worker_is_tried_again_in_the_same_job(run_in_the_middle):
    run, process, worker, release = run_in_the_middle
    refused = run.run()
    assert refused.returncode != 0
    assert "cannot be locked" in refused.stdout
    kill(worker)
    release()
    assert process.wait(240) == 0
    (group,) = run.groups()
    assert group["attempt"] == 1
    (death,) = group["workers"][0]["exits"]
    assert (death["process"], death["signal"]) == (worker, "SIGKILL")
    assert any("model loaded" in line for line in death["log_lines"])
    (in_hand,) = death["in_hand"]
    assert in_hand in {shard["shard"] for shard in group["shards"]}
    assert run.summary()["embedded"] == run.summary()["records"] == 120


def test_after_a_supervisor_is_killed_its_slot_is_free_and_the_run_finishes(run_in_the_middle):
    run, process, worker, release = run_in_the_middle
    (supervisor,) = [p.pid for p in processes(run, "embed.py") if p.pid == psutil.Process(worker).ppid()]
    kill(supervisor)
    wait_until(lambda: not psutil.pid_exists(worker), what="the worker's death")
    release()
    assert process.wait(240) == 0
    assert run.groups()[0]["attempt"] == 2
    assert run.summary()["embedded"] == 120
    log = (run.folder / "logs" / "embed" / "group-0.log").read_text()
    assert log.index("===== attempt 1, ") < log.index("model loaded") < log.index("===== attempt 2, ")


def test_after_snakemake_is_killed_the_slot_is_free_and_the_next_run_computes_only_what_is_missing(run_in_the_middle):
    run, process, _, _ = run_in_the_middle
    kill(process.pid)
    process.wait()
    wait_until(lambda: not processes(run, "spawn_main") and not held_slots(run), what="the free slot")
    committed = {path.stem for path in run.segments()}
    refused = run.run()
    assert refused.returncode != 0
    assert "--unlock" in refused.stdout
    run.succeed("--unlock")
    run.succeed()
    (group,) = run.groups()
    assert set(group["segments_reused"]) == committed
    assert committed.isdisjoint(group["segments_written"])
    assert {shard["segment"] for shard in group["shards"]} == set(group["segments_written"])
    assert run.summary()["embedded"] == 120


def test_ctrl_c_ends_every_process_with_a_sentence(run_in_the_middle):
    run, process, _, _ = run_in_the_middle
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(240) != 0
    wait_until(lambda: not processes(run, "spawn_main") and not held_slots(run), what="the free slot")
    printed = (run.folder / "snakemake.out").read_text()
    assert "interrupted; what is finished is kept" in printed
    assert "Traceback" not in printed
