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
from esmflow.files import JsonFile

log = logging.getLogger(__name__)

BEAT_SECONDS = 3.0
_RATE_SECONDS = 60.0


class State(StrEnum):
    """What a job is doing, or how it ended. QUEUED, for a slot."""

    STARTING = "starting"
    QUEUED = "queued"
    LOADING = "loading"
    EMBEDDING = "embedding"
    FINISHED = "finished"
    FAILED = "failed"


@dataclass(frozen=True)
class Beat(JsonFile):
    """A job's word about itself.

    process_started, started, updated: seconds since 1970. residues, shards: to do in this attempt, and how many of them
    are done. residues_per_second: over the last minute, None as long as there is nothing to tell it by.
    failed_sequences, failed_shards, worker_deaths: so far. message: why it failed.
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


class Heartbeat:
    """Keeps a job's file up to date for a block; the last word is that the job has finished, or failed and why."""

    def __init__(self, path: str | os.PathLike[str], group: str, attempt: int, log_file: str) -> None:
        self._path = Path(path)
        self._beat = Beat(
            group=group,
            state=State.STARTING,
            host=socket.gethostname(),
            process=os.getpid(),
            process_started=psutil.Process().create_time(),
            started=time.time(),
            updated=time.time(),
            attempt=attempt,
            log_file=os.path.abspath(log_file),
        )
        self._observe: Callable[[], dict[str, Any]] = dict
        self._done: deque[tuple[float, int]] = deque()
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._keep_up, name="heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        self._write()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        self._ended.set()
        self._thread.join()
        message = "" if error is None else one_line(str(error)) or type(error).__name__
        self.tell(State.FINISHED if error is None else State.FAILED, message=message)

    def tell(self, state: State, **fields: Any) -> None:
        """Says at once what the job is doing now, and what has become known: fields of `Beat`."""
        with self._lock:
            self._beat = replace(self._beat, state=state, **fields)
        self._write()

    def observe(self, look: Callable[[], dict[str, Any]]) -> None:
        """From now on asks `look` for fields of `Beat`, every few seconds and from another thread."""
        self._observe = look

    def _keep_up(self) -> None:
        # Signals are for the main thread.
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
        while not self._ended.wait(BEAT_SECONDS):
            self._write()

    def _write(self) -> None:
        with self._lock:
            now = time.time()
            observed = self._observe()
            if self._ended.is_set():
                # How it ended has been told; the last figures have not.
                observed.pop("state", None)
            beat = replace(self._beat, updated=now, **observed)
            self._done.append((now, beat.residues_done))
            while now - self._done[0][0] > _RATE_SECONDS:
                self._done.popleft()
            self._beat = replace(beat, residues_per_second=self._rate())
            try:
                self._beat.write(self._path)
            except OSError as error:
                # Nobody should lose a run because a full disk has no room for its status.
                log.warning("%s cannot be written: %s", self._path, error)

    def _rate(self) -> float | None:
        (before, done_before), (now, done) = self._done[0], self._done[-1]
        return (done - done_before) / (now - before) if done > done_before else None
