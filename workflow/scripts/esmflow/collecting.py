"""Join records to segments: write the formats asked for, the manifest and the failures, and check that all adds up."""

from __future__ import annotations

import importlib.metadata
import logging
import platform
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from esmflow.digests import DIGEST_BYTES
from esmflow.errors import EsmflowError
from esmflow.failures import Failure, read_failures
from esmflow.files import read_json
from esmflow.records import RECORD_SCHEMA
from esmflow.segment_index import SegmentIndex, gather
from esmflow.segments import SegmentError, Store
from esmflow.tables import MANIFEST_SCHEMA, FailureTable, ManifestWriter
from esmflow.writers import FORMATS, Description, EmbeddingWriter

log = logging.getLogger(__name__)

EMBEDDED, FAILED, REJECTED = "embedded", "failed", "rejected"


class CollectError(EsmflowError):
    """The records and the segments do not add up. The message says what is missing and what to do."""


@dataclass(frozen=True)
class CollectInputs:
    """What earlier steps left: the record table, the plan, and each group's summary and failure list."""

    records: str
    plan: str
    runs: Sequence[str]
    failures: Sequence[str]


@dataclass(frozen=True)
class CollectOutputs:
    """What to write. `embeddings` is a folder with one folder for each output array."""

    embeddings: str
    manifest: str
    manifest_tsv: str
    failures: str


def collect(
    inputs: CollectInputs,
    outputs: CollectOutputs,
    store: Store,
    formats: Sequence[str],
    *,
    model: str,
    array_names: Sequence[str],
    max_residues: int | None,
    windows: bool = False,
) -> dict[str, Any]:
    """Writes formats, manifest and failures in the order of the input. Returns the run's summary.

    max_residues, windows: what was done with records longer than that: cut off, or embedded in windows; for the marks
    in the manifest.
    Streams over the records; memory grows with the number of sequences by 28 bytes each, not with their vectors.
    Raises CollectError when a record is neither embedded nor accounted for.
    """
    runs = [read_json(path) for path in inputs.runs]
    plan = read_json(inputs.plan)
    names = {name for run in runs for name in (*run["segments_written"], *run["segments_reused"])}
    try:
        index = SegmentIndex(store, sorted(names | set(plan["held_segments"])))
    except SegmentError as error:
        raise CollectError(f"{error}. The same command again computes their sequences anew") from error
    failures = {failure.digest: failure for path in inputs.failures for failure in read_failures(path)}
    precision = _describe_precision(store, index)
    writers = [
        FORMATS[name](
            Path(outputs.embeddings) / array, Description(array, model, precision, store.fingerprint, versions())
        )
        for array in array_names
        for name in formats
    ]
    tally = _Tally()
    current: str | None = None
    with (
        ManifestWriter(outputs.manifest, outputs.manifest_tsv) as manifest,
        FailureTable(outputs.failures) as failure_table,
    ):
        for block in pq.ParquetFile(inputs.records).iter_batches():
            joined = _join(block, index, failures, max_residues, windows)
            tally.count(joined)
            manifest.write(joined)
            failure_table.write(joined)
            for file, part in _by_file(joined):
                # A long file goes on in the next block.
                if file != current:
                    for writer in writers:
                        writer.begin_file(file)
                    current = file
                _write_vectors(writers, part, index)
    for writer in writers:
        writer.close()
    tally.check(plan)
    return _summary(tally, plan, runs, formats, array_names)


def versions() -> dict[str, str]:
    """The versions of what computes and writes numbers."""
    packages = ("torch", "fair-esm", "numpy", "h5py")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in packages}}


def _describe_precision(store: Store, index: SegmentIndex) -> str:
    """The precision that was used; more than one if `auto` met different cards."""
    used = sorted(set(index.precisions))
    if len(used) > 1:
        log.warning(
            "embeddings were computed in different precisions (%s): see the manifest's precision", ", ".join(used)
        )
    return "+".join(used) or "none"


