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
from multiprocessing.connection import Connection
from typing import Any

from esmflow.failures import Reason, one_line
from esmflow.workers.process import Descriptors, FileSubset, WorkerFunction
from esmflow.workers.queue import FailedFile, FileQueue
from esmflow.workers.worker import Seat, WorkerExit, WorkerStatus

__all__ = ["BatchQueueManager", "FailedFile", "FileSubset", "WorkerExit", "WorkerStatus"]

log = logging.getLogger(__name__)

FAILURES_IN_A_ROW = 3
_TICK_SECONDS = 1.0
_LEAVING_SECONDS = 30.0
_LOG_LINES_IN_DETAIL = 3


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
        self._worker_function = worker_function
        # A forked process inherits CUDA's state and every lock as it happened to be; a spawned one starts clean.
        self._context = multiprocessing.get_context("spawn" if spawn_context else None)
        self._seats = [Seat(device_id) for device_id in range(num_workers)]
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
        if len(file_assignments) != len(self._seats):
            raise ValueError(f"file_assignments: {len(file_assignments)} lists for {len(self._seats)} workers")
        self._queue = FileQueue(file_assignments)
        self._inherited, self._log_file, self._hang_seconds = inherited, log_file, hang_seconds
        self._on_progress, self._on_done = on_progress, on_done
        self._worker_kwargs = worker_kwargs
        try:
            self._start_missing()
            while any(seat.process for seat in self._seats):
                self._answer_those_who_ask()
                self._attend()
                self._end_the_overdue()
                self._bury_the_dead()
                self._start_missing()
                on_tick()
        finally:
            for seat in self._seats:
                seat.kill("the job ends")
                seat.vacate()
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
        return {seat.device_id: seat.status for seat in self._seats}

    def is_complete(self) -> bool:
        """Whether no file is waiting or in hand."""
        return self._queue.is_complete()

    def worker_records(self) -> list[dict[str, Any]]:
        """What is to be kept of each worker; see `Seat.record`."""
        return [seat.record() for seat in self._seats]

    def _others(self, seat: Seat) -> bool:
        return any(other.process for other in self._seats if other is not seat)

    def _start_missing(self) -> None:
        """Starts a worker in each empty seat that could take a file."""
        for seat in self._seats:
            if seat.process or seat.closed or self.stopped or self.aborted:
                continue
            if self._queue.has_for(seat.device_id, self._others(seat)):
                if seat.exits:
                    self.restarts += 1
                    log.warning("starting worker %d again", seat.device_id)
                inherited = Descriptors(self._inherited[seat.device_id] if self._inherited else ())
                seat.start(self._context, self._worker_function, self._worker_kwargs, inherited, self._log_file)

    def _answer_those_who_ask(self) -> None:
        """Hands out files. A worker for which there is none waits: another may die with a file in hand."""
        for seat in self._seats:
            if seat.asking and not self.stopped:
                file = self._queue.take(seat.device_id, self._others(seat))
                if file is not None and not seat.hand(file):
                    self._queue.put_back(seat.device_id, file)
        living = [seat for seat in self._seats if seat.process]
        if self.stopped or all(seat.asking for seat in living):
            for seat in living:
                if seat.asking:
                    seat.hand(None)

    def _attend(self) -> None:
        """Listens to what the workers have to say; returns after a second at the latest."""
        before = time.monotonic()
        by_connection = {seat.connection: seat for seat in self._seats if seat.connection}
        sentinels = [seat.process.sentinel for seat in self._seats if seat.process]
        ready = multiprocessing.connection.wait([*by_connection, *sentinels], timeout=_TICK_SECONDS)
        # No more than a tick: a job that was suspended as a whole and goes on has not been silent meanwhile.
        waited = min(time.monotonic() - before, _TICK_SECONDS)
        for seat in by_connection.values():
            seat.silent_seconds += waited
        for connection in ready:
            if isinstance(connection, Connection):
                self._hear(by_connection[connection])

    def _hear(self, seat: Seat) -> None:
        for what, content in seat.hear():
            if what == "next":
                seat.asking = True
                seat.status = WorkerStatus.IDLE
            elif what == "progress":
                seat.amount_in_hand += content
                self._on_progress(content)
            elif what == "done":
                self._note_done(seat, *content)
            elif what == "failed":
                self._note_failed(seat, content)
            elif what == "about":
                seat.about.update(content)
            elif what == "error":
                seat.error, trace = content
                log.error("worker %d: %s", seat.device_id, trace.rstrip())
            elif what == "finished":
                self._settle(seat, *content)

    def _note_done(self, seat: Seat, file: str, result: Any) -> None:
        if self._queue.done(seat.device_id, file, result):
            seat.amount_in_hand = 0
            seat.processed += 1
            seat.failures_in_a_row = 0
            self._failed_in_a_row.clear()
            self._on_done(file, result)

    def _note_failed(self, seat: Seat, failure: FailedFile) -> None:
        if self._queue.fail(seat.device_id, failure):
            log.error("worker %d failed on %s: %s", seat.device_id, failure.file, failure.detail)
            self._forget_progress(seat)
            self._count_failure(seat, failure.detail)

    def _settle(self, seat: Seat, processed: Sequence[str], failed: Sequence[FailedFile]) -> None:
        """A worker function has returned: what it did not report while it ran is taken from its lists."""
        seat.status, seat.closed = WorkerStatus.COMPLETED, True
        for file in processed:
            if file in self._queue.in_hand(seat.device_id):
                self._note_done(seat, file, None)
        for failure in failed:
            if failure.file in self._queue.in_hand(seat.device_id):
                self._note_failed(seat, failure)
        for file in self._queue.in_hand(seat.device_id):
            detail = "the worker went on without finishing it: it was neither reported nor returned"
            self._note_failed(seat, FailedFile(file, Reason.WORKER_ERROR, detail))

    def _end_the_overdue(self) -> None:
        """Kills workers that say nothing for too long, that do not leave, and those to be stopped."""
        for seat in self._seats:
            if not seat.is_alive():
                continue
            if self._stop_at is not None and not self._queue.in_hand(seat.device_id):
                seat.kill("the job was asked to stop, and it has nothing in hand")
            elif self._stop_at is not None and time.monotonic() >= self._stop_at:
                seat.kill("the time to finish after the request to stop is over")
            elif seat.closed and seat.silent_seconds > _LEAVING_SECONDS:
                seat.kill("it is done and does not leave")
            elif self._hang_seconds and not seat.asking and seat.silent_seconds > self._hang_seconds:
                seat.kill(f"no progress for {self._hang_seconds:.0f} seconds")

    def _bury_the_dead(self) -> None:
        for seat in self._seats:
            if seat.process and not seat.is_alive():
                # Whatever it said before it died comes first.
                self._hear(seat)
                if seat.status is not WorkerStatus.COMPLETED:
                    self._note_death(seat)
                seat.vacate()

    def _note_death(self, seat: Seat) -> None:
        seat.status = WorkerStatus.FAILED
        in_hand = self._queue.in_hand(seat.device_id)
        if self.aborted or (self.stopped and not in_hand):
            return
        death = seat.describe_death(in_hand)
        log.error("worker %d failed on %s: %s", seat.device_id, ", ".join(in_hand) or "no file yet", death.how)
        self._forget_progress(seat)
        reason, detail = Reason.WORKER_ERROR, death.how
        if not seat.error:
            # An error says itself what was wrong; of a crash the last lines may be all there is to know.
            lines = one_line(" | ".join(death.log_lines[-_LOG_LINES_IN_DETAIL:]))
            reason, detail = Reason.WORKER_CRASHED, f"{death.how}; last in its log: {lines or 'nothing'}"
        first_time = self._queue.lose(seat.device_id, reason, detail)
        if not self.stopped and not seat.closed and (first_time or not in_hand):
            self._count_failure(seat, death.how)

    def _count_failure(self, seat: Seat, how: str) -> None:
        """Three in a row: on one worker they tell of its device, on several, or on the last one, of everything."""
        seat.failures_in_a_row += 1
        self._failed_in_a_row.append(seat.device_id)
        others = any(not other.closed for other in self._seats if other is not seat)
        several = len(set(self._failed_in_a_row)) > 1
        if len(self._failed_in_a_row) >= FAILURES_IN_A_ROW and (several or not others):
            self._abort(how)
        elif seat.failures_in_a_row >= FAILURES_IN_A_ROW:
            seat.closed, seat.status = True, WorkerStatus.FAILED
            self._failed_in_a_row = [number for number in self._failed_in_a_row if number != seat.device_id]
            log.error("worker %d is given up after %d failures in a row", seat.device_id, FAILURES_IN_A_ROW)
            seat.kill("it failed three times in a row")
            if not others:
                self._abort(how)

    def _abort(self, last_failure: str) -> None:
        self.aborted = True
        log.error("%d failures in a row, last: %s; giving up the rest", FAILURES_IN_A_ROW, last_failure)
        detail = f"given up after {FAILURES_IN_A_ROW} failures in a row, the last of them: {last_failure}"
        self._queue.give_up(Reason.SYSTEMIC_ABORT, detail)
        for seat in self._seats:
            if seat.process:
                seat.status = WorkerStatus.FAILED
                seat.kill("the job is given up")

    def _forget_progress(self, seat: Seat) -> None:
        """What was done of a file that was not finished is to be done again."""
        if seat.amount_in_hand:
            self._on_progress(-seat.amount_in_hand)
        seat.amount_in_hand = 0


def _check_signature(worker_function: WorkerFunction) -> None:
    parameters = list(inspect.signature(worker_function).parameters.values())
    names = [parameter.name for parameter in parameters[:2]]
    if names != ["file_subset", "device_id"]:
        raise ValueError(
            f"{getattr(worker_function, '__name__', worker_function)} must take (file_subset, device_id, **kwargs); "
            f"it takes ({', '.join(p.name for p in parameters)})"
        )
