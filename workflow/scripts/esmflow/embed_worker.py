"""What runs in a worker's process: shard after shard through the model on one slot.

The module is imported before `CUDA_VISIBLE_DEVICES` is set and counts towards every job's start, so it imports neither
torch nor what only planning and collecting need.
"""

from __future__ import annotations

import logging
import os
import resource
import sys
import time
from dataclasses import dataclass

from esmflow.engine import Outputs
from esmflow.engines import load_engine
from esmflow.fingerprint import Fingerprint
from esmflow.gpu_slots import Slot
from esmflow.logs import add_log_file
from esmflow.segments import Store
from esmflow.shards import read_shard, shard_name
from esmflow.workers import FileSubset

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EmbedSettings:
    """What an embed job needs to know besides its shards.

    checkpoint_stamp: see `checkpoints.file_stamp`.
    batch_tokens: tokens in a batch on the first attempt, None for the engine's own choice; halved at every attempt.
    attempt, last_attempt: counted from 1. On the last attempt shards that fail are recorded instead of raised.
    retry_failed: compute finished shards again if any of their sequences failed.
    """

    checkpoint: str
    checkpoint_stamp: list[int]
    fingerprint: Fingerprint
    store: str
    batch_tokens: int | None
    device: str
    cpu_slots: int
    lock_folder: str
    wait_seconds: float
    threads: int
    attempt: int
    last_attempt: int
    retry_failed: bool
    log_file: str

    @property
    def outputs(self) -> Outputs:
        """What to compute."""
        return Outputs(self.fingerprint.layers, self.fingerprint.include)


@dataclass(frozen=True)
class ShardResult:
    """What a worker reports of one finished shard. Times are seconds since 1970, with writing at the end."""

    segment: str
    sequences: int
    residues: int
    failures: int
    token_budget: int
    precision: str
    started: float
    ended: float
    write_seconds: float
    model_load_seconds: float
    peak_memory_bytes: int
    worker: int


def embed_shards(file_subset: FileSubset, device_id: int, *, slot: Slot, settings: EmbedSettings) -> None:
    """A worker: embeds shard after shard on one slot with the model loaded once, committing each as a segment."""
    add_log_file(settings.log_file)
    # CUDA reads this once, when torch first asks for a device: nothing may have imported torch before.
    if "torch" in sys.modules:
        raise RuntimeError("torch was imported before CUDA_VISIBLE_DEVICES was set")
    os.environ["CUDA_VISIBLE_DEVICES"] = slot.visible_devices
    import torch

    from esmflow.extraction import extract_esm_features

    torch.set_num_threads(settings.threads)
    started = time.time()
    method = settings.fingerprint
    engine = load_engine(
        method.engine,
        settings.checkpoint,
        settings.outputs,
        method.precision,
        slot.device,
        method.per_residue_precision or "fp32",
    )
    load_seconds = time.time() - started
    log.info("model loaded on %s in %.1f seconds, precision %s", slot.name, load_seconds, engine.precision)
    store = Store(settings.store, settings.fingerprint)
    budget = settings.batch_tokens or engine.default_token_budget()
    budget = max(1, budget >> (settings.attempt - 1))
    for file in file_subset:
        started = time.time()
        sequences = list(read_shard(file))
        extraction = extract_esm_features(
            sequences,
            engine,
            budget,
            max_residues=method.max_residues,
            window_overlap=method.window_overlap,
            on_progress=file_subset.progress,
        )
        budget = extraction.token_budget
        segment = extraction.segment
        name = shard_name(digest for digest, _ in sequences)
        computed = time.time()
        store.write(name, segment)
        ended = time.time()
        peak = torch.cuda.max_memory_allocated() if slot.device == "cuda" else _peak_host_memory()
        file_subset.done(
            file,
            ShardResult(
                segment=name,
                sequences=len(segment),
                residues=int(segment.lengths.sum()),
                failures=len(segment.failures),
                token_budget=budget,
                precision=engine.precision,
                started=started,
                ended=ended,
                write_seconds=ended - computed,
                model_load_seconds=load_seconds,
                peak_memory_bytes=peak,
                worker=os.getpid(),
            ),
        )


def _peak_host_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
