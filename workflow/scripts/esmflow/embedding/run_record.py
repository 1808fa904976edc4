"""`run.json`: what an embed job did, written by it when it ends and read by every step after it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from esmflow.files import JsonFile
from esmflow.workers.worker import WorkerExit


@dataclass(frozen=True)
class LeasedSlot:
    """The slot that a worker had: a `Slot`, with what `CUDA_VISIBLE_DEVICES` was for it."""

    token: str
    uuid: str | None = None
    name: str = ""
    device: str = ""
    visible_devices: str = ""


@dataclass(frozen=True)
class WorkerRecord:
    """One worker, whose number in its job is `device`. Times are seconds since 1970.

    processed: shards. exits: how its processes ended before their time; their files are shards by name.
    visible_devices, seen_uuid: what its process found in CUDA_VISIBLE_DEVICES, and the GPU that torch saw, None on a
    CPU: those of the slot, or it would not have worked. model_load_seconds: None if it never loaded the model.
    """

    slot: LeasedSlot
    leased: float
    released: float
    device: int = 0
    status: str = ""
    processed: int = 0
    ended: float | None = None
    exits: tuple[WorkerExit, ...] = ()
    visible_devices: str | None = None
    seen_uuid: str | None = None
    model_load_seconds: float | None = None


@dataclass(frozen=True)
class FailedShard:
    """A shard that was given up."""

    shard: str
    reason: str
    detail: str


@dataclass(frozen=True)
class ShardResult:
    """What a worker reports of one finished shard. Times are seconds since 1970, with writing at the end.

    peak_memory_bytes: of the GPU, on a CPU of the host. worker: the process; device: the worker's number in its job.
    """

    shard: str
    segment: str
    sequences: int
    residues: int
    failures: int
    token_budget: int
    precision: str
    started: float
    ended: float
    write_seconds: float = 0.0
    model_load_seconds: float = 0.0
    peak_memory_bytes: int = 0
    peak_host_memory_bytes: int = 0
    worker: int = 0
    device: int = 0


@dataclass(frozen=True, kw_only=True)
class RunRecord(JsonFile):
    """What one embed job did with its shard group. Times are seconds since 1970, memory is in bytes at its peak.

    sequences, residues: computed by this job, not those of reused segments. residues_per_second: while embedding, see
    `Speed`. token_budget: the smallest that was left. What only a finished shard can tell is None without one.
    """

    group: str
    attempt: int = 1
    host: str = ""
    process: int = 0
    started: float = 0.0
    ended: float = 0.0
    engine: str = ""
    fingerprint: str = ""
    workers: tuple[WorkerRecord, ...] = ()
    worker_restarts: int = 0
    segments_written: tuple[str, ...] = ()
    segments_reused: tuple[str, ...] = ()
    shards_failed: tuple[FailedShard, ...] = ()
    failed_sequences: int = 0
    sequences: int = 0
    residues: int = 0
    residues_per_second: float | None = None
    residues_per_second_with_start_up: float | None = None
    model_load_seconds: float | None = None
    peak_memory_bytes: int | None = None
    peak_host_memory_bytes: int | None = None
    token_budget: int | None = None
    precisions: tuple[str, ...] = ()
    job_memory_bytes: int | None = None
    shards: tuple[ShardResult, ...] = ()

    @property
    def segments(self) -> tuple[str, ...]:
        """Names of the segments that hold the group's sequences."""
        return self.segments_written + self.segments_reused

    def as_json(self) -> dict[str, Any]:
        """The content of `run.json`."""
        content = super().as_json()
        for worker in content["workers"]:
            # It says so only when it has loaded one.
            if worker["model_load_seconds"] is None:
                del worker["model_load_seconds"]
        return content


@dataclass(frozen=True)
class Speed:
    """How fast jobs were: the one definition that summary, report, `run.json` and logs share.

    embedding_seconds: during which any shard was worked on. seconds: from the start of the first job that finished a
    shard to the end of the last. Both residues per second are None where nothing was computed.
    """

    residues: int
    embedding_seconds: float
    seconds: float

    @classmethod
    def of(cls, jobs: Iterable[tuple[Sequence[ShardResult], float, float]]) -> Speed:
        """Of jobs, given by the shards that each finished, its start and its end."""
        worked = [job for job in jobs if job[0]]
        shards = sorted((shard for job in worked for shard in job[0]), key=lambda shard: shard.started)
        embedding, until = 0.0, 0.0
        for shard in shards:
            embedding += max(0.0, shard.ended - max(shard.started, until))
            until = max(until, shard.ended)
        seconds = max(ended for *_, ended in worked) - min(started for _, started, _ in worked) if worked else 0.0
        return cls(sum(shard.residues for shard in shards), embedding, seconds)

    @property
    def while_embedding(self) -> float | None:
        """Residues per second."""
        return self.residues / self.embedding_seconds if self.embedding_seconds else None

    @property
    def with_start_up(self) -> float | None:
        """Residues per second, from a job's first moment: starting processes and loading the model are in it."""
        return self.residues / self.seconds if self.seconds else None


def read_run_records(paths: Iterable[str]) -> Iterator[RunRecord]:
    """Those of the groups that have run; a file that cannot be read is passed over."""
    for path in paths:
        with suppress(OSError, ValueError):
            yield RunRecord.read(path)
