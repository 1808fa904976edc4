"""The status of a real run: while it works, after it is killed, and when it has finished."""

from __future__ import annotations

import subprocess
import sys

from workflow_run import PROJECT, Hold, kill, wait_until

from esmflow.embedding.heartbeat import State
from esmflow.embedding.status import is_over, read_status
from esmflow.files import read_json


def show(run) -> str:
    """What the command prints in the run's folder."""
    command = [sys.executable, str(PROJECT / "workflow" / "scripts" / "status.py")]
    return subprocess.run(command, cwd=run.folder, capture_output=True, text=True, check=True).stdout


def test_the_status_follows_a_run_through_work_death_and_the_end(quick_run):
    # Two jobs at once and one slot: the second waits for it.
    run = quick_run(90, groups=2, shard_residues=1500, cpu_slots=1)
    hold = Hold(run.folder)
    process = run.start(environment=hold.environment)
    try:
        wait_until(hold.held, what="a worker with a shard in hand")

        def at_work():
            groups = read_status(run.results)
            found = {group.state for group in groups}
            return groups if found == {State.EMBEDDING, State.QUEUED} and any(g.done for g in groups) else None

        groups = wait_until(at_work, what="one group at work and one that waits for the slot")
        (working,) = [group for group in groups if group.state is State.EMBEDDING]
        assert working.job.slots == ("CPU-0",)
        assert 0 < working.done < working.job.residues == working.done + working.left
        assert working.job.shards > 1
        assert "embedding" in show(run)
    finally:
        kill(process.pid)
        process.wait()
    wait_until(lambda: is_over(read_status(run.results)), what="the jobs' death")
    assert {group.state for group in read_status(run.results)} == {State.DIED}
    assert show(run).count("died; last heard of at") == 2

    run.succeed("--unlock")
    run.succeed()
    groups = read_status(run.results)
    assert {group.state for group in groups} == {State.FINISHED}
    reused = sum(group.job.shards_reused for group in groups)
    assert reused == sum(len(group["segments_reused"]) for group in run.groups()) >= 2
    assert "2 of 2 finished" in show(run)
    assert not list((run.results / "status").glob(".*"))
    assert read_json(run.results / "status" / "group-0.json")["failed_shards"] == 0
    # A job that finds everything finished says so too.
    run.succeed("--forcerun", "embed")
    assert sum(group.job.shards_reused for group in read_status(run.results)) == len(run.segments())
