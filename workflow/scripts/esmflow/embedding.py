"""One embed job: lease a slot, work through a shard group in a spawned worker, and write down what happened."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from esmflow import gpu_slots
from esmflow.checkpoints import check_unchanged
from esmflow.embed_worker import EmbedSettings, ShardResult, embed_shards
from esmflow.errors import EsmflowError
from esmflow.failures import Failure, write_failures
from esmflow.files import write_json
from esmflow.fingerprint import Fingerprint
from esmflow.gpu_slots import Slot, SlotLease
from esmflow.progress import Progress
from esmflow.segments import Store
from esmflow.shards import list_shards, read_shard, shard_name
from esmflow.workers import BatchQueueManager, FailedFile

log = logging.getLogger(__name__)


class EmbedError(EsmflowError):
    """The job must be tried again. The message says which shards failed and why."""


def embed_group(
    group: str,
    shard_folder: str | os.PathLike[str],
    run_path: str | os.PathLike[str],
    failures_path: str | os.PathLike[str],
    settings: EmbedSettings,
) -> None:
    """Embeds every shard of a group that the store does not hold yet, and writes `run.json` and the failure list.

    A group with nothing to do leases no slot and loads no model. Raises EmbedError when shards failed and attempts are
    left, SlotError when no slot can be had.
    """
    started = time.time()
    store = Store(settings.store, settings.fingerprint)
    store.create()
    shards = {str(path): shard_name(digest for digest, _ in read_shard(path)) for path in list_shards(shard_folder)}
    reused = {path for path, name in shards.items() if _is_finished(store, name, Path(path), settings)}
    waiting = [path for path in shards if path not in reused]
    log.info("group %s: %d shards, %d finished before, %d to do", group, len(shards), len(reused), len(waiting))

    worker_entry: dict[str, Any] | None = None
    results: dict[str, ShardResult] = {}
    failed: list[FailedFile] = []
    restarts = 0
    if waiting:
        # Before a slot is taken, which a job that cannot work should not keep from others.
        check_unchanged(settings.checkpoint, settings.fingerprint.checkpoint, settings.checkpoint_stamp)
        candidates = gpu_slots.candidate_slots(settings.device, settings.cpu_slots)
        lease = gpu_slots.lease_slot(
            candidates,
            lock_folder=settings.lock_folder,
            purpose=f"shard group {group}",
            wait_seconds=settings.wait_seconds,
        )
        with lease:
            leased = time.time()
            manager = BatchQueueManager(1, embed_shards)
            with Progress(f"group {group}", _residues(waiting, settings.fingerprint)) as progress:
                _, failed = manager.process_files(
                    waiting,
                    inherited=[[lease.descriptor]],
                    on_progress=progress.advance,
                    on_tick=lambda: _tick(progress, lease),
                    slot=lease.slot,
                    settings=settings,
                )
            results, restarts = manager.results, manager.restarts
            released = time.time()
        worker_entry = {"slot": _describe_slot(lease.slot), "leased": leased, "released": released}

    if failed and settings.attempt < settings.last_attempt:
        listed = "; ".join(f"{Path(f.file).name}: {f.reason} ({f.detail})" for f in failed[:5])
        raise EmbedError(
            f"group {group}: {len(failed)} of {len(shards)} shards failed on attempt {settings.attempt}: {listed}"
        )

    finished = [*reused, *results]
    failures = [failure for path in finished for failure in store.read(shards[path]).failures]
    failures += [failure for file in failed for failure in _shard_failures(file)]
    write_failures(failures_path, failures)
    write_json(
        run_path,
        {
            "group": group,
            "attempt": settings.attempt,
            "host": socket.gethostname(),
            "process": os.getpid(),
            "started": started,
            "ended": time.time(),
            "engine": settings.fingerprint.engine,
            "fingerprint": store.fingerprint,
            "workers": [worker_entry] if worker_entry else [],
            "worker_restarts": restarts,
            "segments_written": [shards[path] for path in results],
            "segments_reused": [shards[path] for path in shards if path in reused],
            "shards_failed": [{"shard": Path(f.file).name, "reason": f.reason, "detail": f.detail} for f in failed],
            "failed_sequences": len(failures),
            **_totals(results.values()),
            "shards": [{"shard": Path(path).name, **asdict(result)} for path, result in results.items()],
        },
    )


def _is_finished(store: Store, name: str, shard: Path, settings: EmbedSettings) -> bool:
    """Whether the store holds the shard's segment, and nothing in it is to be tried again.

    A failure is final for the plan that it happened under: a segment that is older than the shard's file belongs to an
    earlier plan, and what failed then may work now.
    """
    segment = store.find(name)
    if segment is None:
        return False
    if not segment.failures:
        return True
    return not settings.retry_failed and store.path(name).stat().st_mtime >= shard.stat().st_mtime


def _tick(progress: Progress, lease: SlotLease) -> None:
    progress.tick()
    lease.keep_fresh()


def _residues(shards: Iterable[str], method: Fingerprint) -> int:
    """Residues that will be embedded: what is cut off does not count, what is in two windows counts once."""
    cut = method.max_residues if method.window_overlap is None else None
    return sum(len(sequence[:cut]) for shard in shards for _, sequence in read_shard(shard))


def _shard_failures(failed: FailedFile) -> Iterable[Failure]:
    for digest, _ in read_shard(failed.file):
        yield Failure(digest.hex(), failed.reason, failed.detail)


def _describe_slot(slot: Slot) -> dict[str, Any]:
    return {**asdict(slot), "visible_devices": slot.visible_devices}


def _totals(results: Iterable[ShardResult]) -> dict[str, Any]:
    shards = list(results)
    residues = sum(shard.residues for shard in shards)
    busy = sum(shard.ended - shard.started for shard in shards)
    return {
        "sequences": sum(shard.sequences for shard in shards),
        "residues": residues,
        "residues_per_second": residues / busy if busy else None,
        "model_load_seconds": max((shard.model_load_seconds for shard in shards), default=None),
        "peak_memory_bytes": max((shard.peak_memory_bytes for shard in shards), default=None),
        "token_budget": min((shard.token_budget for shard in shards), default=None),
        "precisions": sorted({shard.precision for shard in shards}),
    }
