"""Count what the manifest holds, in one pass and bounded memory: what the report's figures are drawn from."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

LONGEST = 100_000
_COLUMNS = (
    "file",
    "record",
    "id",
    "length",
    "digest",
    "status",
    "reason",
    "detail",
    "truncated",
    "windowed",
    "precision",
)
_ROW_BITS = 40


@dataclass(frozen=True)
class FailedRecord:
    """One record without an embedding, as the report shows it."""

    file: str
    record: int
    id: str
    detail: str


@dataclass(frozen=True)
class SampledRecord:
    """An embedded record that was drawn for the map: where its vector is in the store."""

    file: str
    id: str
    length: int
    segment: str
    row: int


@dataclass
class ManifestCounts:
    """What became of the records.

    files: for each input file, in input order, records by status. precisions, reasons: records by these; first: the
    first few of each reason. lengths: for each kind (`whole`, `truncated`, `windowed`, `failed`, `rejected`) the
    records of each length in residues, int64 `[LONGEST + 2]`; longer ones count as LONGEST.
    computed, reused: sequences embedded by this run and taken from the store; failed: sequences, not records.
    """

    files: dict[str, Counter[str]] = field(default_factory=dict)
    precisions: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    first: dict[str, list[FailedRecord]] = field(default_factory=dict)
    lengths: dict[str, np.ndarray] = field(default_factory=dict)
    computed: int = 0
    reused: int = 0
    failed: int = 0
    sample: list[SampledRecord] = field(default_factory=list)

    def records(self, status: str) -> int:
        """Records with this status."""
        return sum(counter[status] for counter in self.files.values())

    @property
    def total(self) -> int:
        """All records."""
        return sum(counter.total() for counter in self.files.values())


def count_manifest(
    path: str | os.PathLike[str],
    written_segments: Collection[str],
    *,
    embedded: int,
    first: int = 5,
    sample: int = 20_000,
) -> ManifestCounts:
    """Reads a manifest once, block by block; takes 8 bytes of memory for each embedded record.

    written_segments: the names of those that this run computed. embedded: how many records are, from the summary.
    first: how many records to keep of each reason. sample: embedded records to draw at random, always the same ones;
    all of them if there are no more.
    """
    counts = ManifestCounts()
    drawn = np.arange(embedded)
    if embedded > sample:
        drawn = np.sort(np.random.default_rng(0).choice(embedded, sample, replace=False))
    segments: dict[str, int] = {}
    keys = [np.empty(0, np.int64)]
    failed_digests: set[str] = set()
    passed = 0
    for block in pq.ParquetFile(path).iter_batches(columns=[*_COLUMNS, "segment", "row"]):
        table = pa.Table.from_batches([block])
        _count_statuses(counts, table)
        _count_lengths(counts, table)
        _keep_first(counts, table, first)
        failed_digests.update(table.filter(pc.equal(table["status"], "failed"))["digest"].to_pylist())
        here = table.filter(pc.equal(table["status"], "embedded"))
        keys.append(_keys(here, segments))
        mine = drawn[np.searchsorted(drawn, passed) : np.searchsorted(drawn, passed + len(here))] - passed
        counts.sample += _sampled(here.take(pa.array(mine)))
        passed += len(here)
    counts.failed = len(failed_digests)
    places = np.concatenate(keys)
    keys.clear()
    # Sorting in place takes neither the time nor the memory of numpy's `unique`.
    places.sort()
    first_of_place = np.append(True, places[1:] != places[:-1])[: len(places)]
    per_segment = np.bincount(places[first_of_place] >> _ROW_BITS, minlength=len(segments))
    counts.computed = int(sum(per_segment[number] for name, number in segments.items() if name in written_segments))
    counts.reused = int(per_segment.sum()) - counts.computed
    return counts


def _count_statuses(counts: ManifestCounts, table: pa.Table) -> None:
    grouped = table.group_by(["file", "status"], use_threads=False).aggregate([([], "count_all")])
    for file, status, number in zip(*(grouped[name].to_pylist() for name in ("file", "status", "count_all"))):
        counts.files.setdefault(file, Counter())[status] += number
    for entry in table["precision"].drop_null().value_counts().to_pylist():
        counts.precisions[entry["values"]] += entry["counts"]


def _count_lengths(counts: ManifestCounts, table: pa.Table) -> None:
    embedded = pc.equal(table["status"], "embedded")
    cut = pc.or_(table["truncated"], table["windowed"])
    kinds = {
        "whole": pc.and_(embedded, pc.invert(cut)),
        "truncated": table["truncated"],
        "windowed": table["windowed"],
        "failed": pc.equal(table["status"], "failed"),
        "rejected": pc.equal(table["status"], "rejected"),
    }
    for kind, mask in kinds.items():
        values = np.minimum(pc.fill_null(table.filter(mask)["length"], 0).to_numpy(), LONGEST)
        if len(values):
            found = np.bincount(values, minlength=LONGEST + 2)
            counts.lengths[kind] = counts.lengths.get(kind, 0) + found


def _keep_first(counts: ManifestCounts, table: pa.Table, first: int) -> None:
    without = table.filter(table["reason"].is_valid())
    numbers = without["reason"].value_counts().to_pylist() if len(without) else []
    for reason, number in ((entry["values"], entry["counts"]) for entry in numbers):
        counts.reasons[reason] += number
        kept = counts.first.setdefault(reason, [])
        if len(kept) < first:
            rows = without.filter(pc.equal(without["reason"], reason)).slice(0, first - len(kept))
            columns = (rows[name].to_pylist() for name in ("file", "record", "id", "detail"))
            kept += [FailedRecord(file, record, id or "", detail or "") for file, record, id, detail in zip(*columns)]


def _keys(embedded: pa.Table, segments: dict[str, int]) -> np.ndarray:
    """One number for each place in the store, equal for records that share a vector: int64 `[N]`."""
    column = embedded["segment"].cast(pa.string()).combine_chunks().dictionary_encode()
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    numbers = [segments.setdefault(name, len(segments)) for name in column.dictionary.to_pylist()]
    mine = np.array(numbers, np.int64)[column.indices.to_numpy()] if numbers else np.empty(0, np.int64)
    return (mine << _ROW_BITS) | embedded["row"].to_numpy()


def _sampled(rows: pa.Table) -> list[SampledRecord]:
    columns = (rows[name].to_pylist() for name in ("file", "id", "length", "segment", "row"))
    return [SampledRecord(*values) for values in zip(*columns)]
