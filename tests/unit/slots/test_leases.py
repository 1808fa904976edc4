"""Leases: exclusive, never stale, and all or nothing for a job that wants several."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from itertools import combinations
from pathlib import Path

import pytest

from esmflow.slots.gpus import SlotError, candidate_slots
from esmflow.slots.leases import leased_slots

SCRIPTS = Path(__file__).resolve().parents[3] / "workflow" / "scripts"


def lease(candidates, folder, count=1, **options):
    """Leases and gives back at once."""
    with leased_slots(candidates, count, lock_folder=folder, **options):
        pass


HOLDER = """
import json, sys, time
from esmflow.slots.gpus import candidate_slots
from esmflow.slots.leases import leased_slots
folder, seconds, log, slots, count = sys.argv[1], float(sys.argv[2]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
candidates = candidate_slots("cpu", slots, {})
with leased_slots(candidates, count, lock_folder=folder, purpose="a test", wait_seconds=60) as leases:
    leased = time.time()
    print(*(lease.slot.token for lease in leases), flush=True)
    time.sleep(seconds)
    with open(log, "a") as handle:
        for lease in leases:
            handle.write(json.dumps([lease.slot.token, leased, time.time()]) + "\\n")
"""


def start_holder(folder, seconds, log="/dev/null", slots=2, count=1) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder), str(seconds), str(log), str(slots), str(count)],
        env={**os.environ, "PYTHONPATH": str(SCRIPTS)},
        stdout=subprocess.PIPE,
        text=True,
    )


def test_eight_processes_on_two_slots_never_hold_one_at_the_same_time(tmp_path):
    log = tmp_path / "held"
    holders = [start_holder(tmp_path / "slots", 0.3, log) for _ in range(8)]
    assert [holder.wait(60) for holder in holders] == [0] * 8
    held = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(held) == 8
    assert {slot for slot, _, _ in held} == {"CPU-0", "CPU-1"}
    assert_no_overlap(held)


def test_a_killed_holder_frees_its_slot_at_once(tmp_path):
    holder = start_holder(tmp_path, 60)
    assert holder.stdout.readline().strip() == "CPU-0"
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with leased_slots(candidate_slots("cpu", 2, {}), lock_folder=tmp_path, wait_seconds=0) as (lease,):
        assert lease.slot.token == "CPU-0"


def test_waiting_ends_with_an_error_that_says_who_holds_the_slots(tmp_path):
    holder = start_holder(tmp_path, 60)
    holder.stdout.readline()
    try:
        started = time.monotonic()
        with pytest.raises(SlotError, match=f"within 1 seconds.*CPU-0 held by process {holder.pid} .*a test"):
            lease(candidate_slots("cpu", 1, {}), tmp_path, wait_seconds=1)
        assert time.monotonic() - started >= 1
    finally:
        holder.kill()
        holder.wait()


def test_waiting_is_logged_with_the_holder(tmp_path, caplog):
    caplog.set_level("INFO")
    candidates = candidate_slots("cpu", 1, {})
    with leased_slots(candidates, lock_folder=tmp_path, purpose="shard group 3"), pytest.raises(SlotError):
        lease(candidates, tmp_path, wait_seconds=0.5)
    assert f"waiting for a GPU slot: CPU-0 held by process {os.getpid()}" in caplog.text
    assert "shard group 3" in caplog.text


def test_a_lock_file_that_a_cleaner_removed_does_not_let_two_in(tmp_path):
    candidates = candidate_slots("cpu", 1, {})
    lease(candidates, tmp_path)
    (tmp_path / candidates[0].lock_name).unlink()
    with leased_slots(candidates, lock_folder=tmp_path, wait_seconds=0), pytest.raises(SlotError):
        lease(candidates, tmp_path, wait_seconds=0)


def test_a_held_lease_keeps_its_file_young(tmp_path):
    with leased_slots(candidate_slots("cpu", 1, {}), lock_folder=tmp_path) as (held,):
        path = tmp_path / held.slot.lock_name
        os.utime(path, (0, 0))
        held.keep_fresh()
        assert time.time() - path.stat().st_mtime < 60


def test_an_unusable_lock_folder_is_an_error_that_names_the_key(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SlotError, match="slot_lock_folder"):
        lease(candidate_slots("cpu", 1, {}), tmp_path / "file")


def assert_no_overlap(held):
    for (slot, start, end), (other, other_start, other_end) in combinations(held, 2):
        assert slot != other or end <= other_start or other_end <= start


def test_jobs_that_want_several_slots_at_once_never_wait_for_one_anothers_half(tmp_path):
    log = tmp_path / "held"
    wanted = [4, 2, 3, 1, 2, 4, 3, 2]
    holders = [start_holder(tmp_path / "slots", 0.2, log, slots=4, count=count) for count in wanted]
    assert [holder.wait(60) for holder in holders] == [0] * len(wanted)
    held = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(held) == sum(wanted)
    assert {slot for slot, _, _ in held} == {f"CPU-{n}" for n in range(4)}
    assert_no_overlap(held)


def test_a_job_that_waits_for_several_slots_holds_none_of_them(tmp_path):
    candidates = candidate_slots("cpu", 4, {})
    with leased_slots(candidates[:1], lock_folder=tmp_path):
        waiting = start_holder(tmp_path, 0, slots=4, count=4)
        try:
            time.sleep(1)
            assert waiting.poll() is None
            # Each of the others can be had meanwhile: the one that waits only looks in.
            lease(candidates[1:], tmp_path, count=3, wait_seconds=30)
        finally:
            waiting.kill()
            waiting.wait()


def test_more_slots_than_there_are_is_an_error_at_once_that_names_the_key(tmp_path):
    with pytest.raises(SlotError, match=r"gpus_per_job.*lease 4 slots.*2 here \(CPU-0, CPU-1\)"):
        lease(candidate_slots("cpu", 2, {}), tmp_path, count=4)
