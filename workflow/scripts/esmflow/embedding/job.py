"""One embed job: lease its slots, work through a shard group in spawned workers, and write down what happened."""

from __future__ import annotations

import logging
import os
import resource
import socket
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from esmflow.checkpoint.file import check_unchanged
from esmflow.embedding.heartbeat import Heartbeat, State
from esmflow.embedding.progress import Progress
from esmflow.embedding.run_record import FailedShard, LeasedSlot, RunRecord, ShardResult, Speed, WorkerRecord
from esmflow.embedding.settings import EmbedSettings
from esmflow.embedding.status import status_path
from esmflow.embedding.worker import process_esm_files_worker
from esmflow.errors import EsmflowError
from esmflow.failures import Failure, write_failures
from esmflow.method import Fingerprint
from esmflow.plan.shards import list_shards, read_shard, shard_fingerprint, shard_name
from esmflow.slots.gpus import Slot, candidate_slots
from esmflow.slots.leases import SlotLease, check_enough, leased_slots
from esmflow.store.segments import Store
from esmflow.workers.lifetime import Terminated, when_terminated
from esmflow.workers.manager import BatchQueueManager
from esmflow.workers.queue import FailedFile

log = logging.getLogger(__name__)


class EmbedError(EsmflowError):
    """The job must be tried again. The message says which shards failed and why."""


def workers_to_use(gpus_per_job: int, given: int) -> int:
    """How many GPUs a job may use: Snakemake clamps what a job asks for, silently, to what the run was given."""
    if given < gpus_per_job:
        log.warning("gpus_per_job is %d, but the run was given --resources gpu=%d: using that", gpus_per_job, given)
    # A run on CPUs may well say gpu=0.
    return max(1, min(gpus_per_job, given))


def embed_group(settings: EmbedSettings) -> None:
    """Embeds every shard of a group that the store does not hold yet, and writes `run.json` and the failure list.

    A group with nothing to do leases no slot and loads no model. Raises EmbedError when shards failed and attempts are
    left, SlotError when no slot can be had, Terminated after SIGTERM when shards are left.
    """
    status = status_path(settings.run, settings.group)
    with Heartbeat(status, settings.group, settings.log_file, settings.attempt, settings.last_attempt) as heartbeat:
        _embed_group(settings, heartbeat)


def _embed_group(settings: EmbedSettings, heartbeat: Heartbeat) -> None:
    group = settings.group
    started = time.time()
    store = Store(settings.store, settings.fingerprint)
    store.create()
    shards: dict[str, str] = {}
    stores: dict[str, Store] = {}
    reused: set[str] = set()
    for path in list_shards(settings.shards):
        digests = {digest for digest, _ in read_shard(path)}
        shards[str(path)] = name = shard_name(digests)
        stores[str(path)] = Store(settings.store, shard_fingerprint(path, settings.fingerprint))
        stores[str(path)].create()
        if _is_finished(stores[str(path)], name, digests, path, settings):
            reused.add(str(path))
    # What is computed for variants is found by its digests; segments are counted on for embeddings.
    embedded = {path for path in shards if stores[path].fingerprint == store.fingerprint}
    waiting = [path for path in shards if path not in reused]
    log.info("group %s: %d shards, %d finished before, %d to do", group, len(shards), len(reused), len(waiting))
    heartbeat.tell(State.STARTING, shards=len(waiting), shards_reused=len(reused))

    work = _Work()
    if waiting:
        # Before a slot is taken, which a job that cannot work should not keep from others.
        check_unchanged(settings.checkpoint, settings.fingerprint.checkpoint, settings.checkpoint_stamp)
        work = _work_through(waiting, settings, heartbeat)
    failed, results = work.failed, work.results

    if failed and settings.attempt < settings.last_attempt:
        listed = "; ".join(f"{Path(f.file).name}: {f.reason} ({f.detail})" for f in failed[:5])
        raise EmbedError(
            f"group {group}: {len(failed)} of {len(shards)} shards failed on attempt {settings.attempt}: {listed}"
        )

    finished = [*reused, *results]
    failures = [failure for path in finished for failure in stores[path].read(shards[path]).failures]
    failures += [failure for file in failed for failure in _shard_failures(file)]
    write_failures(settings.failures, failures)
    done, ended = list(results.values()), time.time()
    speed = Speed.of([(done, started, ended)])
    if speed.while_embedding:
        log.info(
            "group %s: %s residues, %s residues/s while embedding, %s with start-up",
            *(group, f"{speed.residues:,}", f"{speed.while_embedding:,.0f}", f"{speed.with_start_up:,.0f}"),
        )
    RunRecord(
        group=group,
        attempt=settings.attempt,
        host=socket.gethostname(),
        process=os.getpid(),
        started=started,
        ended=ended,
        engine=settings.fingerprint.engine,
        fingerprint=store.fingerprint,
        workers=work.workers,
        worker_restarts=work.restarts,
        segments_written=tuple(shards[path] for path in results if path in embedded),
        segments_reused=tuple(shards[path] for path in shards if path in reused & embedded),
        shards_failed=tuple(FailedShard(Path(f.file).name, f.reason, f.detail) for f in failed),
        failed_sequences=len(failures),
        sequences=sum(shard.sequences for shard in done),
        residues=speed.residues,
        residues_per_second=speed.while_embedding,
        residues_per_second_with_start_up=speed.with_start_up,
        model_load_seconds=max((shard.model_load_seconds for shard in done), default=None),
        peak_memory_bytes=max((shard.peak_memory_bytes for shard in done), default=None),
        peak_host_memory_bytes=max((shard.peak_host_memory_bytes for shard in done), default=None),
        token_budget=min((shard.token_budget for shard in done), default=None),
        precisions=tuple(sorted({shard.precision for shard in done})),
        job_memory_bytes=_job_memory(done),
        shards=tuple(done),
    ).write(settings.run)


