"""The worker's side of a job: what runs in a spawned process, and how it talks with its supervisor."""

from __future__ import annotations

import faulthandler
import os
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.reduction import DupFd
from typing import Any

from esmflow.failures import Reason
from esmflow.logs import add_log_file
from esmflow.workers.lifetime import die_with_parent
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
class Setting:
    """What a worker's process is started with.

    supervisor: its process id. inherited: open files (slot leases) that stay open as long as the worker lives; a
    `Descriptors` on the way there. log_file: where its log lines and all that it prints go, None for the terminal.
    """

    supervisor: int
    inherited: Any
    log_file: str | None


def serve(
    connection: Connection,
    setting: Setting,
    worker_function: WorkerFunction,
    device_id: int,
    worker_kwargs: dict[str, Any],
) -> None:
    """A worker's life."""
    die_with_parent(setting.supervisor)
    # Ctrl-C reaches the whole process group, and a scheduler's SIGTERM every process of the job: the supervisor decides
    # what either means. Both were held back until here.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD_BACK)
    held = [duplicate.detach() for duplicate in setting.inherited]
    if setting.log_file is not None:
        _print_to(setting.log_file)
        add_log_file(setting.log_file)
    # A segmentation fault leaves the line that it happened on.
    faulthandler.enable()
    try:
        result = worker_function(FileSubset(connection), device_id, **worker_kwargs)
        processed, failed = _checked(worker_function, result)
    except BaseException as error:
        connection.send(("error", (f"{type(error).__name__}: {error}", traceback.format_exc())))
        os._exit(1)
    connection.send(("finished", (processed, failed)))
    for descriptor in held:
        os.close(descriptor)


HELD_BACK = (signal.SIGINT, signal.SIGTERM)
"""Signals that are blocked while a worker's process starts, when they would end it."""


def _checked(worker_function: WorkerFunction, result: Any) -> tuple[list[str], list[FailedFile]]:
    name = getattr(worker_function, "__name__", str(worker_function))
    complaint = f"{name} must return (processed_files, failed_files), lists of files and of FailedFile; got {result!r}"
    if not (isinstance(result, tuple) and len(result) == 2 and all(isinstance(part, list) for part in result)):
        raise TypeError(complaint)
    processed, failed = result
    if not all(isinstance(failure, FailedFile) for failure in failed):
        raise TypeError(complaint)
    return processed, failed


def _print_to(log_file: str) -> None:
    """Sends standard output and error to the log file, those of C libraries too: CUDA's last words are printed."""
    os.makedirs(os.path.dirname(log_file) or ".", exist_ok=True)
    descriptor = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    os.close(descriptor)


class Descriptors:
    """Open files that travel to a spawned process: pickled, each is passed on as an inherited descriptor."""

    def __init__(self, descriptors: Sequence[int]) -> None:
        self._descriptors = descriptors

    def __reduce__(self) -> tuple[type[list], tuple[list[Any]]]:
        return list, ([DupFd(descriptor) for descriptor in self._descriptors],)
