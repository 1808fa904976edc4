"""GPU slots: which ones this process may use, and leasing one so that no other worker on this node has it.

The lease is a `flock` on a node-local file named after the slot. The supervisor and its worker hold the same open file,
so the slot is free exactly when both are dead: nothing goes stale, whatever is killed.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from esmflow.errors import EsmflowError

log = logging.getLogger(__name__)

DEFAULT_LOCK_FOLDER = "/tmp/esmflow-slots"
_POLL_SECONDS = 0.2
_WAITING_LOG_SECONDS = 30.0
_INDEX = re.compile(r"^\+?\d+$")
_UUID = re.compile(r"^(GPU|MIG)-[0-9A-Za-z][0-9A-Za-z/-]*$")
_INDEX = re.compile(r"^\+?\d+$")


class SlotError(EsmflowError):
    """No slot can be had. The message says what was found and what to do."""


@dataclass(frozen=True)
class Gpu:
    """One GPU, or one MIG instance of a GPU, as the driver lists it."""

    index: int
    uuid: str
    name: str
    mig_instances: tuple[Gpu, ...] = ()


@dataclass(frozen=True)
class Slot:
    """One token of `CUDA_VISIBLE_DEVICES`, resolved.

    token: as it was given (for CPU slots, `CPU-0` and so on). uuid: the driver's name of it, None without a driver.
    device: `cuda` or `cpu`.
    """

    token: str
    uuid: str | None
    name: str
    device: str

    @property
    def visible_devices(self) -> str:
        """What `CUDA_VISIBLE_DEVICES` must be for a worker on this slot: a UUID means the same GPU in any order."""
        if self.device == "cpu":
            return ""
        return self.uuid or self.token

    @property
    def lock_name(self) -> str:
        """File name of the lease: the UUID, since an index means different GPUs to different jobs."""
        return re.sub(r"[^0-9A-Za-z.-]", "_", self.uuid or self.token) + ".lock"


def driver_gpus() -> list[Gpu] | None:
    """Every GPU the NVIDIA driver lists, in its order (PCI bus), with MIG instances; None if there is no driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        return [_describe_gpu(pynvml, index) for index in range(pynvml.nvmlDeviceGetCount())]
    finally:
        pynvml.nvmlShutdown()


def _describe_gpu(pynvml: ModuleType, index: int) -> Gpu:
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    instances = []
    try:
        if pynvml.nvmlDeviceGetMigMode(handle)[0] == pynvml.NVML_DEVICE_MIG_ENABLE:
            for number in range(pynvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
                try:
                    instance = pynvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, number)
                except pynvml.NVMLError_NotFound:
                    continue
                instances.append(Gpu(index, pynvml.nvmlDeviceGetUUID(instance), pynvml.nvmlDeviceGetName(instance)))
    except pynvml.NVMLError_NotSupported:
        pass
    return Gpu(index, pynvml.nvmlDeviceGetUUID(handle), pynvml.nvmlDeviceGetName(handle), tuple(instances))


def candidate_slots(
    device: str,
    cpu_slots: int,
    environment: Mapping[str, str] = os.environ,
    list_gpus: Callable[[], list[Gpu] | None] = driver_gpus,
) -> list[Slot]:
    """The slots that this process may use, in order.

    device: `cuda`, `cpu`, or `auto`: GPUs if the driver lists any, else CPU slots.
    With `CUDA_VISIBLE_DEVICES` set, its tokens up to the first invalid one, as CUDA reads it; unset, every GPU of the
    driver by UUID (on a GPU in MIG mode, every instance). On a CPU the devices that `CUDA_VISIBLE_DEVICES` names serve
    as names of slots, so that a scheduler's allocation is kept to there as well; if it names none (unset, empty, `-1`,
    Slurm's `NoDevFiles`) there are `cpu_slots`.
    Raises SlotError when that leaves nothing.
    """
    value = environment.get("CUDA_VISIBLE_DEVICES")
    gpus = None if device == "cpu" else list_gpus()
    if device == "cuda" and not gpus:
        raise SlotError("device: cuda, but the NVIDIA driver lists no GPU here; set device: cpu, or auto")
    if value is not None and not value.strip() and device != "cpu":
        raise SlotError(
            "CUDA_VISIBLE_DEVICES is set but empty: this job was given no GPU. Ask the scheduler for one "
            "(resources: gpu=1), unset the variable, or set device: cpu"
        )
    if not gpus:
        named = (token.strip() for token in (value or "").split(","))
        tokens = _unique(token for token in named if _INDEX.match(token) or _UUID.match(token))
        return [Slot(token, None, "CPU", "cpu") for token in tokens or [f"CPU-{n}" for n in range(cpu_slots)]]
    if value is None:
        usable = [instance for gpu in gpus for instance in (gpu.mig_instances or (gpu,))]
        return [Slot(gpu.uuid, gpu.uuid, gpu.name, "cuda") for gpu in usable]
    return _visible_slots(value, gpus)


