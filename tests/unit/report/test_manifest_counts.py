"""What the report counts is what the manifest holds."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from esmflow.collect.tables import MANIFEST_SCHEMA
from esmflow.report.manifest_counts import LONGEST, count_manifest


def write_manifest(path, rows, block=7):
    """Rows as dictionaries; several blocks, whose dictionaries of texts differ."""
    with pq.ParquetWriter(path, MANIFEST_SCHEMA) as writer:
        for start in range(0, len(rows), block):
            writer.write_table(pa.Table.from_pylist(rows[start : start + block], MANIFEST_SCHEMA))
    return path


def row(number, file="a.faa", status="embedded", segment="s0", place=0, length=50, **more):
    found = {"segment": segment, "row": place, "precision": "fp32"} if status == "embedded" else {}
    return {
        "sample": file, "file": file, "record": number, "id": f"id{number}", "length": length,
        "digest": f"{number:032x}", "status": status, "truncated": False, "windowed": False, **found, **more,
    }  # fmt: skip


@pytest.fixture
def manifest(tmp_path):
    rows = [row(n, segment=f"s{n % 3}", place=n // 3, length=40 + n) for n in range(30)]
    rows += [
        row(30, "b.faa", segment="s0", place=0),
        row(31, "b.faa", segment="old", place=5, length=2000, truncated=True),
    ]
    rows += [row(n, "b.faa", "failed", reason="out_of_memory", detail="too long", length=9000) for n in (32, 33)]
    rows += [{**rows[-1], "record": 34, "id": "again"}]
    rows += [row(n, "c.faa", "rejected", reason="empty_sequence", length=0, digest=None) for n in range(35, 45)]
    rows += [row(45, "c.faa", length=3 * LONGEST)]
    return write_manifest(tmp_path / "manifest.parquet", rows)


def test_records_are_counted_by_file_in_input_order(manifest):
    counts = count_manifest(manifest, {"s0", "s1", "s2"}, embedded=33)
    assert list(counts.files) == ["a.faa", "b.faa", "c.faa"]
    assert counts.files["b.faa"] == {"embedded": 2, "failed": 3}
    assert counts.total == 46
    assert list(counts.samples) == ["a.faa", "b.faa", "c.faa"]
    assert counts.samples["c.faa"] == {"embedded": 1, "rejected": 10}
    assert (counts.records("embedded"), counts.records("failed"), counts.records("rejected")) == (33, 3, 10)


def test_sequences_are_counted_once_and_by_where_they_came_from(manifest):
    counts = count_manifest(manifest, {"s0", "s1", "s2"}, embedded=33)
    # Record 30 shares a vector with record 0, as record 45 does; record 34 failed with the sequence of record 33.
    assert (counts.computed, counts.reused, counts.failed) == (30, 1, 2)


def test_the_first_records_of_each_reason_are_kept(manifest):
    counts = count_manifest(manifest, set(), embedded=33, first=4)
    assert counts.reasons == {"out_of_memory": 3, "empty_sequence": 10}
    assert [entry.record for entry in counts.first["empty_sequence"]] == [35, 36, 37, 38]
    assert [entry.id for entry in counts.first["out_of_memory"]] == ["id32", "id33", "again"]


def test_lengths_are_counted_by_kind_and_very_long_ones_together(manifest):
    lengths = count_manifest(manifest, set(), embedded=33).lengths
    assert {kind: int(values.sum()) for kind, values in lengths.items()} == {
        "whole": 32,
        "truncated": 1,
        "failed": 3,
        "rejected": 10,
    }
    assert np.flatnonzero(lengths["whole"]).tolist() == [*range(40, 70), LONGEST]


def test_a_sample_is_drawn_from_all_blocks_and_is_always_the_same(manifest):
    everything = count_manifest(manifest, set(), embedded=33).sample
    assert [record.id for record in everything] == [f"id{n}" for n in [*range(32), 45]]
    sample = count_manifest(manifest, set(), embedded=33, sample=10).sample
    assert sample == count_manifest(manifest, set(), embedded=33, sample=10).sample
    assert len({record.id for record in sample}) == 10
    assert set(sample) < set(everything)


@pytest.mark.parametrize("status", [None, "failed", "rejected"])
def test_a_manifest_without_embeddings_is_counted_too(tmp_path, status):
    rows = [row(n, status=status, reason="worker_crashed") for n in range(9)] if status else []
    counts = count_manifest(write_manifest(tmp_path / "manifest.parquet", rows), set(), embedded=0)
    assert (counts.total, counts.computed, counts.sample) == (len(rows), 0, [])
