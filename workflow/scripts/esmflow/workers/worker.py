"""The supervisor's side of one worker: its processes, which come and go, and what is known of it."""

from __future__ import annotations

import logging
import multiprocessing.process
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from multiprocessing.connection import Connection
from multiprocessing.reduction import send_handle
from typing import Any

from esmflow.failures import Reason, one_line
from esmflow.logs import last_lines
from esmflow.workers.lifetime import DEFERRED_SIGNALS
from esmflow.workers.process import Task, run_task

log = logging.getLogger(__name__)

_EXIT_SECONDS = 0.2
_DYING_SECONDS = 30.0
_LOG_LINES = 20
_LOG_LINES_IN_DETAIL = 3


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


class Worker:
    """One worker. `device_id` is its number; `retired` when no process is to be started for it any more.

    asking: whether its process waits for a file. silent_seconds: since it last said something. error: what its function
    raised. progress_in_hand: what it told of its progress with the file in hand.
    """

    def __init__(self, device_id: int) -> None:
        self.device_id = device_id
        self.status = WorkerStatus.IDLE
        self.retired = False
        self.asking = False
        self.silent_seconds = 0.0
        self.failures_in_a_row = 0
        self.progress_in_hand = 0
        self.processed = 0
        self.error: str | None = None
        self.facts: dict[str, Any] = {}
        self.exits: list[WorkerExit] = []
        self.process: multiprocessing.process.BaseProcess | None = None
        self.connection: Connection | None = None
        self._kill_reason: str | None = None
        self._log_file: str | None = None
        self._log_start = 0
        self._ended: float | None = None

    def start(self, context: Any, task: Task, inherited: Sequence[int]) -> None:
        """Starts a process. inherited: open file descriptors that it keeps open until it ends."""
        ours, theirs = context.Pipe()
        self._log_file = task.log_file
        self._log_start = os.path.getsize(self._log_file) if self._log_file and os.path.exists(self._log_file) else 0
        arguments = (theirs, os.getpid(), len(inherited), task, self.device_id)
        process = context.Process(target=run_task, args=arguments, name=f"worker-{self.device_id}")
        # The child inherits the mask and lifts it when it has said what is to be done about these signals.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, DEFERRED_SIGNALS)
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for descriptor in inherited:
            send_handle(ours, descriptor, process.pid)
        theirs.close()
        self.process, self.connection = process, ours
        self.status = WorkerStatus.IDLE
        self.asking = False
        self.error = self._kill_reason = self._ended = None
        self.silent_seconds = 0.0

    def is_alive(self) -> bool:
        """Whether its process runs."""
        return self.process is not None and self.process.is_alive()

    def send(self, file: str | None) -> bool:
        """Hands over a file, or None to let the worker go. False if it has died while it waited."""
        assert self.connection is not None
        self.asking = False
        try:
            self.connection.send(file)
        except OSError:
            return False
        self.silent_seconds = 0.0
        self.status = WorkerStatus.IDLE if file is None else WorkerStatus.PROCESSING
        return True

    def receive(self) -> list[tuple[str, Any]]:
        """What its process has sent so far: kinds of messages, see `FileSubset`, and their content.

        What it tells of itself is kept here: facts, and the error that its function raised.
        """
        assert self.connection is not None
        assert self.process is not None
        messages = []
        try:
            while self.connection.poll():
                kind, content = self.connection.recv()
                messages.append((kind, content))
                if kind == "about":
                    self.facts.update(content)
                elif kind == "error":
                    self.error, trace = content
                    log.error("worker %d: %s", self.device_id, trace.rstrip())
        except (EOFError, OSError):
            # The other end is gone, perhaps in the middle of a message; how it ended is read from its exit code.
            self.process.join(_EXIT_SECONDS)
        if messages:
            self.silent_seconds = 0.0
        return messages

    def kill(self, why: str) -> None:
        """Kills its process. Files are written under temporary names, so that spoils none."""
        if self.process is not None and self._kill_reason is None:
            log.warning("ending worker %d: %s", self.device_id, why)
            self._kill_reason = why
            self.process.kill()

    def join(self) -> None:
        """Waits for the end of its process, which should be dead by now or die soon, and closes the connection."""
        if self.process is None or self.connection is None:
            return
        self.process.join(_DYING_SECONDS)
        if self.process.is_alive():
            log.error("worker %d (process %s) cannot be killed", self.device_id, self.process.pid)
        self.connection.close()
        self.process = self.connection = None
        self.asking = False
        self._ended = time.time()

    def note_exit(self, in_hand: tuple[str, ...] = ()) -> tuple[Reason, str]:
        """Keeps in `exits` how its process ended, and logs it. Returns the reason for what it had in hand, and more."""
        assert self.process is not None
        process, exit_code = self.process.pid or 0, self.process.exitcode
        name = signal.Signals(-exit_code).name if exit_code is not None and exit_code < 0 else None
        how = self._how(exit_code, name)
        lines = last_lines(self._log_file, _LOG_LINES, process, self._log_start) if self._log_file else []
        self.exits.append(WorkerExit(time.time(), process, exit_code, name, how, in_hand, tuple(lines)))
        log.error("worker %d failed on %s: %s", self.device_id, ", ".join(in_hand) or "no file yet", how)
        if self.error:
            return Reason.WORKER_ERROR, how
        # An error says itself what was wrong; of a crash the last lines may be all there is to know.
        last = one_line(" | ".join(lines[-_LOG_LINES_IN_DETAIL:]))
        return Reason.WORKER_CRASHED, f"{how}; last in its log: {last or 'nothing'}"

    def record(self) -> dict[str, Any]:
        """What is to be kept: `device`, `status`, `processed` files, `ended`, `exits`, and what it told of itself."""
        return {
            "device": self.device_id,
            "status": self.status,
            "processed": self.processed,
            "ended": self._ended,
            "exits": list(self.exits),
            **self.facts,
        }

    def _how(self, exit_code: int | None, signal_name: str | None) -> str:
        if self._kill_reason:
            return f"the worker was ended: {self._kill_reason}"
        if self.error:
            return self.error
        if signal_name:
            hint = "; SIGKILL often means that the machine ran out of memory" if signal_name == "SIGKILL" else ""
            return f"the worker was ended by {signal_name}{hint}"
        return f"the worker ended with exit code {exit_code}"