@dataclass
class _Work:
    """What came of the shards that were not finished before."""

    results: dict[str, ShardResult] = field(default_factory=dict)
    failed: list[FailedFile] = field(default_factory=list)
    workers: tuple[WorkerRecord, ...] = ()
    restarts: int = 0


def _work_through(waiting: Sequence[str], settings: EmbedSettings, heartbeat: Heartbeat) -> _Work:
    """Leases a slot for each worker and lets them work. Raises Terminated, with the slots free, after SIGTERM."""
    group = settings.group
    candidates = candidate_slots(settings.slots.device, settings.slots.cpu_slots)
    check_enough(candidates, settings.workers)
    # A worker without a shard would load the model for nothing.
    workers = min(settings.workers, len(waiting))
    residues = _residues(waiting, settings.fingerprint)
    heartbeat.tell(State.QUEUED, residues=residues)
    with leased_slots(
        candidates,
        workers,
        lock_folder=settings.slots.lock_folder,
        purpose=f"shard group {group}",
        wait_seconds=settings.slots.wait_seconds,
    ) as leases:
        leased = time.time()
        manager = BatchQueueManager(workers, process_esm_files_worker)
        with (
            Progress(f"group {group}", residues) as progress,
            when_terminated(lambda: manager.stop(settings.grace_seconds)),
        ):
            heartbeat.tell(State.LOADING, slots=tuple(lease.slot.token for lease in leases))
            heartbeat.observe(lambda: _observed(manager, progress))
            _, failed = manager.process_files(
                [waiting[number::workers] for number in range(workers)],
                inherited=[[lease.descriptor] for lease in leases],
                log_file=settings.log_file,
                hang_seconds=settings.hang_seconds,
                on_progress=progress.advance,
                on_tick=lambda: _tick(progress, leases),
                toks_per_batch=settings.token_budget,
                output_dir=settings.store,
                slots=[lease.slot for lease in leases],
                settings=settings,
            )
        slots = [lease.slot for lease in leases]
    released = time.time()
    # When everything was finished in time, there is nothing to end for.
    if manager.stopped and failed:
        raise Terminated(
            f"group {group}: asked to end (SIGTERM); {len(manager.results)} of {len(waiting)} shards were finished and "
            "are kept, the same command again does the rest"
        )
    records = tuple(
        _worker_record(slot, leased, released, record)
        for slot, record in zip(slots, manager.worker_records(), strict=True)
    )
    return _Work(manager.results, failed, records, manager.restarts)


def _observed(manager: BatchQueueManager, progress: Progress) -> dict[str, Any]:
    """What the status tells of a job at work."""
    results = list(manager.results.values())
    records = manager.worker_records()
    # A worker says how long it took to load its model when it has.
    loaded = any("model_load_seconds" in record for record in records)
    return {
        "state": State.EMBEDDING if loaded else State.LOADING,
        "residues_done": progress.done,
        "shards_done": len(results),
        "failed_sequences": sum(result.failures for result in results),
        "failed_shards": len(manager.failed),
        "worker_deaths": sum(len(record["exits"]) for record in records),
    }


def _worker_record(slot: Slot, leased: float, released: float, record: dict[str, Any]) -> WorkerRecord:
    """A worker as `run.json` has it, with shards by their names."""
    exits = tuple(replace(death, in_hand=tuple(Path(f).name for f in death.in_hand)) for death in record["exits"])
    described = LeasedSlot(**asdict(slot), visible_devices=slot.visible_devices)
    return WorkerRecord(described, leased, released, **{**record, "exits": exits})


def _is_finished(store: Store, name: str, digests: set[bytes], shard: Path, settings: EmbedSettings) -> bool:
    """Whether the store holds the segment of a shard with these sequences, and nothing in it is to be tried again.

    A failure is final for the plan that it happened under: a segment that is older than the shard's file belongs to an
    earlier plan, and what failed then may work now.
    """
    segment = store.find(name, check=True, of=digests)
    if segment is None:
        return False
    if not segment.failures:
        return True
    return not settings.retry_failed and store.path(name).stat().st_mtime >= shard.stat().st_mtime


def _tick(progress: Progress, leases: Sequence[SlotLease]) -> None:
    progress.tick()
    for lease in leases:
        lease.keep()


def _residues(shards: Iterable[str], method: Fingerprint) -> int:
    """Residues that will be embedded: what is cut off does not count, what is in two windows counts once."""
    long = {shard: shard_fingerprint(shard, method).long for shard in shards}
    return sum(cut.embedded(len(sequence)) for shard, cut in long.items() for _, sequence in read_shard(shard))


def _shard_failures(failed: FailedFile) -> Iterable[Failure]:
    for digest, _ in read_shard(failed.file):
        yield Failure(digest.hex(), failed.reason, failed.detail)


def _job_memory(shards: Iterable[ShardResult]) -> int:
    """Host memory of this process and of one process in each worker's place, each at its own peak."""
    peaks: dict[int, int] = {}
    for shard in shards:
        peaks[shard.device] = max(peaks.get(shard.device, 0), shard.peak_host_memory_bytes)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 + sum(peaks.values())
