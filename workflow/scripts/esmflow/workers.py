"""Spawned workers that work through files, watched by a supervisor that notices every way a worker can end.

The supervisor hands out one file at a time, so it always knows which file a worker has in hand: when a worker dies,
that file and no other has failed, and a new worker goes on with the rest.
"""

from __future__ import annotations

import inspect
import logging
import multiprocessing
import multiprocessing.connection
import os
import signal
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from multiprocessing.connection import Connection
from multiprocessing.reduction import DupFd
from typing import Any

from esmflow.failures import Reason
from esmflow.lifetime import die_with_parent

log = logging.getLogger(__name__)

FAILURES_IN_A_ROW = 3
_TICK_SECONDS = 1.0
_STOP_SECONDS = 30.0

WorkerFunction = Callable[..., Any]


class WorkerStatus(StrEnum):
    """What a worker is doing."""

    IDLE = "idle"
    PROCESSING = "processing"
    COMPLETED = "completed"
    FAILED = "failed"


@dataclass(frozen=True)
class FailedFile:
    """A file that no worker finished. `detail` is for a person: the error, or the signal that ended the worker."""

    file: str
    reason: Reason
    detail: str


class FileSubset:
    """The files of one worker, inside the worker: an iterator that asks the supervisor for the next one."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def __iter__(self) -> Iterator[str]:
        while True:
            self._connection.send(("next", None))
            file = self._connection.recv()
            if file is None:
                return
            yield file

    def done(self, file: str, result: Any) -> None:
        """Tells the supervisor that the file in hand is finished, with whatever is to be known of it."""
        self._connection.send(("done", (file, result)))

    def progress(self, amount: int) -> None:
        """Tells the supervisor how much was done since the last time."""
        self._connection.send(("progress", amount))


def _serve(
    connection: Connection,
    inherited: Sequence[Any],
    supervisor: int,
    worker_function: WorkerFunction,
    device_id: int,
    worker_kwargs: dict[str, Any],
) -> None:
    """A worker's life. `inherited` are open files (slot leases) that stay open as long as the worker lives."""
    die_with_parent(supervisor)
    # Ctrl-C reaches the whole process group; the supervisor decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    held = [duplicate.detach() for duplicate in inherited]
    try:
        worker_function(FileSubset(connection), device_id, **worker_kwargs)
    except BaseException as error:
        connection.send(("error", (f"{type(error).__name__}: {error}", traceback.format_exc())))
        os._exit(1)
    connection.send(("finished", None))
    for descriptor in held:
        os.close(descriptor)


@dataclass
class _Worker:
    """The supervisor's view of one worker."""

    device_id: int
    process: multiprocessing.process.BaseProcess
    connection: Connection
    status: WorkerStatus = WorkerStatus.IDLE
    in_hand: str | None = None
    error: str | None = None


