"""The files of a job: which ones wait, which a worker has in hand, which are processed, which failed.

Nothing here starts or watches a process. Every file is in exactly one place at any time, so none can be lost from both
lists and none counted twice, whatever workers say and however they end.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from esmflow.failures import Reason

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FailedFile:
    """A file that no worker finished. `detail` is for a person: the error, or the signal that ended the worker."""

    file: str
    reason: Reason
    detail: str


@dataclass(frozen=True)
class _Retry:
    """A file whose first worker failed with it in hand, waiting for another one."""

    file: str
    not_by: int
    first: FailedFile


class FileQueue:
    """The files of a job, dealt to workers by number. A worker whose own files are done takes them from the others."""

    def __init__(self, assignments: Sequence[Sequence[str]]) -> None:
        repeated = [file for file, count in Counter(f for files in assignments for f in files).items() if count > 1]
        if repeated:
            raise ValueError(f"file_assignments: {repeated[0]} is assigned more than once")
        self._waiting = [deque(files) for files in assignments]
        self._in_hand: list[list[str]] = [[] for _ in assignments]
        self._retries: deque[_Retry] = deque()
        self._first_failures: dict[str, FailedFile] = {}
        self.results: dict[str, Any] = {}
        self.failed: list[FailedFile] = []

    def in_hand(self, worker: int) -> tuple[str, ...]:
        """The files that a worker has taken and not yet accounted for."""
        return tuple(self._in_hand[worker])

    def has_for(self, worker: int, others: bool) -> bool:
        """Whether there is a file that this worker may take; `others`: whether another worker is there."""
        return any(self._waiting) or any(not others or again.not_by != worker for again in self._retries)

    def is_complete(self) -> bool:
        """Whether no file waits and none is in hand."""
        return not (any(self._waiting) or self._retries or any(self._in_hand))

    def take(self, worker: int, others: bool) -> str | None:
        """The next file for a worker: of its own, else of the worker with most left, else one to be tried again.

        What failed is left to other workers as long as there are any: the fault may be with this one's device.
        """
        file: str | None = None
        if self._waiting[worker]:
            file = self._waiting[worker].popleft()
        elif any(self._waiting):
            file = max(self._waiting, key=len).pop()
        else:
            again = next((a for a in self._retries if not others or a.not_by != worker), None)
            if again is not None:
                self._retries.remove(again)
                self._first_failures[again.file] = again.first
                file = again.file
        if file is not None:
            self._in_hand[worker].append(file)
        return file

    def put_back(self, worker: int, file: str) -> None:
        """Takes back a file that could not be handed over."""
        self._in_hand[worker].remove(file)
        self._waiting[worker].appendleft(file)

    def done(self, worker: int, file: str, result: Any) -> bool:
        """A worker finished a file. False, and nothing changes, if it did not have that file in hand."""
        if not self._take_from(worker, file):
            return False
        self.results[file] = result
        return True

    def fail(self, worker: int, failure: FailedFile) -> bool:
        """A worker says that a file cannot be processed. False if it did not have that file in hand."""
        if not self._take_from(worker, failure.file):
            return False
        self.failed.append(failure)
        return True

    def retry_or_fail(self, worker: int, reason: Reason, detail: str) -> list[str]:
        """A worker ended with files in hand: each is tried once more, and has failed if this was its second try.

        Returns those that failed for the first time.
        """
        lost, self._in_hand[worker] = self._in_hand[worker], []
        first = [file for file in lost if file not in self._first_failures]
        for file in lost:
            failure = FailedFile(file, reason, detail)
            if file in first:
                self._retries.append(_Retry(file, worker, failure))
            else:
                self.failed.append(failure)
        return first

    def give_up(self, reason: Reason, detail: str) -> None:
        """Nothing more is tried: what failed once has failed as it did, the rest for this reason."""
        self.failed.extend(again.first for again in self._retries)
        self._retries.clear()
        left = [file for files in (*self._in_hand, *self._waiting) for file in files]
        self.failed.extend(self._first_failures.get(file, FailedFile(file, reason, detail)) for file in left)
        self._in_hand = [[] for _ in self._in_hand]
        self._waiting = [deque() for _ in self._waiting]

    def _take_from(self, worker: int, file: str) -> bool:
        if file not in self._in_hand[worker]:
            log.warning("worker %d reported %s, which it does not have in hand; ignored", worker, file)
            return False
        self._in_hand[worker].remove(file)
        return True
