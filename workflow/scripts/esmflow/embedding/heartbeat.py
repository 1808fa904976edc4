"""What an embed job tells about itself while it runs: a small file, written anew every few seconds.

A thread writes it, so that it is kept up whatever the job is doing: waiting for a slot, loading a model, or at work.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

import psutil

from esmflow.failures import one_line
from esmflow.files import JsonFile, remove_left_overs
from esmflow.workers.lifetime import main_process_of_run

log = logging.getLogger(__name__)

INTERVAL_SECONDS = 3.0
_RATE_SECONDS = 60.0


class State(StrEnum):
    """What a job is doing, or how it ended. QUEUED, for a slot; DIED and WAITING (not begun) only others can say."""

    WAITING = "waiting"
    STARTING = "starting"
    QUEUED = "queued"
    LOADING = "loading"
    EMBEDDING = "embedding"
    FINISHED = "finished"
    FAILED = "failed"
    DIED = "died"


@dataclass(frozen=True)
class JobStatus(JsonFile):
    """What a job says of itself.

    process_started, started, updated: seconds since 1970. attempt, last_attempt: counted from 1. run, run_started: the
    process of the run that would try the job again, None where that may be on another machine. residues, shards: to do
    in this attempt, and how many of them are done. residues_per_second: over the last minute, None as long as there is
    nothing to tell it by. failed_sequences, failed_shards, worker_deaths: so far. message: why it failed.
    """

    group: str
    state: State
    host: str
    process: int
    process_started: float
    started: float
    updated: float
    attempt: int
    log_file: str
    slots: tuple[str, ...] = ()
    residues: int = 0
    residues_done: int = 0
    residues_per_second: float | None = None
    shards: int = 0
    shards_done: int = 0
    shards_reused: int = 0
    failed_sequences: int = 0
    failed_shards: int = 0
    worker_deaths: int = 0
    message: str = ""
    last_attempt: int = 1
    run: int | None = None
    run_started: float | None = None


class Heartbeat:
    """Keeps a job's file up to date for a block; the last word is that the job has finished, or failed and why."""

    def __init__(
        self, path: str | os.PathLike[str], group: str, log_file: str, attempt: int = 1, last_attempt: int = 1
    ) -> None:
        self._path = Path(path)
        run = main_process_of_run()
        self._status = JobStatus(
            group=group,
            state=State.STARTING,
            host=socket.gethostname(),
            process=os.getpid(),
            process_started=psutil.Process().create_time(),
            started=time.time(),
            updated=time.time(),
            attempt=attempt,
            last_attempt=last_attempt,
            log_file=os.path.abspath(log_file),
            run=run.pid if run else None,
            run_started=run.create_time() if run else None,
        )
        self._observe: Callable[[], dict[str, Any]] = dict
        self._done: deque[tuple[float, int]] = deque()
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._write_often, name="heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        # What an attempt left that was killed while it wrote; nobody else writes this group's file.
        remove_left_overs([self._path])
        self._write()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        self._ended.set()
        self._thread.join()
        message = "" if error is None else one_line(str(error)) or type(error).__name__
        last = self._status.last_attempt if getattr(error, "mendable", True) else self._status.attempt
        self.tell(State.FINISHED if error is None else State.FAILED, message=message, last_attempt=last)

    def tell(self, state: State, **fields: Any) -> None:
        """Says at once what the job is doing now, and what has become known: fields of `JobStatus`."""
        with self._lock:
            self._status = replace(self._status, state=state, **fields)
        self._write()

    def observe(self, look: Callable[[], dict[str, Any]]) -> None:
        """From now on asks `look` for fields of `JobStatus`, every few seconds and from another thread."""
        self._observe = look

    def _write_often(self) -> None:
        # Signals are for the main thread.
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
        while not self._ended.wait(INTERVAL_SECONDS):
            self._write()

    def _write(self) -> None:
        with self._lock:
            now = time.time()
            observed = self._observe()
            if self._ended.is_set():
                # How it ended has been told; the last figures have not.
                observed.pop("state", None)
            status = replace(self._status, updated=now, **observed)
            self._done.append((now, status.residues_done))
            while now - self._done[0][0] > _RATE_SECONDS:
                self._done.popleft()
            (before, done_before), done = self._done[0], status.residues_done
            rate = (done - done_before) / (now - before) if done > done_before else None
            self._status = replace(status, residues_per_second=rate)
            try:
                self._status.write(self._path)
            except OSError as error:
                # Nobody should lose a run because a full disk has no room for its status.
                log.warning("%s cannot be written: %s", self._path, error)
