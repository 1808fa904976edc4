"""The worker's side of a job: what runs in a spawned process, and how it talks with its supervisor."""

from __future__ import annotations

import faulthandler
import os
import signal
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle
from typing import Any

from esmflow.failures import Reason
from esmflow.logs import add_log_file
from esmflow.workers.lifetime import DEFERRED_SIGNALS, die_with_parent
from esmflow.workers.queue import FailedFile

WorkerFunction = Callable[..., tuple[list[str], list[FailedFile]]]


class FileSubset:
    """The files of one worker, inside the worker: an iterator that asks the supervisor for the next one.

    What is reported with `done` or `failed` is safe from then on, however the worker ends. A function that reports
    nothing is taken at its returned lists, and loses all of its files when it dies.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def __iter__(self) -> Iterator[str]:
        while True:
            self._connection.send(("next", None))
            file = self._connection.recv()
            if file is None:
                return
            yield file

    def done(self, file: str, result: Any = None) -> None:
        """Tells the supervisor that a file is finished, with whatever is to be known of it."""
        self._connection.send(("done", (file, result)))

    def failed(self, file: str, reason: Reason, detail: str) -> FailedFile:
        """Tells the supervisor that a file cannot be processed, while the worker itself goes on."""
        failure = FailedFile(file, reason, detail)
        self._connection.send(("failed", failure))
        return failure

    def progress(self, amount: int) -> None:
        """Tells the supervisor how much was done since the last time; 0 is a sign of life."""
        self._connection.send(("progress", amount))

    def about(self, **facts: Any) -> None:
        """Tells the supervisor something about this worker, for its record: how long it took to load a model."""
        self._connection.send(("about", facts))


@dataclass(frozen=True)
class Task:
    """What every worker of a job does: a worker function and its keyword arguments.

    log_file: where log lines and all that is printed go, None for the terminal.
    """

    function: WorkerFunction
    arguments: dict[str, Any] = field(default_factory=dict)
    log_file: str | None = None


def run_task(connection: Connection, supervisor: int, inherited: int, task: Task, device_id: int) -> None:
    """A worker's life. supervisor: its process id. inherited: how many open files come through the connection."""
    die_with_parent(supervisor)
    # Ctrl-C reaches the whole process group, and a scheduler's SIGTERM every process of the job: the supervisor decides
    # what either means. Both were blocked until here.
    for number in DEFERRED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, DEFERRED_SIGNALS)
    # Slot leases, which stay open as long as this process lives.
    descriptors = [recv_handle(connection) for _ in range(inherited)]
    if task.log_file is not None:
        _print_to(task.log_file)
        add_log_file(task.log_file)
    # A segmentation fault leaves the line that it happened on.
    faulthandler.enable()
    try:
        result = task.function(FileSubset(connection), device_id, **task.arguments)
        _check_lists(task.function, result)
    except BaseException as error:
        connection.send(("error", (f"{type(error).__name__}: {error}", traceback.format_exc())))
        os._exit(1)
    connection.send(("finished", result))
    for descriptor in descriptors:
        os.close(descriptor)


def _check_lists(function: WorkerFunction, result: Any) -> None:
    """Raises TypeError unless a worker function returned what it must."""
    lists = isinstance(result, tuple) and len(result) == 2 and all(isinstance(part, list) for part in result)
    if not lists or not all(isinstance(failure, FailedFile) for failure in result[1]):
        name = getattr(function, "__name__", str(function))
        raise TypeError(
            f"{name} must return (processed_files, failed_files), lists of files and of FailedFile; got {result!r}"
        )


def _print_to(log_file: str) -> None:
    """Sends standard output and error to the log file, those of C libraries too: CUDA's last words are printed."""
    os.makedirs(os.path.dirname(log_file) or ".", exist_ok=True)
    descriptor = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    os.close(descriptor)
