"""Leasing GPU slots, so that no other worker on this node has them.

A lease is a `flock` on a node-local file named after the slot. The supervisor and its worker hold the same open file,
so the slot is free exactly when both are dead: nothing goes stale, whatever is killed.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import random
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from esmflow.slots.gpus import Slot, SlotError

log = logging.getLogger(__name__)

DEFAULT_LOCK_FOLDER = "/tmp/esmflow-slots"
_POLL_SECONDS = 0.2
_WAITING_LOG_SECONDS = 30.0


@dataclass(frozen=True)
class SlotSettings:
    """Which slots a job may lease, and how it waits for them.

    device: `auto`, `cuda` or `cpu`. cpu_slots: how many there are on a machine without a GPU. lock_folder: local to the
    node, and one for all jobs on it. wait_seconds: after so long in vain the wait is an error.
    """

    device: str
    cpu_slots: int
    lock_folder: str
    wait_seconds: float


class SlotLease:
    """One leased slot. `descriptor` is the open lock file: whoever holds it, or inherits it, holds the slot."""

    def __init__(self, slot: Slot, descriptor: int) -> None:
        self.slot = slot
        self.descriptor = descriptor

    def release(self) -> None:
        """Gives the slot back as far as this process is concerned; a live worker that inherited it still holds it."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def keep_fresh(self) -> None:
        """Updates the lock file's time, so that cleaners of old temporary files leave it alone."""
        os.utime(self.descriptor)


@contextmanager
def leased_slots(
    candidates: list[Slot],
    count: int = 1,
    *,
    lock_folder: str | os.PathLike[str] = DEFAULT_LOCK_FOLDER,
    purpose: str = "",
    wait_seconds: float = 86_400.0,
) -> Iterator[list[SlotLease]]:
    """The first `count` free slots, leased for the block; waits until so many are free and logs who holds them.

    All of them or none: a job that waits holds nothing, so two jobs can never wait for one another's half.
    Raises SlotError when there are fewer candidates, after `wait_seconds`, or when the lock folder cannot be used.
    """
    check_enough(candidates, count)
    leases = _wait_for(candidates, count, Path(lock_folder), purpose, wait_seconds)
    try:
        yield leases
    finally:
        _release_all(leases)


def check_enough(candidates: list[Slot], count: int) -> None:
    """Raises SlotError if there are fewer slots than one job is to lease: waiting would not help."""
    if count > len(candidates):
        raise SlotError(
            f"gpus_per_job: one job is to lease {count} slots, and there are {len(candidates)} here "
            f"({', '.join(slot.token for slot in candidates)}); lower gpus_per_job, or give the job more GPUs"
        )


def _wait_for(candidates: list[Slot], count: int, folder: Path, purpose: str, wait_seconds: float) -> list[SlotLease]:
    _make_shared(folder)
    started = time.monotonic()
    next_log = started
    while True:
        leases = _try_lease(candidates, count, folder, purpose)
        if leases is not None:
            for lease in leases:
                log.info("leased slot %s (%s)", lease.slot.token, lease.slot.name)
            return leases
        now = time.monotonic()
        holders = "; ".join(f"{slot.token} held by {_read_holder(folder / slot.lock_name)}" for slot in candidates)
        if now - started >= wait_seconds:
            what = "no GPU slot became" if count == 1 else f"there were never {count} GPU slots"
            raise SlotError(f"{what} free within {wait_seconds:.0f} seconds: {holders}")
        if now >= next_log:
            log.info("waiting for %s: %s", "a GPU slot" if count == 1 else f"{count} GPU slots at once", holders)
            next_log = now + _WAITING_LOG_SECONDS
        # At random, so that two jobs that took half each do not meet again at their next try.
        time.sleep(_POLL_SECONDS * random.uniform(0.5, 1.5))


def _try_lease(candidates: list[Slot], count: int, folder: Path, purpose: str) -> list[SlotLease] | None:
    """The first free slots, or None, with nothing held, if there are fewer than `count`."""
    leases: list[SlotLease] = []
    try:
        for slot in candidates:
            descriptor = _try_lock(folder / slot.lock_name)
            if descriptor is not None:
                leases.append(SlotLease(slot, descriptor))
            if len(leases) == count:
                for lease in leases:
                    _write_holder(lease.descriptor, purpose)
                return leases
    except BaseException:
        _release_all(leases)
        raise
    _release_all(leases)
    return None


def _release_all(leases: Iterable[SlotLease]) -> None:
    for lease in leases:
        lease.release()


def _make_shared(folder: Path) -> None:
    """Makes the lock folder, open to every user of the node, as two users' jobs must not share a GPU either."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if folder.stat().st_uid == os.getuid():
            folder.chmod(0o1777)
    except OSError as error:
        raise SlotError(
            f"slot_lock_folder: {folder} cannot be used ({error}); name a folder local to each node"
        ) from error


def _try_lock(path: Path) -> int | None:
    """Opens and locks one lock file; None if another process holds it."""
    descriptor = _open_lock_file(path)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # A cleaner may have removed the file between opening and locking: then the lock is on a file nobody else sees.
        if os.fstat(descriptor).st_ino == path.stat().st_ino:
            return descriptor
    except BlockingIOError:
        pass
    except FileNotFoundError:
        pass
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def _open_lock_file(path: Path) -> int:
    # Another user's file can be opened for reading only, which is enough to lock it; creating comes second because
    # Linux refuses O_CREAT on another user's file in a sticky folder (fs.protected_regular).
    for flags in (os.O_RDWR, os.O_RDONLY, os.O_RDWR | os.O_CREAT):
        try:
            return os.open(path, flags | os.O_CLOEXEC, 0o644)
        except (PermissionError, FileNotFoundError) as error:
            last = error
    raise SlotError(f"{path} cannot be opened: {last}")


def _write_holder(descriptor: int, purpose: str) -> None:
    holder = {"pid": os.getpid(), "host": socket.gethostname(), "purpose": purpose, "since": time.time()}
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(holder).encode(), 0)
    except OSError:
        # Only a help to whoever waits; a file of another user's cannot be written.
        pass


def _read_holder(path: Path) -> str:
    try:
        holder = json.loads(path.read_text())
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(holder["since"]))
        return f"process {holder['pid']} on {holder['host']} ({holder['purpose']}) since {since}"
    except (OSError, ValueError, KeyError):
        return "an unknown process"