def _join(
    block: pa.RecordBatch,
    index: SegmentIndex,
    failures: dict[str, Failure],
    max_residues: int | None,
    windows: bool,
) -> pa.Table:
    """Adds to a block of records where each one's embedding is, or why there is none."""
    table = pa.Table.from_batches([block], RECORD_SCHEMA)
    planned = table["digest"].is_valid().to_numpy()
    digests = np.frombuffer(b"".join(d for d in table["digest"].to_pylist() if d is not None), np.uint8)
    location = index.locate(digests.reshape(-1, DIGEST_BYTES))
    segment_numbers, rows = np.full(len(table), -1, np.int64), np.full(len(table), -1, np.int64)
    segment_numbers[planned], rows[planned] = location.segments, location.rows

    hexadecimal = [digest.hex() if digest else None for digest in table["digest"].to_pylist()]
    lengths = table["length"].to_pylist()
    reasons, details = table["reason"].to_pylist(), table["detail"].to_pylist()
    status: list[str | None] = []
    for i, digest in enumerate(hexadecimal):
        if digest is None:
            status.append(REJECTED)
        elif segment_numbers[i] >= 0:
            status.append(EMBEDDED)
        elif digest in failures:
            status.append(FAILED)
            reasons[i], details[i] = failures[digest].reason.value, failures[digest].detail
        else:
            status.append(None)
    embedded = [s == EMBEDDED for s in status]
    beyond = [e and max_residues is not None and n > max_residues for e, n in zip(embedded, lengths)]
    return pa.table(
        {
            "sample": table["sample"],
            "file": table["file"],
            "record": table["position"],
            "id": table["id"],
            "description": table["description"],
            "length": table["length"],
            "digest": pa.array(hexadecimal, pa.string()),
            "status": pa.array(status, pa.string()).dictionary_encode(),
            "reason": pa.array(reasons, pa.string()).dictionary_encode(),
            "detail": pa.array(details, pa.string()),
            "truncated": [long and not windows for long in beyond],
            "windowed": [long and windows for long in beyond],
            "precision": pa.array(
                [index.precisions[n] if n >= 0 else None for n in segment_numbers], pa.string()
            ).dictionary_encode(),
            "segment": pa.array(
                [index.names[n] if n >= 0 else None for n in segment_numbers], pa.string()
            ).dictionary_encode(),
            "row": pa.array([int(row) if row >= 0 else None for row in rows], pa.int64()),
        },
        schema=MANIFEST_SCHEMA,
    )


def _by_file(joined: pa.Table) -> Iterator[tuple[str, pa.Table]]:
    """A block cut where the input file changes."""
    files = joined["file"].to_pylist()
    start = 0
    for end in range(1, len(files) + 1):
        if end == len(files) or files[end] != files[start]:
            yield files[start], joined.slice(start, end - start)
            start = end


def _write_vectors(writers: Iterable[EmbeddingWriter], part: pa.Table, index: SegmentIndex) -> None:
    embedded = part.filter(part["row"].is_valid())
    if not len(embedded):
        return
    ids = embedded["id"].to_pylist()
    numbers = {name: number for number, name in enumerate(index.names)}
    segments = np.array([numbers[name] for name in embedded["segment"].to_pylist()], np.int64)
    rows = embedded["row"].to_numpy()
    for writer in writers:
        vectors, lengths = gather(index, segments, rows, writer.description.array)
        writer.add(ids, vectors, lengths)


class _Tally:
    """Counts records by what became of them."""

    def __init__(self) -> None:
        self.records = 0
        self.status: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()
        self.truncated = 0
        self.windowed = 0
        self.unaccounted: list[str] = []

    def count(self, joined: pa.Table) -> None:
        self.records += len(joined)
        self.status.update(s for s in joined["status"].to_pylist() if s)
        self.reasons.update(r for r in joined["reason"].to_pylist() if r)
        self.truncated += sum(joined["truncated"].to_pylist())
        self.windowed += sum(joined["windowed"].to_pylist())
        lost = joined.filter(joined["status"].is_null())
        self.unaccounted += [
            f"{f}, record {n} ({i})" for f, n, i in zip(*(lost[c].to_pylist() for c in ("file", "record", "id")))
        ]

    def check(self, plan: dict[str, Any]) -> None:
        """Raises CollectError unless records = embedded + failed + rejected, and as many as were planned."""
        if self.unaccounted:
            first = "; ".join(self.unaccounted[:3])
            raise CollectError(
                f"{len(self.unaccounted)} records have neither an embedding nor a reason, the first: {first}. "
                "Run again with --forcerun plan to compute them"
            )
        if self.records != plan["records"] or self.records != self.status.total():
            raise CollectError(
                f"records do not add up: {plan['records']} planned, {self.records} read, {dict(self.status)}; "
                "run again with --forcerun plan"
            )


def _summary(
    tally: _Tally, plan: dict[str, Any], runs: list[dict[str, Any]], formats: Sequence[str], arrays: Sequence[str]
) -> dict[str, Any]:
    shards = [shard for run in runs for shard in run["shards"]]
    seconds = max(s["ended"] for s in shards) - min(s["started"] for s in shards) if shards else 0.0
    residues = sum(shard["residues"] for shard in shards)
    rejected = {reason: n for reason, n in sorted(tally.reasons.items()) if n}
    return {
        "records": tally.records,
        "embedded": tally.status[EMBEDDED],
        "failed": tally.status[FAILED],
        "rejected": tally.status[REJECTED],
        "reasons": rejected,
        "truncated": tally.truncated,
        "windowed": tally.windowed,
        "duplicates": plan["duplicates"],
        "computed_sequences": sum(run["sequences"] for run in runs),
        "computed_residues": residues,
        "seconds": seconds,
        "residues_per_second": residues / seconds if seconds else None,
        "groups_with_failures": [run["group"] for run in runs if run["failed_sequences"]],
        "formats": list(formats),
        "arrays": list(arrays),
        "versions": versions(),
    }
