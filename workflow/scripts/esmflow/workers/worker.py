"""A worker's seat: the place of one worker, and what is known of it, while processes come and go."""

from __future__ import annotations

import logging
import multiprocessing.process
import os
import signal
import time
from dataclasses import dataclass
from enum import StrEnum
from multiprocessing.connection import Connection
from typing import Any

from esmflow.logs import last_lines
from esmflow.workers.process import HELD_BACK, Descriptors, Setting, WorkerFunction, serve

log = logging.getLogger(__name__)

_EXIT_SECONDS = 0.2
_DYING_SECONDS = 30.0
_LOG_LINES = 20


class WorkerStatus(StrEnum):
    """What a worker is doing: starting or waiting for a file, at work, done for good, or dead."""

    IDLE = "idle"
    PROCESSING = "processing"
    COMPLETED = "completed"
    FAILED = "failed"


@dataclass(frozen=True)
class WorkerExit:
    """How a worker ended before its time.

    time: seconds since 1970. signal: the name of the signal that ended it, None if it ended by itself. in_hand: the
    files it had. log_lines: the last lines it wrote, if there is a log file.
    """

    time: float
    process: int
    exit_code: int | None
    signal: str | None
    how: str
    in_hand: tuple[str, ...]
    log_lines: tuple[str, ...]


class Seat:
    """One worker's place. `device_id` is its number; `closed` when no process is to take it any more.

    asking: whether its process waits for a file. silent_seconds: since it last said something.
    """

    def __init__(self, device_id: int) -> None:
        self.device_id = device_id
        self.status = WorkerStatus.IDLE
        self.closed = False
        self.asking = False
        self.silent_seconds = 0.0
        self.failures_in_a_row = 0
        self.amount_in_hand = 0
        self.processed = 0
        self.error: str | None = None
        self.about: dict[str, Any] = {}
        self.exits: list[WorkerExit] = []
        self.process: multiprocessing.process.BaseProcess | None = None
        self.connection: Connection | None = None
        self._why_killed: str | None = None
        self._log_file: str | None = None
        self._log_start = 0
        self._ended: float | None = None

    def start(
        self,
        context: Any,
        function: WorkerFunction,
        kwargs: dict[str, Any],
        inherited: Descriptors,
        log_file: str | None,
    ) -> None:
        """Starts a process in this seat."""
        ours, theirs = context.Pipe()
        self._log_file = log_file
        self._log_start = os.path.getsize(log_file) if log_file and os.path.exists(log_file) else 0
        process = context.Process(
            target=serve,
            args=(theirs, Setting(os.getpid(), inherited, log_file), function, self.device_id, kwargs),
            name=f"worker-{self.device_id}",
        )
        # The child inherits the mask and lifts it when it has said what is to be done about these signals.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, HELD_BACK)
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()
        self.process, self.connection = process, ours
        self.status = WorkerStatus.IDLE
        self.asking = False
        self.error = self._why_killed = self._ended = None
        self.silent_seconds = 0.0

    def is_alive(self) -> bool:
        """Whether its process runs."""
        return self.process is not None and self.process.is_alive()

    def hand(self, file: str | None) -> bool:
        """Sends a file, or None to let the worker go. False if it has died while it waited."""
        assert self.connection is not None
        self.asking = False
        try:
            self.connection.send(file)
        except OSError:
            return False
        self.silent_seconds = 0.0
        self.status = WorkerStatus.IDLE if file is None else WorkerStatus.PROCESSING
        return True

    def hear(self) -> list[tuple[str, Any]]:
        """Every message that its process has sent so far."""
        assert self.connection is not None
        assert self.process is not None
        messages = []
        try:
            while self.connection.poll():
                messages.append(self.connection.recv())
        except (EOFError, OSError):
            # The other end is gone, perhaps in the middle of a message; how it ended is read from its exit code.
            self.process.join(_EXIT_SECONDS)
        if messages:
            self.silent_seconds = 0.0
        return messages

    def kill(self, why: str) -> None:
        """Kills its process. Files are written under temporary names, so that spoils none."""
        if self.process is not None and self._why_killed is None:
            log.warning("ending worker %d: %s", self.device_id, why)
            self._why_killed = why
            self.process.kill()

    def vacate(self) -> None:
        """Lets go of its process, which should be dead by now or die soon."""
        if self.process is None or self.connection is None:
            return
        self.process.join(_DYING_SECONDS)
        if self.process.is_alive():
            log.error("worker %d (process %s) cannot be killed", self.device_id, self.process.pid)
        self.connection.close()
        self.process = self.connection = None
        self.asking = False
        self._ended = time.time()

    def describe_death(self, in_hand: tuple[str, ...]) -> WorkerExit:
        """How its process ended; it is kept in `exits`."""
        assert self.process is not None
        process, exit_code = self.process.pid or 0, self.process.exitcode
        name = signal.Signals(-exit_code).name if exit_code is not None and exit_code < 0 else None
        lines = last_lines(self._log_file, process, self._log_start, _LOG_LINES) if self._log_file else []
        death = WorkerExit(time.time(), process, exit_code, name, self._how(exit_code, name), in_hand, tuple(lines))
        self.exits.append(death)
        return death

    def record(self) -> dict[str, Any]:
        """What is to be kept: `device`, `status`, `processed` files, `ended`, `exits`, and what it told of itself."""
        return {
            "device": self.device_id,
            "status": self.status,
            "processed": self.processed,
            "ended": self._ended,
            "exits": list(self.exits),
            **self.about,
        }

    def _how(self, exit_code: int | None, signal_name: str | None) -> str:
        if self._why_killed:
            return f"the worker was ended: {self._why_killed}"
        if self.error:
            return self.error
        if signal_name:
            hint = "; SIGKILL often means that the machine ran out of memory" if signal_name == "SIGKILL" else ""
            return f"the worker was ended by {signal_name}{hint}"
        return f"the worker ended with exit code {exit_code}"
