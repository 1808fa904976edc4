"""Workers: real spawned processes, and every way in which one can end."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import psutil
import pytest
import worker_functions
from workflow_run import wait_until

from esmflow.failures import Reason
from esmflow.workers import BatchQueueManager, WorkerStatus

FILES = [f"file-{n}" for n in range(6)]
PROJECT = Path(__file__).resolve().parents[2]


def names(failed):
    return {failure.file: failure.reason for failure in failed}


@pytest.mark.parametrize("workers", [1, 2])
def test_every_file_is_processed_once_and_its_result_comes_back(workers):
    manager = BatchQueueManager(workers, worker_functions.copies)
    amounts = []
    processed, failed = manager.process_files(FILES, on_progress=amounts.append, word="kept")
    assert Counter(processed) == Counter(FILES)
    assert failed == []
    assert sum(amounts) == len(FILES)
    assert {result["word"] for result in manager.results.values()} == {"kept"}
    assert {result["worker"] for result in manager.results.values()}.isdisjoint({os.getpid()})
    assert manager.is_complete()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM])
def test_a_worker_that_dies_loses_the_file_in_hand_and_no_other(number):
    manager = BatchQueueManager(1, worker_functions.dies_on)
    processed, failed = manager.process_files(FILES, deadly=["file-2"], number=number)
    assert processed == [file for file in FILES if file != "file-2"]
    assert names(failed) == {"file-2": Reason.WORKER_CRASHED}
    assert number.name in failed[0].detail
    assert manager.restarts == 1


def test_a_worker_that_raises_loses_the_file_in_hand_and_says_why():
    processed, failed = BatchQueueManager(1, worker_functions.raises_on).process_files(FILES, bad=["file-0", "file-5"])
    assert processed == FILES[1:5]
    assert names(failed) == {"file-0": Reason.WORKER_ERROR, "file-5": Reason.WORKER_ERROR}
    assert failed[0].detail == "RuntimeError: CUDA error while working on file-0"


def test_three_failures_in_a_row_give_up_the_rest():
    manager = BatchQueueManager(1, worker_functions.raises_on)
    processed, failed = manager.process_files(FILES, bad=FILES[1:])
    assert processed == ["file-0"]
    assert names(failed) == {
        **dict.fromkeys(FILES[1:4], Reason.WORKER_ERROR),
        **dict.fromkeys(FILES[4:], Reason.SYSTEMIC_ABORT),
    }
    assert "CUDA error while working on file-3" in failed[-1].detail
    assert manager.aborted


def test_failures_that_are_not_in_a_row_do_not_give_up():
    manager = BatchQueueManager(1, worker_functions.raises_on)
    processed, _ = manager.process_files(FILES, bad=["file-0", "file-1", "file-3", "file-4"])
    assert processed == ["file-2", "file-5"]
    assert not manager.aborted


def test_a_worker_that_cannot_start_is_tried_three_times_and_no_file_is_lost():
    processed, failed = BatchQueueManager(1, worker_functions.never_starts).process_files(FILES)
    assert processed == []
    assert names(failed) == dict.fromkeys(FILES, Reason.SYSTEMIC_ABORT)
    assert "the checkpoint is corrupted" in failed[0].detail


def test_files_that_a_worker_forgets_or_leaves_are_failures():
    processed, failed = BatchQueueManager(1, worker_functions.forgets).process_files(FILES)
    assert processed == ["file-0", "file-2"]
    assert names(failed) == dict.fromkeys(["file-1", "file-3", "file-4", "file-5"], Reason.WORKER_ERROR)


def test_a_function_with_other_arguments_is_refused():
    with pytest.raises(ValueError, match="must take \\(file_subset, device_id"):
        BatchQueueManager(1, worker_functions.does_not_fit)


def test_a_worker_starts_without_torch_whatever_its_supervisor_has_imported():
    import torch  # noqa: F401

    manager = BatchQueueManager(1, worker_functions.says_what_was_imported)
    manager.process_files(["file"])
    assert manager.results == {"file": False}


def test_status_is_live_while_a_worker_runs(tmp_path):
    manager = BatchQueueManager(1, worker_functions.dies_on)
    seen = []
    manager.process_files(["a", "b"], deadly=[], on_done=lambda *_: seen.append(manager.get_worker_status()))
    assert seen[0] == {0: WorkerStatus.PROCESSING}


SUPERVISOR = """
import sys, worker_functions
from esmflow.workers import BatchQueueManager
marker, lock = sys.argv[1:]
import os, fcntl
descriptor = os.open(lock, os.O_RDWR | os.O_CREAT)
fcntl.flock(descriptor, fcntl.LOCK_EX)
BatchQueueManager(1, worker_functions.sleeps).process_files(["file"], inherited=[[descriptor]], marker=marker)
"""


@pytest.fixture
def supervisor(tmp_path):
    """A supervisor that holds a lock, with a worker that inherited it. Gives the process, the worker and the lock."""
    marker, lock = tmp_path / "worker", tmp_path / "lock"
    process = subprocess.Popen(
        [sys.executable, "-c", SUPERVISOR, str(marker), str(lock)],
        env={**os.environ, "PYTHONPATH": f"{PROJECT / 'workflow/scripts'}:{PROJECT / 'tests'}"},
    )
    worker = psutil.Process(int(wait_until(lambda: marker.exists() and marker.read_text(), what="the worker")))
    yield process, worker, lock
    process.kill()
    process.wait()


def is_free(lock):
    with open(lock, "r+") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def test_a_worker_dies_with_its_supervisor_and_the_lock_is_free_when_both_are_dead(supervisor):
    process, worker, lock = supervisor
    assert not is_free(lock)
    process.send_signal(signal.SIGKILL)
    wait_until(lambda: is_free(lock), 5, "the lock being free")
    wait_until(lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE, 5, "the worker's death")


def test_the_lock_stays_held_as_long_as_the_worker_lives(supervisor):
    process, worker, lock = supervisor
    worker.suspend()
    process.send_signal(signal.SIGSTOP)
    descriptors = Path(f"/proc/{worker.pid}/fd")
    assert str(lock) in [os.readlink(link) for link in descriptors.iterdir()]
    assert not is_free(lock)