class BatchQueueManager:
    """Runs `worker_function(file_subset, device_id, **kwargs)` in spawned processes over a queue of files.

    The worker function iterates over `file_subset`, calls `file_subset.done(file, result)` for each finished file and
    `file_subset.progress(amount)` in between. Raises ValueError if it does not take these arguments.
    """

    def __init__(self, num_workers: int, worker_function: WorkerFunction, spawn_context: bool = True) -> None:
        if num_workers < 1:
            raise ValueError(f"num_workers: {num_workers} is not a positive number")
        _check_signature(worker_function)
        self._num_workers = num_workers
        self._worker_function = worker_function
        # A forked process inherits CUDA's state and every lock as it happened to be; a spawned one starts clean.
        self._context = multiprocessing.get_context("spawn" if spawn_context else None)
        self._workers: dict[int, _Worker] = {}
        self._in_a_row = [0] * num_workers
        self._queue: deque[str] = deque()
        self.results: dict[str, Any] = {}
        self.failed: list[FailedFile] = []
        self.restarts = 0
        self.aborted = False
        self._last_failure = ""

    def process_files(
        self,
        files: Sequence[str],
        *,
        inherited: Sequence[Sequence[int]] = (),
        on_progress: Callable[[int], None] = lambda amount: None,
        on_done: Callable[[str, Any], None] = lambda file, result: None,
        on_tick: Callable[[], None] = lambda: None,
        **worker_kwargs: Any,
    ) -> tuple[list[str], list[FailedFile]]:
        """Works through `files`. Returns those processed and those failed: each file is in one of the two.

        inherited: for each worker, open file descriptors that it keeps open until it ends.
        on_tick is called about once a second. After three failures in a row on one device the rest is given up as
        `systemic_abort`: what is wrong is not one file.
        """
        self._queue.extend(files)
        self._on_progress, self._on_done = on_progress, on_done
        self._inherited, self._worker_kwargs = inherited, worker_kwargs
        try:
            for device_id in range(self._num_workers):
                self._start(device_id)
            while self._workers:
                self._attend()
                self._replace_the_dead()
                on_tick()
        finally:
            self._stop_all()
        for file in self._queue:
            self.failed.append(FailedFile(file, Reason.WORKER_ERROR, "the worker ended before it took this file"))
        self._queue.clear()
        return list(self.results), self.failed

    def get_worker_status(self) -> dict[int, WorkerStatus]:
        """What each worker is doing, by device number."""
        return {device_id: worker.status for device_id, worker in self._workers.items()}

    def is_complete(self) -> bool:
        """Whether no file is waiting or in hand."""
        return not self._queue and all(worker.in_hand is None for worker in self._workers.values())

    def _start(self, device_id: int) -> None:
        ours, theirs = self._context.Pipe()
        inherited = _Descriptors(self._inherited[device_id] if self._inherited else ())
        process = self._context.Process(  # type: ignore[attr-defined]
            target=_serve,
            args=(theirs, inherited, os.getpid(), self._worker_function, device_id, self._worker_kwargs),
            name=f"worker-{device_id}",
        )
        process.start()
        theirs.close()
        self._workers[device_id] = _Worker(device_id, process, ours)

    def _attend(self) -> None:
        """Answers what the workers have to say; returns after a second at the latest."""
        by_connection = {worker.connection: worker for worker in self._workers.values()}
        sentinels = [worker.process.sentinel for worker in self._workers.values()]
        for ready in multiprocessing.connection.wait([*by_connection, *sentinels], timeout=_TICK_SECONDS):
            if isinstance(ready, Connection):
                self._hear(by_connection[ready])

    def _hear(self, worker: _Worker) -> None:
        """Takes in every message that a worker has sent so far."""
        try:
            while worker.connection.poll():
                what, content = worker.connection.recv()
                if what == "next":
                    self._check_finished(worker)
                    self._hand_out(worker)
                elif what == "done":
                    file, result = content
                    self.results[file] = result
                    worker.in_hand = None
                    self._in_a_row[worker.device_id] = 0
                    self._on_done(file, result)
                elif what == "progress":
                    self._on_progress(content)
                elif what == "error":
                    worker.error, trace = content
                    log.error("worker %d: %s", worker.device_id, trace.rstrip())
                elif what == "finished":
                    self._check_finished(worker)
                    worker.status = WorkerStatus.COMPLETED
        except (EOFError, ConnectionError):
            # The other end is gone; how the worker ended is read from its exit code.
            worker.process.join(_STOP_SECONDS)

    def _hand_out(self, worker: _Worker) -> None:
        file = self._queue[0] if self._queue else None
        worker.connection.send(file)
        # Only now: a file that could not be sent stays in the queue.
        if file is not None:
            self._queue.popleft()
        worker.in_hand = file
        worker.status = WorkerStatus.IDLE if file is None else WorkerStatus.PROCESSING

    def _check_finished(self, worker: _Worker) -> None:
        """A worker function that goes on without calling `done` has not processed the file it had in hand."""
        if worker.in_hand is not None:
            self.failed.append(
                FailedFile(worker.in_hand, Reason.WORKER_ERROR, "the worker went on without finishing it")
            )
            worker.in_hand = None

    def _replace_the_dead(self) -> None:
        for worker in [w for w in self._workers.values() if not w.process.is_alive()]:
            # Whatever it said before it died comes first.
            self._hear(worker)
            del self._workers[worker.device_id]
            worker.connection.close()
            if worker.status is WorkerStatus.COMPLETED:
                continue
            self._note_failure(worker)
            if self._in_a_row[worker.device_id] >= FAILURES_IN_A_ROW:
                self._abort()
            elif self._queue:
                self.restarts += 1
                log.warning("starting worker %d again", worker.device_id)
                self._start(worker.device_id)

    def _note_failure(self, worker: _Worker) -> None:
        worker.status = WorkerStatus.FAILED
        self._in_a_row[worker.device_id] += 1
        how = worker.error or _describe_exit(worker.process.exitcode)
        reason = Reason.WORKER_ERROR if worker.error else Reason.WORKER_CRASHED
        if worker.in_hand is not None:
            log.error("worker %d failed on %s: %s", worker.device_id, worker.in_hand, how)
            self.failed.append(FailedFile(worker.in_hand, reason, how))
        else:
            log.error("worker %d failed before it took a file: %s", worker.device_id, how)
        self._last_failure = how

    def _abort(self) -> None:
        self.aborted = True
        log.error("%d failures in a row, last: %s; giving up the rest", FAILURES_IN_A_ROW, self._last_failure)
        self._stop_all()
        detail = f"not tried after {FAILURES_IN_A_ROW} failures in a row, the last of them: {self._last_failure}"
        self.failed.extend(FailedFile(file, Reason.SYSTEMIC_ABORT, detail) for file in self._queue)
        self._queue.clear()

    def _stop_all(self) -> None:
        for worker in self._workers.values():
            if worker.in_hand is not None and worker.in_hand not in self.results:
                self.failed.append(FailedFile(worker.in_hand, Reason.SYSTEMIC_ABORT, "stopped with the job"))
            worker.process.terminate()
        deadline = time.monotonic() + _STOP_SECONDS
        for worker in self._workers.values():
            worker.process.join(max(0.0, deadline - time.monotonic()))
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
        self._workers.clear()


class _Descriptors:
    """Open files that travel to a spawned process: pickled, each is passed on as an inherited descriptor."""

    def __init__(self, descriptors: Sequence[int]) -> None:
        self._descriptors = descriptors

    def __reduce__(self) -> tuple[type[list], tuple[list[Any]]]:
        return list, ([DupFd(descriptor) for descriptor in self._descriptors],)


def _check_signature(worker_function: WorkerFunction) -> None:
    parameters = list(inspect.signature(worker_function).parameters.values())
    names = [parameter.name for parameter in parameters[:2]]
    if names != ["file_subset", "device_id"]:
        raise ValueError(
            f"{getattr(worker_function, '__name__', worker_function)} must take (file_subset, device_id, **kwargs); "
            f"it takes ({', '.join(p.name for p in parameters)})"
        )


def _describe_exit(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        name = signal.Signals(-exit_code).name
        hint = "; SIGKILL often means that the machine ran out of memory" if name == "SIGKILL" else ""
        return f"the worker was ended by {name}{hint}"
    return f"the worker ended with exit code {exit_code}"
