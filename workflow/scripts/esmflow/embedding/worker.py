"""What runs in a worker's process: shard after shard through the model on one slot.

The module is imported before `CUDA_VISIBLE_DEVICES` is set and counts towards every job's start, so it imports neither
torch nor what only planning and collecting need.
"""

from __future__ import annotations

import logging
import os
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from esmflow.embedding.run_record import ShardResult
from esmflow.embedding.settings import EmbedSettings
from esmflow.failures import Reason
from esmflow.method import Fingerprint
from esmflow.plan.shards import read_shard, shard_fingerprint, shard_name
from esmflow.slots.gpus import Slot, use_slot
from esmflow.store.segments import Store
from esmflow.workers.process import FileSubset
from esmflow.workers.queue import FailedFile

if TYPE_CHECKING:
    from esmflow.engine.engine import Engine

log = logging.getLogger(__name__)


def process_esm_files_worker(
    file_subset: FileSubset,
    device_id: int,
    toks_per_batch: int | None,
    output_dir: str,
    *,
    slots: Sequence[Slot],
    settings: EmbedSettings,
) -> tuple[list[str], list[FailedFile]]:
    """A worker: embeds shard after shard on one slot with the model loaded once, committing each as a segment.

    file_subset: shards. device_id: which of `slots` is its own. toks_per_batch: tokens in a batch on the first attempt,
    None for the engine's own choice; halved at every attempt and whenever memory runs out. output_dir: the store.
    A shard for which memory runs out, of the device or of the host, has failed and the worker goes on with half the
    budget; what is not about one shard is raised. Returns the shards processed and those failed.
    """
    fingerprint = settings.fingerprint
    slot = slots[device_id]
    file_subset.about(**use_slot(slot))
    import torch

    from esmflow.engine import load_engine
    from esmflow.engine.memory import is_out_of_memory, release_memory

    torch.set_num_threads(settings.threads)
    started = time.time()
    engine = load_engine(
        fingerprint.engine,
        settings.checkpoint,
        fingerprint.outputs,
        fingerprint.precision,
        slot.device,
    )
    load_seconds = time.time() - started
    log.info("model loaded on %s in %.1f seconds, precision %s", slot.name, load_seconds, engine.precision)
    file_subset.about(model_load_seconds=load_seconds)
    worker = _Worker(device_id, slot, engine, fingerprint, output_dir, load_seconds, file_subset.progress)
    token_budget = max(1, (toks_per_batch or engine.default_token_budget()) >> (settings.attempt - 1))
    processed, failed = [], []
    for file in file_subset:
        try:
            result = worker.embed(file, token_budget)
        except (MemoryError, RuntimeError, OSError) as error:
            if not is_out_of_memory(error):
                raise
            complaint = str(error) or "out of memory"
        else:
            token_budget = result.token_budget
            file_subset.done(file, result)
            processed.append(file)
            continue
        # Outside of the except block, where the traceback no longer keeps the failed attempt's tensors alive.
        release_memory()
        detail = f"memory ran out with {token_budget} tokens per batch: {complaint}"
        failed.append(file_subset.failed(file, Reason.OUT_OF_MEMORY, detail))
        token_budget = max(1, token_budget // 2)
    return processed, failed


@dataclass(frozen=True)
class _Worker:
    """A loaded model on its slot, and where its results go: the folder of the stores."""

    device_id: int
    slot: Slot
    engine: Engine
    fingerprint: Fingerprint
    stores: str
    load_seconds: float
    on_progress: Callable[[int], None]

    def embed(self, file: str, token_budget: int) -> ShardResult:
        """Embeds one shard and commits it."""
        from esmflow.engine.extraction import extract_esm_features

        started = time.time()
        sequences = list(read_shard(file))
        store = Store(self.stores, shard_fingerprint(file, self.fingerprint))
        outputs = store.description.outputs
        extraction = extract_esm_features(
            sequences,
            self.engine if outputs == self.engine.outputs else self.engine.with_outputs(outputs),
            token_budget,
            long=store.description.long,
            on_progress=self.on_progress,
        )
        segment = extraction.segment
        name = shard_name(digest for digest, _ in sequences)
        computed = time.time()
        store.write(name, segment)
        ended = time.time()
        return ShardResult(
            shard=os.path.basename(file),
            segment=name,
            sequences=len(segment),
            residues=int(segment.lengths.sum()),
            failures=len(segment.failures),
            token_budget=extraction.token_budget,
            precision=self.engine.precision,
            started=started,
            ended=ended,
            write_seconds=ended - computed,
            model_load_seconds=self.load_seconds,
            peak_memory_bytes=_peak_device_memory() if self.slot.device == "cuda" else _peak_host_memory(),
            peak_host_memory_bytes=_peak_host_memory(),
            worker=os.getpid(),
            device=self.device_id,
        )


def _peak_device_memory() -> int:
    import torch

    return torch.cuda.max_memory_allocated()


def _peak_host_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
