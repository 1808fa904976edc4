"""What runs in the certificate's worker: a few sequences through fair-esm's own model, held against what is stored.

As with `embed_worker`, nothing that is imported here imports torch before `CUDA_VISIBLE_DEVICES` is set.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from esmflow.arrays import ATTENTION, Array
from esmflow.method import Fingerprint
from esmflow.slots.gpus import Slot, use_slot
from esmflow.verify.agreement import Agreement, compare
from esmflow.verify.read_back import Embeddings, Sampled

if TYPE_CHECKING:
    from esmflow.verify.recompute import Expected

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class VerifyTask:
    """What a verification is to do. threads: of the CPU."""

    checkpoint: str
    fingerprint: Fingerprint
    sampled: tuple[Sampled, ...]
    embeddings: Embeddings
    threads: int


@dataclass(frozen=True)
class Verified:
    """What came of it, by digest.

    agreements: by output; None for a sequence that does not fit into memory here. resembles: another sequence of the
    sample whose vector is nearer than its own. before: those that an earlier run verified; their agreements are what it
    found. differ: those whose files hold something else than the store.
    """

    agreements: Mapping[str, dict[str, Agreement] | None] = field(default_factory=dict)
    resembles: Mapping[str, str] = field(default_factory=dict)
    before: frozenset[str] = frozenset()
    differ: frozenset[str] = frozenset()
    device: str = "none"
    model_load_seconds: float = 0.0
    seconds: float = 0.0


def verify_sequences(slot: Slot, task: VerifyTask) -> Verified:
    """What a worker does: computes the sampled sequences again on its slot and compares."""
    use_slot(slot)
    import torch

    from esmflow.engine.memory import keep_freed_memory

    torch.set_num_threads(task.threads)
    keep_freed_memory()
    return recompute(task, slot.device, slot.name)


def recompute(task: VerifyTask, device: str, device_name: str) -> Verified:
    """Computes the sampled sequences again on `device` (`cuda` or `cpu`) and compares. Imports torch."""
    from esmflow.verify.recompute import Recomputation

    started = time.time()
    model = Recomputation(task.checkpoint, device)
    loaded = time.time()
    reference = model.dimensions.family.reference
    log.info("model loaded on %s in %.1f seconds: %s", device_name, loaded - started, reference)
    outputs = task.fingerprint.outputs
    # Maps are large: those of one sequence at a time.
    maps = [array for array in outputs.arrays() if array.kind == ATTENTION]
    found = task.embeddings.read(task.sampled, [array for array in outputs.arrays() if array not in maps])
    agreements: dict[str, dict[str, Agreement] | None] = {record.digest: None for record in task.sampled}
    right: dict[int, Mapping[str, Expected]] = {}
    for number, expected in model.expect([s.sequence for s in task.sampled], outputs, task.fingerprint.long):
        if expected is None:
            continue
        (with_maps,) = task.embeddings.read([task.sampled[number]], maps)
        with_maps |= found[number]
        agreements[task.sampled[number].digest] = {
            name: compare(with_maps[name], values.right, values.mistakes, values.negligible)
            for name, values in expected.items()
        }
        right[number] = {name: values for name, values in expected.items() if Array.named(name).is_vector}
    resembling = _resembling(found, right).items()
    return Verified(
        agreements,
        {task.sampled[number].digest: task.sampled[other].digest for number, other in resembling},
        device=device_name,
        model_load_seconds=loaded - started,
        seconds=time.time() - started,
    )


def _resembling(
    found: Sequence[Mapping[str, np.ndarray]], right: Mapping[int, Mapping[str, Expected]]
) -> dict[int, int]:
    """For each sequence whose pooled vector is nearer to another's right one than to its own: that other's number."""
    resembles = {}
    names = next(iter(right.values()), {})
    for name in names:
        numbers = sorted(right)
        expected = np.stack([np.asarray(right[number][name].right, np.float64) for number in numbers])
        for own, number in enumerate(numbers):
            vector = np.asarray(found[number][name], np.float64)
            if vector.shape != expected[own].shape:
                continue
            nearest = int(np.linalg.norm(expected - vector, axis=1).argmin())
            if nearest != own:
                resembles[number] = numbers[nearest]
    return resembles
