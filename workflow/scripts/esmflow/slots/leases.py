"""Leasing GPU slots, so that no other worker on this node has them.

A lease is a `flock` on a node-local file named after the slot. The supervisor and its worker hold the same open file,
so the slot is free exactly when both are dead: nothing goes stale, whatever is killed.

The folder is everybody's, so what is found there is trusted with nothing: no link is followed, nothing is written to,
or made readable in, a file that is not this user's alone.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import random
import socket
import stat
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from esmflow.slots.gpus import Slot, SlotError
from esmflow.text import shown

log = logging.getLogger(__name__)

DEFAULT_LOCK_FOLDER = "/tmp/esmflow-slots"
_POLL_SECONDS = 0.2
_MODE_SECONDS = 0.05
_HOLDER_BYTES = 4096
_WAITING_LOG_SECONDS = 30.0


class SlotTimeoutError(SlotError):
    """Others held all slots for longer than a job was to wait."""

    mendable = True


@dataclass(frozen=True)
class SlotSettings:
    """Which slots a job may lease, and how it waits for them.

    device: `auto`, `cuda` or `cpu`. cpu_slots: how many there are on a machine without a GPU, None for one on each
    core. lock_folder: local to the node, and one for all jobs on it. wait_seconds: after so long in vain the wait is an
    error.
    """

    device: str
    cpu_slots: int | None
    lock_folder: str
    wait_seconds: float


class SlotLease:
    """One leased slot. `descriptor` is the open lock file: whoever holds it, or inherits it, holds the slot."""

    def __init__(self, slot: Slot, path: Path, descriptor: int, purpose: str) -> None:
        self.slot = slot
        self.descriptor = descriptor
        self._path = path
        self._purpose = purpose
        # More than one after the file was removed and made again.
        self._descriptors = [descriptor]
        self._warned = False

    def release(self) -> None:
        """Gives the slot back as far as this process is concerned; a live worker that inherited it still holds it."""
        while self._descriptors:
            os.close(self._descriptors.pop())
        self.descriptor = -1

    def keep(self) -> None:
        """Keeps the lock file young, so that cleaners of old files leave it alone; called about once a second.

        If it was removed all the same, makes and locks it again and says so. Between the two another job may have
        leased the slot, which cannot be undone: that is said once. Nothing that becomes of the file ends the job.
        """
        descriptor = self._descriptors[-1]
        try:
            os.utime(descriptor)
        except OSError:
            # Another user's, most often. Reading is all that is allowed, and shows in its time of access.
            with suppress(OSError):
                os.pread(descriptor, 1, 0)
        if _is_at(self._path, descriptor):
            return
        try:
            _make_shared(self._path.parent)
            again = _try_lock(self._path)
            problem = "" if again is not None else f"another job has leased the slot too: {_read_holder(self._path)}"
        except SlotError as error:
            again, problem = None, str(error)
        if again is not None:
            log.warning("the lock file of slot %s was removed under way: %s is made again", self.slot.token, self._path)
            _write_holder(again, self._purpose)
            self._descriptors.append(again)
        elif not self._warned:
            self._warned = True
            log.warning("the lock file of slot %s was removed under way; %s", self.slot.token, problem)


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
            raise SlotTimeoutError(f"{what} free within {wait_seconds:.0f} seconds: {holders}")
        if now >= next_log:
            log.info("waiting for %s: %s", "a GPU slot" if count == 1 else f"{count} GPU slots at once", holders)
            next_log = now + _WAITING_LOG_SECONDS
        # At random, so that two jobs that took half each do not meet again at their next try.
        time.sleep(_POLL_SECONDS * random.uniform(0.5, 1.5))


def _try_lease(candidates: list[Slot], count: int, folder: Path, purpose: str) -> list[SlotLease] | None:
    """The first free slots, or None, with nothing held, if there are fewer than `count`."""
    # At every try, as somebody may have removed it since the last one.
    _make_shared(folder)
    leases: list[SlotLease] = []
    try:
        for slot in candidates:
            path = folder / slot.lock_name
            descriptor = _try_lock(path)
            if descriptor is not None:
                leases.append(SlotLease(slot, path, descriptor, purpose))
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
    """Makes the lock folder if it is not there, open to every user: two users' jobs must not share a GPU either.

    The mode of a folder that was there is left as it is.
    """
    try:
        if folder.is_symlink():
            raise SlotError(f"slot_lock_folder: {folder} is a link, which anybody may have put there; name a folder")
        if folder.is_dir():
            return
        for parent in reversed([parent for parent in folder.parents if not parent.exists()]):
            _make_folder(parent, 0o755)
        _make_folder(folder, 0o1777)
    except OSError as error:
        raise SlotError(
            f"slot_lock_folder: {folder} cannot be used ({error}); name a folder local to each node"
        ) from error


def _make_folder(folder: Path, mode: int) -> None:
    try:
        folder.mkdir()
    except FileExistsError:
        # Another job was quicker.
        if not folder.is_dir():
            raise
        return
    # Whatever the umask of this user.
    folder.chmod(mode)


def _try_lock(path: Path) -> int | None:
    """Opens and locks one lock file; None if another process holds it."""
    try:
        descriptor = _open_lock_file(path)
    except FileNotFoundError:
        # The folder was removed a moment ago; the next try makes it again.
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError as error:
        os.close(descriptor)
        raise SlotError(
            f"slot_lock_folder: {path} cannot be locked ({error}); name a folder local to each node, on a file system "
            "with locks"
        ) from error
    # A cleaner may have removed the file between opening and locking: then the lock is on a file nobody else sees.
    if _is_at(path, descriptor):
        return descriptor
    os.close(descriptor)
    return None


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether an open file is the one that is found under a path now."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except OSError:
        return False


def _open_lock_file(path: Path) -> int:
    """Opens a lock file, or makes it.

    Raises SlotError if it is none or cannot be opened, FileNotFoundError if its folder is gone.
    """
    # Without waiting for the other end if it is a pipe.
    safely = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    # Another user's file can be opened for reading only, which is enough to lock it; creating comes second because
    # Linux refuses O_CREAT on another user's file in a sticky folder (fs.protected_regular).
    for number, flags in enumerate((os.O_RDWR, os.O_RDONLY, os.O_RDWR | os.O_CREAT | os.O_EXCL, os.O_RDONLY)):
        if number == 3:
            # Another user makes it at this moment, and has not yet given it its mode.
            time.sleep(_MODE_SECONDS)
        try:
            descriptor = os.open(path, flags | safely, 0o644)
            break
        except OSError as error:
            if flags & os.O_CREAT or not isinstance(error, FileNotFoundError):
                last = error
    else:
        if isinstance(last, FileNotFoundError):
            raise last
        if not os.path.lexists(path):
            raise SlotError(
                f"slot_lock_folder: no lock file can be made in {path.parent} ({last}); name a folder local to each "
                "node in which every user may write"
            )
        raise SlotError(f"{path} cannot be opened as a lock file ({last}); ask its owner to remove it")
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise SlotError(f"{path} cannot be a lock file, since it is no regular file; ask its owner to remove it")
    if _is_ours_alone(status) and stat.S_IMODE(status.st_mode) != 0o644:
        # A umask may have made it private, and the next user could not open it, ever.
        os.fchmod(descriptor, 0o644)
    return descriptor


def _is_ours_alone(status: os.stat_result) -> bool:
    """Whether a file is this user's, and is no other file of theirs under a second name (a hard link)."""
    return status.st_uid == os.geteuid() and status.st_nlink == 1


def _write_holder(descriptor: int, purpose: str) -> None:
    """Writes down who holds a slot, for those who wait, if the file is this user's."""
    if not _is_ours_alone(os.fstat(descriptor)):
        return
    holder = {"pid": os.getpid(), "host": socket.gethostname(), "purpose": purpose, "since": time.time()}
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(holder).encode(), 0)
    except OSError:
        # Only a help to whoever waits; the disk may be full.
        pass


def _read_holder(path: Path) -> str:
    """Who holds a slot, as the holder wrote it down, if it could."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as handle:
            holder = json.loads(handle.read(_HOLDER_BYTES))
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(holder["since"]))
        # Whoever waits sees it on a terminal, which would obey what another user's job put there.
        return shown(f"process {holder['pid']} on {holder['host']} ({holder['purpose']}) since {since}")
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return "an unknown process"
