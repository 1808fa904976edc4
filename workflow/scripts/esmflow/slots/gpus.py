"""GPU slots: which ones this process may use. `esmflow.slots.leases` leases them."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import ModuleType

from esmflow.errors import EsmflowError
from esmflow.slots.cuda_order import cuda_order

log = logging.getLogger(__name__)

_INDEX = re.compile(r"^\+?\d+$")
_UUID = re.compile(r"^(GPU|MIG)-[0-9A-Za-z][0-9A-Za-z/-]*$")


class SlotError(EsmflowError):
    """No slot can be had. The message says what was found and what to do."""

    mendable = False


@dataclass(frozen=True)
class Gpu:
    """One GPU, or one MIG instance of a GPU, as the driver lists it."""

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


def use_slot(slot: Slot) -> dict[str, str | None]:
    """Makes this process, a worker, see no other GPU than its slot's. Imports torch.

    Returns what it then sees, for its record: `visible_devices`, and `seen_uuid`, which torch tells of a GPU. Raises
    RuntimeError if torch has been imported already, as CUDA reads `CUDA_VISIBLE_DEVICES` once, and SlotError if it is
    another GPU than the one leased.
    """
    if "torch" in sys.modules:
        raise RuntimeError("torch was imported before CUDA_VISIBLE_DEVICES was set")
    os.environ["CUDA_VISIBLE_DEVICES"] = slot.visible_devices
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    seen = f"GPU-{torch.cuda.get_device_properties(0).uuid}" if slot.device == "cuda" else None
    # Of a MIG instance torch tells no UUID that could be compared.
    other = seen is not None and slot.uuid is not None and slot.uuid.startswith("GPU-") and seen != slot.uuid
    if visible != slot.visible_devices or other:
        raise SlotError(
            f"slot {slot.token} ({slot.uuid}) was leased, but this worker sees another GPU: {seen}, with "
            f"CUDA_VISIBLE_DEVICES={visible}"
        )
    return {"visible_devices": visible, "seen_uuid": seen}


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
                instances.append(Gpu(pynvml.nvmlDeviceGetUUID(instance), pynvml.nvmlDeviceGetName(instance)))
    except pynvml.NVMLError_NotSupported:
        pass
    return Gpu(pynvml.nvmlDeviceGetUUID(handle), pynvml.nvmlDeviceGetName(handle), tuple(instances))


def candidate_slots(
    device: str,
    cpu_slots: int | None,
    environment: Mapping[str, str] = os.environ,
    list_gpus: Callable[[], list[Gpu] | None] = driver_gpus,
    order: Callable[[Mapping[str, str]], list[str] | None] = cuda_order,
) -> list[Slot]:
    """The slots that this process may use, in order.

    device: `cuda`, `cpu`, or `auto`: GPUs if the driver lists any, else CPU slots.
    With `CUDA_VISIBLE_DEVICES` set, its tokens up to the first invalid one, as CUDA reads it (an index counts in
    CUDA's order, see `order`, or in the driver's with CUDA_DEVICE_ORDER=PCI_BUS_ID); unset, every GPU of the
    driver by UUID (on a GPU in MIG mode, every instance). On a CPU the devices that `CUDA_VISIBLE_DEVICES` names serve
    as names of slots, so that a scheduler's allocation is kept to there as well; if it names none (unset, empty, `-1`,
    Slurm's `NoDevFiles`) there are `cpu_slots`, or if that is None as many as the machine has cores.
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
        return [Slot(token, None, "CPU", "cpu") for token in tokens or _cpu_tokens(cpu_slots)]
    if value is None:
        usable = [instance for gpu in gpus for instance in (gpu.mig_instances or (gpu,))]
        return [Slot(gpu.uuid, gpu.uuid, gpu.name, "cuda") for gpu in usable]
    if any(_INDEX.match(token.strip()) for token in value.split(",")):
        gpus = _as_cuda_counts(gpus, environment, order)
    return _visible_slots(value, gpus)


def _cpu_tokens(cpu_slots: int | None) -> list[str]:
    return [f"CPU-{number}" for number in range(cpu_slots or os.cpu_count() or 1)]


def _as_cuda_counts(
    gpus: list[Gpu], environment: Mapping[str, str], order: Callable[[Mapping[str, str]], list[str] | None]
) -> list[Gpu]:
    """The GPUs in the order in which CUDA numbers them."""
    # With MIG, CUDA lists one instance only, which tells no order.
    if len(gpus) < 2 or environment.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID" or any(gpu.mig_instances for gpu in gpus):
        return gpus
    by_uuid = {gpu.uuid: gpu for gpu in gpus}
    ordered = order(environment)
    if ordered is not None and sorted(ordered) == sorted(by_uuid):
        return [by_uuid[uuid] for uuid in ordered]
    if len({gpu.name for gpu in gpus}) > 1:
        log.warning(
            "CUDA_VISIBLE_DEVICES has indexes, the GPUs are unlike, and CUDA does not tell how it numbers them: taken "
            "in the order of the PCI bus. Set CUDA_DEVICE_ORDER=PCI_BUS_ID, or name GPUs by UUID, to be sure"
        )
    return gpus


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
        there = ", ".join(f"{index}: {gpu.uuid}" for index, gpu in enumerate(gpus))
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
