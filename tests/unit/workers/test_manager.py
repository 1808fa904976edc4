"""Workers: real spawned processes, and every way in which one can end."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from itertools import chain
from pathlib import Path

import psutil
import pytest
import worker_functions
from workflow_run import wait_until

from esmflow.failures import Reason
from esmflow.workers import manager as manager_module
from esmflow.workers.manager import BatchQueueManager
from esmflow.workers.one_call import WorkerError, run_one
from esmflow.workers.worker import WorkerStatus

FILES = [f"file-{n}" for n in range(6)]
PROJECT = Path(__file__).resolve().parents[3]
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{PROJECT / 'workflow/scripts'}:{PROJECT / 'tests' / 'support'}"}


def deal(workers, files=FILES):
    """The files in turn, a list for each worker."""
    return [list(files[number::workers]) for number in range(workers)]


def names(failed):
    return {failure.file: failure.reason for failure in failed}


def assert_nothing_is_lost_or_counted_twice(processed, failed, files=FILES):
    assert Counter([*processed, *(failure.file for failure in failed)]) == Counter(files)


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_every_file_is_processed_once_and_its_result_comes_back(workers):
    manager = BatchQueueManager(workers, worker_functions.copies)
    amounts = []
    processed, failed = manager.process_files(deal(workers), on_progress=amounts.append, word="kept")
    assert Counter(processed) == Counter(FILES)
    assert failed == []
    assert sum(amounts) == len(FILES)
    assert {result["word"] for result in manager.results.values()} == {"kept"}
    assert {result["worker"] for result in manager.results.values()}.isdisjoint({os.getpid()})
    assert manager.is_complete()
    assert set(manager.get_worker_status().values()) == {WorkerStatus.COMPLETED}
    assert sum(record["processed"] for record in manager.worker_records()) == len(FILES)


def test_an_idle_worker_takes_files_from_a_busy_one(tmp_path):
    done = []

    def note(file, result):
        done.append(file)
        if len(done) == len(FILES) - 1:
            (tmp_path / "go-on").touch()

    manager = BatchQueueManager(2, worker_functions.waits_once)
    processed, _ = manager.process_files([FILES, []], on_done=note, slow=0, path=str(tmp_path / "go-on"))
    assert Counter(processed) == Counter(FILES)
    # However late it starts, the first worker has one file at the most while it waits.
    assert Counter(manager.results.values())[1] >= len(FILES) - 1


def test_what_a_function_reports_only_at_its_end_counts_as_it_returned_it():
    processed, failed = BatchQueueManager(1, worker_functions.reports_nothing).process_files([FILES])
    assert processed == ["file-0", "file-3", "file-4", "file-5"]
    assert names(failed) == {"file-1": Reason.OUT_OF_MEMORY, "file-2": Reason.WORKER_ERROR}


def test_a_function_that_returns_no_lists_is_an_error_that_says_so():
    processed, failed = BatchQueueManager(1, worker_functions.returns_nothing).process_files([FILES])
    assert processed == []
    assert_nothing_is_lost_or_counted_twice(processed, failed)
    assert "must return (processed_files, failed_files)" in failed[0].detail


@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize(("how", "name"), [("kill", "SIGKILL"), ("segfault", "SIGSEGV")])
def test_what_a_dead_worker_had_in_hand_is_tried_again_and_nothing_is_lost(workers, how, name, tmp_path):
    manager = BatchQueueManager(workers, worker_functions.dies_once_on)
    amounts = []
    processed, failed = manager.process_files(
        deal(workers),
        log_file=str(tmp_path / "log"),
        on_progress=amounts.append,
        deadly=["file-2"],
        marks=str(tmp_path),
        how=how,
    )
    assert failed == []
    assert_nothing_is_lost_or_counted_twice(processed, failed)
    assert sum(amounts) == 5 * len(FILES)
    (death,) = chain.from_iterable(record["exits"] for record in manager.worker_records())
    assert death.signal == name
    assert death.in_hand == ("file-2",)
    assert any("last words on file-2" in line for line in death.log_lines)
    if how == "segfault":
        assert any("in end_yourself" in line for line in death.log_lines)
    first = int((tmp_path / "file-2").read_text())
    assert workers == 1 or manager.results["file-2"] != first


def test_running_out_of_host_memory_is_an_error_of_the_worker_and_the_file_is_tried_again(tmp_path):
    manager = BatchQueueManager(1, worker_functions.dies_once_on)
    processed, failed = manager.process_files([FILES], deadly=["file-2"], marks=str(tmp_path), how="memory")
    assert failed == []
    assert_nothing_is_lost_or_counted_twice(processed, failed)
    assert manager.worker_records()[0]["exits"][0].how.startswith("MemoryError")


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_a_file_that_kills_two_workers_has_failed_with_the_signal_and_the_last_log_lines(workers, tmp_path):
    manager = BatchQueueManager(workers, worker_functions.dies_on)
    processed, failed = manager.process_files(deal(workers), log_file=str(tmp_path / "log"), deadly=["file-2"])
    assert_nothing_is_lost_or_counted_twice(processed, failed)
    assert names(failed) == {"file-2": Reason.WORKER_CRASHED}
    assert "SIGKILL" in failed[0].detail
    assert "working on file-2" in failed[0].detail
    exits = [record["exits"] for record in manager.worker_records()]
    assert sum(map(len, exits)) == 2
    # Two different workers, where there are two.
    assert workers == 1 or max(map(len, exits)) == 1
    assert not manager.aborted


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_a_death_is_noticed_within_five_seconds(workers, tmp_path):
    manager = BatchQueueManager(workers, worker_functions.sleeps)
    marker = tmp_path / "worker"
    died = []

    def strike():
        worker = int(wait_until(lambda: marker.exists() and marker.read_text(), what="a worker with a file in hand"))
        os.kill(worker, signal.SIGKILL)
        died.append((worker, time.time()))
        wait_until(lambda: any(record["exits"] for record in manager.worker_records()), what="the death's record")
        manager.stop(0)

    thread = threading.Thread(target=strike)
    thread.start()
    manager.process_files(deal(workers), marker=str(marker))
    thread.join()
    noticed = [death for record in manager.worker_records() for death in record["exits"]]
    (when,) = [death.time for death in noticed if death.process == died[0][0]]
    assert when - died[0][1] < 5


def test_a_worker_that_raises_loses_the_file_in_hand_and_says_why():
    processed, failed = BatchQueueManager(1, worker_functions.raises_on).process_files(
        [FILES], bad=["file-0", "file-5"]
    )
    assert processed == FILES[1:5]
    assert names(failed) == {"file-0": Reason.WORKER_ERROR, "file-5": Reason.WORKER_ERROR}
    assert failed[0].detail == "RuntimeError: CUDA error while working on file-0"


def test_a_worker_that_reports_a_failure_goes_on_itself():
    manager = BatchQueueManager(1, worker_functions.fails_on)
    processed, failed = manager.process_files([FILES], bad=["file-2"])
    assert names(failed) == {"file-2": Reason.OUT_OF_MEMORY}
    assert_nothing_is_lost_or_counted_twice(processed, failed)
    assert manager.restarts == 0
    assert len(set(manager.results.values())) == 1


def test_three_failures_in_a_row_give_up_the_rest():
    manager = BatchQueueManager(1, worker_functions.raises_on)
    processed, failed = manager.process_files([FILES], bad=FILES[1:])
    assert processed == ["file-0"]
    assert names(failed) == {
        **dict.fromkeys(FILES[1:4], Reason.WORKER_ERROR),
        **dict.fromkeys(FILES[4:], Reason.SYSTEMIC_ABORT),
    }
    assert "CUDA error while working on file-3" in failed[-1].detail
    assert manager.aborted


@pytest.mark.parametrize("workers", [2, 4])
def test_three_failures_in_a_row_across_workers_give_up_the_rest(workers):
    many = [f"file-{n}" for n in range(40)]
    manager = BatchQueueManager(workers, worker_functions.raises_on)
    processed, failed = manager.process_files(deal(workers, many), bad=many)
    assert processed == []
    assert manager.aborted
    assert_nothing_is_lost_or_counted_twice(processed, failed, many)
    # Three at least; at most three of each worker but the last, when they happen to fail one after the other.
    tried = sum(failure.reason is Reason.WORKER_ERROR for failure in failed)
    assert 3 <= tried <= 3 * workers
    assert sum(len(record["exits"]) for record in manager.worker_records()) == tried


def test_failures_that_are_not_in_a_row_do_not_give_up():
    manager = BatchQueueManager(1, worker_functions.raises_on)
    processed, failed = manager.process_files([FILES], bad=["file-0", "file-1", "file-3", "file-4"])
    assert processed == ["file-2", "file-5"]
    assert_nothing_is_lost_or_counted_twice(processed, failed)
    assert not manager.aborted


@pytest.mark.parametrize("workers", [2, 4])
def test_one_broken_device_is_given_up_and_the_others_do_its_files(workers, tmp_path):
    many = [f"file-{n}" for n in range(16)]
    manager = BatchQueueManager(workers, worker_functions.works_on_one_device_only)
    processed, failed = manager.process_files(deal(workers, many), broken=1, marks=str(tmp_path))
    assert failed == []
    assert_nothing_is_lost_or_counted_twice(processed, failed, many)
    assert not manager.aborted
    assert manager.get_worker_status()[1] is WorkerStatus.FAILED
    assert len(manager.worker_records()[1]["exits"]) == 3


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_that_cannot_start_are_tried_three_times_and_no_file_is_lost(workers):
    manager = BatchQueueManager(workers, worker_functions.never_starts)
    processed, failed = manager.process_files(deal(workers))
    assert processed == []
    assert names(failed) == dict.fromkeys(FILES, Reason.SYSTEMIC_ABORT)
    assert "the checkpoint is corrupted" in failed[0].detail
    assert_nothing_is_lost_or_counted_twice(processed, failed)


def test_files_that_a_worker_forgets_or_leaves_are_failures():
    processed, failed = BatchQueueManager(1, worker_functions.forgets).process_files([FILES])
    assert processed == ["file-0", "file-2"]
    assert names(failed) == dict.fromkeys(["file-1", "file-3", "file-4", "file-5"], Reason.WORKER_ERROR)


def test_a_worker_that_falls_silent_is_killed_and_its_file_tried_again(tmp_path):
    manager = BatchQueueManager(1, worker_functions.hangs_once)
    (worker,) = manager._workers

    def tick():
        if (tmp_path / "hung").exists() and not worker.exits and worker.silent_seconds > 2:
            # The rest of an hour in which it says nothing.
            worker.silent_seconds += 3600.0

    marker = str(tmp_path / "hung")
    processed, failed = manager.process_files([FILES], hang_seconds=600, on_tick=tick, marker=marker)
    assert failed == []
    assert_nothing_is_lost_or_counted_twice(processed, failed)
    (death,) = worker.exits
    assert "no progress for 600 seconds" in death.how


def test_a_worker_that_waits_for_a_file_does_not_count_as_hanging(tmp_path):
    manager = BatchQueueManager(2, worker_functions.waits_for)
    waited = []

    def tick():
        # One of them has the only file in hand, and keeps it.
        for worker in manager._workers:
            if worker.asking:
                # As after an hour in which there was no file for it.
                worker.silent_seconds = 3600.0
                waited.append(worker.device_id)
        if len(waited) == 4:
            (tmp_path / "file").touch()

    processed, _ = manager.process_files([["file"], []], hang_seconds=600, on_tick=tick, folder=str(tmp_path))
    assert processed == ["file"]
    assert [record["exits"] for record in manager.worker_records()] == [[], []]


def test_a_function_with_other_arguments_is_refused():
    with pytest.raises(ValueError, match="must take \\(file_subset, device_id"):
        BatchQueueManager(1, worker_functions.does_not_fit)


def test_lists_that_do_not_fit_the_workers_are_refused():
    with pytest.raises(ValueError, match="3 lists for 2 workers"):
        BatchQueueManager(2, worker_functions.copies).process_files([["a"], ["b"], []])
    with pytest.raises(ValueError, match="a is assigned more than once"):
        BatchQueueManager(2, worker_functions.copies).process_files([["a"], ["a"]])


def test_a_worker_starts_without_torch_whatever_its_supervisor_has_imported():
    import torch  # noqa: F401

    manager = BatchQueueManager(1, worker_functions.says_what_was_imported)
    manager.process_files([["file"]])
    assert manager.results == {"file": False}


def test_status_is_live_while_workers_run(tmp_path):
    manager = BatchQueueManager(2, worker_functions.takes_its_time)
    seen = []
    assert manager.get_worker_status() == {0: WorkerStatus.IDLE, 1: WorkerStatus.IDLE}
    manager.process_files(
        [["a", "b"], ["c"]],
        slow=0,
        seconds=0.5,
        on_done=lambda *_: seen.append((manager.get_worker_status(), manager.is_complete())),
    )
    assert any(WorkerStatus.PROCESSING in status.values() for status, _ in seen)
    assert [complete for _, complete in seen] == [False, False, True]
    assert set(manager.get_worker_status().values()) == {WorkerStatus.COMPLETED}


@pytest.mark.parametrize("workers", [1, 2])
def test_a_stop_lets_workers_finish_what_they_have_in_hand_and_hands_out_nothing_more(workers, tmp_path):
    manager = BatchQueueManager(workers, worker_functions.sleeps)
    marker = tmp_path / "worker"
    thread = threading.Thread(
        target=lambda: (
            wait_until(lambda: WorkerStatus.PROCESSING in manager.get_worker_status().values()) and manager.stop(60)
        )
    )
    thread.start()
    processed, failed = manager.process_files(deal(workers), marker=str(marker), seconds=2)
    thread.join()
    assert 1 <= len(processed) <= workers
    assert_nothing_is_lost_or_counted_twice(processed, failed)
    assert manager.stopped
    assert not manager.aborted


def test_after_a_stop_what_does_not_end_in_time_is_killed(tmp_path):
    manager = BatchQueueManager(1, worker_functions.sleeps)
    thread = threading.Thread(
        target=lambda: (
            wait_until(lambda: WorkerStatus.PROCESSING in manager.get_worker_status().values()) and manager.stop(0.5)
        )
    )
    thread.start()
    processed, failed = manager.process_files([FILES], marker=str(tmp_path / "worker"))
    thread.join()
    assert processed == []
    assert_nothing_is_lost_or_counted_twice(processed, failed)


SUPERVISOR = """
import sys, worker_functions
from esmflow.workers.manager import BatchQueueManager
marker, lock = sys.argv[1:]
import os, fcntl
descriptor = os.open(lock, os.O_RDWR | os.O_CREAT)
fcntl.flock(descriptor, fcntl.LOCK_EX)
BatchQueueManager(1, worker_functions.sleeps).process_files([["file"]], inherited=[[descriptor]], marker=marker)
"""


@pytest.fixture
def supervisor(tmp_path):
    """A supervisor that holds a lock, with a worker that inherited it. Gives the process, the worker and the lock."""
    marker, lock = tmp_path / "worker", tmp_path / "lock"
    process = subprocess.Popen(
        [sys.executable, "-c", SUPERVISOR, str(marker), str(lock)],
        env=ENVIRONMENT,
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
    wait_until(lambda: is_free(lock), what="the lock being free")
    wait_until(lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE, what="the worker's death")


def test_the_lock_stays_held_as_long_as_the_worker_lives(supervisor):
    process, worker, lock = supervisor
    worker.suspend()
    process.send_signal(signal.SIGSTOP)
    descriptors = Path(f"/proc/{worker.pid}/fd")
    assert str(lock) in [os.readlink(link) for link in descriptors.iterdir()]
    assert not is_free(lock)


def test_sigterm_to_a_worker_alone_changes_nothing(supervisor):
    _, worker, _ = supervisor
    worker.terminate()
    with pytest.raises(psutil.TimeoutExpired):
        worker.wait(0.5)


def test_one_function_runs_in_a_process_of_its_own_and_gives_its_result():
    found = run_one(worker_functions.adds, one=1, another=2)
    assert found["sum"] == 3
    assert found["process"] != os.getpid()


def test_one_function_is_tried_once_more_and_then_its_error_is_raised(tmp_path):
    assert run_one(worker_functions.adds, one=1, another=2, mark=str(tmp_path / "mark"))["sum"] == 3
    with pytest.raises(WorkerError, match=r"^TypeError: unsupported operand"):
        run_one(worker_functions.adds, one=1, another=None)


def test_forked_workers_keep_what_they_inherit_too(tmp_path):
    with open(tmp_path / "lock", "w") as lock:
        manager = BatchQueueManager(1, worker_functions.copies, spawn_context=False)
        processed, failed = manager.process_files([FILES], inherited=[[lock.fileno()]])
    assert (processed, failed) == (FILES, [])


@pytest.fixture
def short_patience(monkeypatch):
    """A worker that is done has a second to leave."""
    monkeypatch.setattr(manager_module, "_LEAVING_SECONDS", 1.0)


def test_a_worker_that_is_done_and_does_not_leave_is_killed_and_nothing_has_failed(short_patience):
    manager = BatchQueueManager(1, worker_functions.does_not_leave)
    processed, failed = manager.process_files([FILES])
    assert (processed, failed) == (FILES, [])
    assert manager.get_worker_status() == {0: WorkerStatus.COMPLETED}
    assert manager.worker_records()[0]["exits"] == []
    (worker,) = set(manager.results.values())
    assert not psutil.pid_exists(worker)


SUSPENDED = """
import sys, worker_functions
from esmflow.workers.manager import BatchQueueManager
manager = BatchQueueManager(1, worker_functions.works_slowly)
print(*manager.process_files([["file"]], hang_seconds=8, marker=sys.argv[1], steps=20))
print(len(manager.worker_records()[0]["exits"]))
"""


def test_a_job_that_is_suspended_as_a_whole_goes_on_and_no_worker_counts_as_hanging(tmp_path):
    marker = tmp_path / "worker"
    job = subprocess.Popen(
        [sys.executable, "-c", SUSPENDED, str(marker)], env=ENVIRONMENT, stdout=subprocess.PIPE, text=True
    )
    try:
        worker = int(wait_until(lambda: marker.exists() and marker.read_text(), what="the worker"))
        # The worker first, so that the supervisor alone could find it silent; and it goes on last.
        for process in (worker, job.pid):
            os.kill(process, signal.SIGSTOP)
        time.sleep(10)
        for process in (job.pid, worker):
            os.kill(process, signal.SIGCONT)
        assert job.communicate(timeout=60)[0].splitlines() == ["['file'] []", "0"]
    finally:
        job.kill()
        job.wait()


def test_the_worker_alone_still_holds_the_lock(tmp_path):
    with open(tmp_path / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        seen = []

        def look():
            if (tmp_path / "file.begun").exists() and not seen:
                # The supervisor's own is gone, as when it is killed.
                lock.close()
                seen.append(is_free(tmp_path / "lock"))
                (tmp_path / "file").touch()

        manager = BatchQueueManager(1, worker_functions.waits_for)
        processed, _ = manager.process_files(
            [["file"]], inherited=[[lock.fileno()]], on_tick=look, folder=str(tmp_path)
        )
    assert (processed, seen) == (["file"], [False])
    assert is_free(tmp_path / "lock")
