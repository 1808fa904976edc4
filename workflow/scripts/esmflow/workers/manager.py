"""Spawned workers that work through files, watched by a supervisor that notices every way a worker can end.

The supervisor hands out one file at a time, so it always knows what a worker has in hand: when a worker dies, that is
tried once more, by another worker if there is one, and nothing else is touched. One worker is the same with nobody to
share with.
"""

from __future__ import annotations

import inspect
import logging
import multiprocessing
import multiprocessing.connection
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

from esmflow.failures import Reason
from esmflow.workers.process import Task, WorkerFunction
from esmflow.workers.queue import FailedFile, FileQueue
from esmflow.workers.worker import Worker, WorkerStatus

log = logging.getLogger(__name__)

FAILURES_IN_A_ROW = 3
_TICK_SECONDS = 1.0
_LEAVING_SECONDS = 30.0


class BatchQueueManager:
    """Runs `worker_function(file_subset, device_id, **kwargs)` in spawned processes over lists of files.

    The worker function iterates over `file_subset`, calls `file_subset.done(file, result)` for each finished file and
    `file_subset.progress(amount)` in between, and returns `(processed_files, failed_files)`. Raises ValueError if it
    does not take these arguments.
    """

    def __init__(self, num_workers: int, worker_function: WorkerFunction, spawn_context: bool = True) -> None:
        if num_workers < 1:
            raise ValueError(f"num_workers: {num_workers} is not a positive number")
        _check_signature(worker_function)
        self._task = Task(worker_function)
        # A forked process inherits CUDA's state and every lock as it happened to be; a spawned one starts clean.
        self._context = multiprocessing.get_context("spawn" if spawn_context else None)
        self._workers = [Worker(device_id) for device_id in range(num_workers)]
        self._queue = FileQueue([[] for _ in range(num_workers)])
        # The devices that failed since any worker last finished a file.
        self._failed_in_a_row: list[int] = []
        self._stop_at: float | None = None
        self.restarts = 0
        self.aborted = False

    @property
    def results(self) -> dict[str, Any]:
        """What was reported of each processed file."""
        return self._queue.results

    @property
    def failed(self) -> list[FailedFile]:
        """The files that have failed so far."""
        return self._queue.failed

    @property
    def stopped(self) -> bool:
        """Whether `stop` was called."""
        return self._stop_at is not None

    def process_files(
        self,
        file_assignments: Sequence[Sequence[str]],
        *,
        inherited: Sequence[Sequence[int]] = (),
        log_file: str | None = None,
        hang_seconds: float | None = None,
        on_progress: Callable[[int], None] = lambda amount: None,
        on_done: Callable[[str, Any], None] = lambda file, result: None,
        on_tick: Callable[[], None] = lambda: None,
        **worker_kwargs: Any,
    ) -> tuple[list[str], list[FailedFile]]:
        """Works through a list of files for each worker; idle workers take files from busy ones.

        Returns the files processed and those failed: each file is in exactly one of the two. What a worker has in hand
        when it dies is tried once more, by another worker if there is one. A worker that fails three times in a row is
        given up; three failures in a row of more than one worker, or of the last one, end the job and the rest has
        failed as `systemic_abort`: what is wrong is not one file. Second tries do not count, as they tell of the file.

        inherited: for each worker, open file descriptors that it keeps open until it ends.
        log_file: where the workers log and print. hang_seconds: a worker that says nothing for so long is killed.
        on_tick is called about once a second.
        Raises ValueError when there is not one list for each worker, or a file is in two of them.
        """
        if len(file_assignments) != len(self._workers):
            raise ValueError(f"file_assignments: {len(file_assignments)} lists for {len(self._workers)} workers")
        self._queue = FileQueue(file_assignments)
        self._inherited = inherited or [()] * len(self._workers)
        self._task = replace(self._task, arguments=worker_kwargs, log_file=log_file)
        self._hang_seconds, self._on_progress, self._on_done = hang_seconds, on_progress, on_done
        try:
            self._start_missing()
            while any(worker.process for worker in self._workers):
                self._dispatch()
                self._receive()
                self._kill_stalled()
                self._reap()
                self._start_missing()
                on_tick()
        finally:
            for worker in self._workers:
                worker.kill("the job ends")
                worker.join()
        if self.stopped:
            self._queue.give_up(Reason.SYSTEMIC_ABORT, "not finished when the job was asked to stop")
        self._queue.give_up(Reason.WORKER_ERROR, "every worker ended before it took this file")
        return list(self.results), self.failed

    def stop(self, grace_seconds: float) -> None:
        """Hands out nothing more and gives workers so long to finish what they have in hand. Safe in signal handlers.

        `process_files` then returns; what was not finished counts as failed.
        """
        if self._stop_at is None:
            self._stop_at = time.monotonic() + grace_seconds

    def get_worker_status(self) -> dict[int, WorkerStatus]:
        """What each worker is doing now, by device number. May be called from any thread."""
        return {worker.device_id: worker.status for worker in self._workers}

    def is_complete(self) -> bool:
        """Whether no file is waiting or in hand."""
        return self._queue.is_complete()

    def worker_records(self) -> list[dict[str, Any]]:
        """What is to be kept of each worker; see `Worker.record`."""
        return [worker.record() for worker in self._workers]

    def _others(self, worker: Worker) -> bool:
        """Whether another worker than this one is there."""
        return any(other.process for other in self._workers if other is not worker)

    def _start_missing(self) -> None:
        """Starts a process for each worker that has none and could take a file."""
        for worker in self._workers:
            if worker.process or worker.retired or self.stopped or self.aborted:
                continue
            if self._queue.has_for(worker.device_id, self._others(worker)):
                if worker.exits:
                    self.restarts += 1
                    log.warning("starting worker %d again", worker.device_id)
                worker.start(self._context, self._task, self._inherited[worker.device_id])

    def _dispatch(self) -> None:
        """Hands out files. A worker for which there is none waits: another may die with a file in hand."""
        for worker in self._workers:
            if worker.asking and not self.stopped:
                file = self._queue.take(worker.device_id, self._others(worker))
                if file is not None and not worker.send(file):
                    self._queue.put_back(worker.device_id, file)
        running = [worker for worker in self._workers if worker.process]
        if self.stopped or all(worker.asking for worker in running):
            for worker in running:
                if worker.asking:
                    worker.send(None)

    def _receive(self) -> None:
        """Listens to what the workers have to say; returns after a second at the latest."""
        before = time.monotonic()
        by_connection = {worker.connection: worker for worker in self._workers if worker.connection}
        sentinels = [worker.process.sentinel for worker in self._workers if worker.process]
        ready = multiprocessing.connection.wait([*by_connection, *sentinels], timeout=_TICK_SECONDS)
        # No more than a tick: a job that was suspended as a whole and goes on has not been silent meanwhile.
        waited = min(time.monotonic() - before, _TICK_SECONDS)
        for worker in by_connection.values():
            worker.silent_seconds += waited
        for connection in ready:
            if isinstance(connection, Connection):
                self._handle_messages(by_connection[connection])

    def _handle_messages(self, worker: Worker) -> None:
        for kind, content in worker.receive():
            if kind == "next":
                worker.asking = True
                worker.status = WorkerStatus.IDLE
            elif kind == "progress":
                worker.progress_in_hand += content
                self._on_progress(content)
            elif kind == "done":
                self._note_done(worker, *content)
            elif kind == "failed":
                self._note_failed(worker, content)
            elif kind == "finished":
                self._note_finished(worker, *content)

    def _note_done(self, worker: Worker, file: str, result: Any) -> None:
        if self._queue.done(worker.device_id, file, result):
            worker.progress_in_hand = 0
            worker.processed += 1
            worker.failures_in_a_row = 0
            self._failed_in_a_row.clear()
            self._on_done(file, result)

    def _note_failed(self, worker: Worker, failure: FailedFile) -> None:
        if self._queue.fail(worker.device_id, failure):
            log.error("worker %d failed on %s: %s", worker.device_id, failure.file, failure.detail)
            self._take_back_progress(worker)
            self._count_failure(worker, failure.detail)

    def _note_finished(self, worker: Worker, processed: Sequence[str], failed: Sequence[FailedFile]) -> None:
        """A worker function has returned: what it did not report while it ran is taken from its lists."""
        worker.status, worker.retired = WorkerStatus.COMPLETED, True
        for file in processed:
            if file in self._queue.in_hand(worker.device_id):
                self._note_done(worker, file, None)
        for failure in failed:
            if failure.file in self._queue.in_hand(worker.device_id):
                self._note_failed(worker, failure)
        for file in self._queue.in_hand(worker.device_id):
            detail = "the worker went on without finishing it: it was neither reported nor returned"
            self._note_failed(worker, FailedFile(file, Reason.WORKER_ERROR, detail))

    def _kill_stalled(self) -> None:
        """Kills workers that say nothing for too long, that do not leave, and those to be stopped."""
        for worker in self._workers:
            if not worker.is_alive():
                continue
            if self._stop_at is not None and not self._queue.in_hand(worker.device_id):
                worker.kill("the job was asked to stop, and it has nothing in hand")
            elif self._stop_at is not None and time.monotonic() >= self._stop_at:
                worker.kill("the time to finish after the request to stop is over")
            elif worker.retired and worker.silent_seconds > _LEAVING_SECONDS:
                worker.kill("it is done and does not leave")
            elif self._hang_seconds and not worker.asking and worker.silent_seconds > self._hang_seconds:
                worker.kill(f"no progress for {self._hang_seconds:.0f} seconds")

    def _reap(self) -> None:
        for worker in self._workers:
            if worker.process and not worker.is_alive():
                # Whatever it said before it died comes first.
                self._handle_messages(worker)
                if worker.status is not WorkerStatus.COMPLETED:
                    self._note_exit(worker)
                worker.join()

    def _note_exit(self, worker: Worker) -> None:
        worker.status = WorkerStatus.FAILED
        in_hand = self._queue.in_hand(worker.device_id)
        if self.aborted or (self.stopped and not in_hand):
            return
        reason, detail = worker.note_exit(in_hand)
        self._take_back_progress(worker)
        first_time = self._queue.retry_or_fail(worker.device_id, reason, detail)
        if not self.stopped and not worker.retired and (first_time or not in_hand):
            self._count_failure(worker, worker.exits[-1].how)

    def _count_failure(self, worker: Worker, how: str) -> None:
        """Three in a row: on one worker they tell of its device, on several, or on the last one, of everything."""
        worker.failures_in_a_row += 1
        self._failed_in_a_row.append(worker.device_id)
        others = any(not other.retired for other in self._workers if other is not worker)
        several = len(set(self._failed_in_a_row)) > 1
        if len(self._failed_in_a_row) >= FAILURES_IN_A_ROW and (several or not others):
            self._abort(how)
        elif worker.failures_in_a_row >= FAILURES_IN_A_ROW:
            worker.retired, worker.status = True, WorkerStatus.FAILED
            self._failed_in_a_row = [number for number in self._failed_in_a_row if number != worker.device_id]
            log.error("worker %d is given up after %d failures in a row", worker.device_id, FAILURES_IN_A_ROW)
            worker.kill("it failed three times in a row")
            if not others:
                self._abort(how)

    def _abort(self, last_failure: str) -> None:
        self.aborted = True
        log.error("%d failures in a row, last: %s; giving up the rest", FAILURES_IN_A_ROW, last_failure)
        detail = f"given up after {FAILURES_IN_A_ROW} failures in a row, the last of them: {last_failure}"
        self._queue.give_up(Reason.SYSTEMIC_ABORT, detail)
        for worker in self._workers:
            if worker.process:
                worker.status = WorkerStatus.FAILED
                worker.kill("the job is given up")

    def _take_back_progress(self, worker: Worker) -> None:
        """What was done of a file that was not finished is to be done again."""
        if worker.progress_in_hand:
            self._on_progress(-worker.progress_in_hand)
        worker.progress_in_hand = 0


def _check_signature(worker_function: WorkerFunction) -> None:
    parameters = list(inspect.signature(worker_function).parameters.values())
    names = [parameter.name for parameter in parameters[:2]]
    if names != ["file_subset", "device_id"]:
        raise ValueError(
            f"{getattr(worker_function, '__name__', worker_function)} must take (file_subset, device_id, **kwargs); "
            f"it takes ({', '.join(p.name for p in parameters)})"
        )
