"""Count what the manifest holds, in one pass and bounded memory: what the report's figures are drawn from."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field

import numpy as np
import polars as pl
import pyarrow.parquet as pq

LONGEST = 100_000
MOST_POINTS = 6_000
"""Of all maps together: more are drawn for seconds, and lie on top of each other."""
_FAILED_COLUMNS = ("file", "record", "id", "detail")
_SAMPLED_COLUMNS = ("file", "id", "length", "segment", "row", "sample")
_COLUMNS = {
    "sample",
    *_FAILED_COLUMNS,
    *_SAMPLED_COLUMNS,
    "digest",
    "status",
    "reason",
    "truncated",
    "windowed",
    "precision",
}
_EMBEDDED = pl.col("status") == "embedded"
_KINDS = {
    "whole": _EMBEDDED & ~pl.col("truncated") & ~pl.col("windowed"),
    "truncated": pl.col("truncated"),
    "windowed": pl.col("windowed"),
    "failed": pl.col("status") == "failed",
    "rejected": pl.col("status") == "rejected",
}
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
    sample: str = ""


@dataclass
class ManifestCounts:
    """What became of the records.

    files, samples: for each input file and for each sample, in input order, records by status. precisions, reasons:
    records by these; first: the first few of each reason. lengths: for each kind (`whole`, `truncated`, `windowed`,
    `failed`, `rejected`) the records of each length in residues, int64 `[LONGEST + 2]`; longer ones count as LONGEST.
    computed, reused: sequences embedded by this run and taken from the store; failed: sequences, not records.
    """

    files: dict[str, Counter[str]] = field(default_factory=dict)
    samples: dict[str, Counter[str]] = field(default_factory=dict)
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
    sample: int = MOST_POINTS,
) -> ManifestCounts:
    """Reads a manifest once, block by block; takes 8 bytes of memory for each embedded record.

    written_segments: the names of those that this run computed. embedded: how many records are, from the summary.
    first: how many records to keep of each reason. sample: embedded records to draw at random, always the same;
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
    for block in pq.ParquetFile(path).iter_batches(columns=list(_COLUMNS)):
        table = pl.DataFrame(pl.from_arrow(block)).with_columns(pl.col(pl.Categorical).cast(pl.String))
        _count(counts, table)
        _keep_first(counts, table, first)
        failed_digests.update(table.filter(_KINDS["failed"])["digest"])
        here = table.filter(_EMBEDDED)
        for name in here["segment"].unique():
            segments.setdefault(name, len(segments))
        # One number for each place in the store, equal for records that share a vector.
        numbers = here["segment"].replace_strict(segments, return_dtype=pl.Int64)
        # Polars keeps no type of a column that it replaced in by an empty mapping.
        keys.append((numbers.cast(pl.Int64).to_numpy() << _ROW_BITS) | here["row"].to_numpy())
        mine = drawn[np.searchsorted(drawn, passed) : np.searchsorted(drawn, passed + len(here))] - passed
        counts.sample += [SampledRecord(*row) for row in here[mine].select(_SAMPLED_COLUMNS).iter_rows()]
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


def _count(counts: ManifestCounts, table: pl.DataFrame) -> None:
    for column, counters in (("file", counts.files), ("sample", counts.samples)):
        for name, status, number in table.group_by(column, "status", maintain_order=True).len().iter_rows():
            counters.setdefault(name, Counter())[status] += number
    for name, counter in (("precision", counts.precisions), ("reason", counts.reasons)):
        counter.update(dict(table[name].drop_nulls().value_counts().iter_rows()))
    for kind, mask in _KINDS.items():
        lengths = table.filter(mask)["length"].fill_null(0).clip(0, LONGEST).to_numpy()
        if len(lengths):
            counts.lengths[kind] = counts.lengths.get(kind, 0) + np.bincount(lengths, minlength=LONGEST + 2)


def _keep_first(counts: ManifestCounts, table: pl.DataFrame, first: int) -> None:
    without = table.filter(pl.col("reason").is_not_null()).group_by("reason", maintain_order=True).head(first)
    for reason, file, record, id, detail in without.select("reason", *_FAILED_COLUMNS).iter_rows():
        kept = counts.first.setdefault(reason, [])
        if len(kept) < first:
            kept.append(FailedRecord(file, record, id or "", detail or ""))