def _visible_slots(value: str, gpus: list[Gpu]) -> list[Slot]:
    """Resolves the tokens of `CUDA_VISIBLE_DEVICES` up to the first invalid one."""
    slots: dict[str, Slot] = {}
    for token in (t.strip() for t in value.split(",")):
        gpu = _resolve(token, gpus)
        if gpu is None:
            log.warning("CUDA_VISIBLE_DEVICES=%s: %r is not a GPU here; it and what follows is ignored", value, token)
            break
        # Two names of one GPU are one slot.
        slots.setdefault(gpu.uuid, Slot(token, gpu.uuid, gpu.name, "cuda"))
    if not slots:
        there = ", ".join(f"{gpu.index}: {gpu.uuid}" for gpu in gpus)
        raise SlotError(f"CUDA_VISIBLE_DEVICES={value} names no GPU of this machine, which has {there}")
    return list(slots.values())


def _resolve(token: str, gpus: list[Gpu]) -> Gpu | None:
    """The GPU or MIG instance that a token names: an index, a UUID, or the unambiguous beginning of a UUID."""
    if _INDEX.match(token):
        index = int(token)
        if index >= len(gpus):
            return None
        # CUDA uses the first instance of a GPU in MIG mode.
        return gpus[index].mig_instances[0] if gpus[index].mig_instances else gpus[index]
    if not _UUID.match(token):
        return None
    named = [unit for gpu in gpus for unit in (gpu, *gpu.mig_instances) if unit.uuid.startswith(token)]
    return named[0] if len(named) == 1 else None


def _unique(tokens: Iterable[str]) -> list[str]:
    return [token for token in dict.fromkeys(tokens) if token]


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

    def __enter__(self) -> SlotLease:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()


def lease_slot(
    candidates: list[Slot],
    *,
    lock_folder: str | os.PathLike[str] = DEFAULT_LOCK_FOLDER,
    purpose: str = "",
    wait_seconds: float = 86_400.0,
) -> SlotLease:
    """Leases the first free slot, waiting for one if none is free; logs who holds them meanwhile.

    Raises SlotError after `wait_seconds`, or when the lock folder cannot be used.
    """
    folder = Path(lock_folder)
    _make_shared(folder)
    started = time.monotonic()
    next_log = started
    while True:
        for slot in candidates:
            descriptor = _try_lock(folder / slot.lock_name)
            if descriptor is not None:
                _write_holder(descriptor, purpose)
                log.info("leased slot %s (%s)", slot.token, slot.name)
                return SlotLease(slot, descriptor)
        now = time.monotonic()
        holders = "; ".join(f"{slot.token} held by {_read_holder(folder / slot.lock_name)}" for slot in candidates)
        if now - started >= wait_seconds:
            raise SlotError(f"no GPU slot became free within {wait_seconds:.0f} seconds: {holders}")
        if now >= next_log:
            log.info("waiting for a GPU slot: %s", holders)
            next_log = now + _WAITING_LOG_SECONDS
        time.sleep(_POLL_SECONDS)


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
