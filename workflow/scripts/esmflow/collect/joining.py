"""Join records to segments and failures: what became of each record, as a block of the manifest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from esmflow.collect.tables import MANIFEST_SCHEMA, manifest_schema
from esmflow.errors import EsmflowError
from esmflow.failures import Failure
from esmflow.inputs.residues import DIGEST_BYTES
from esmflow.method import LongSequences
from esmflow.store.gather import Location, SegmentIndex
from esmflow.text import record_name

STATUS = ("embedded", "failed", "rejected")
EMBEDDED, FAILED, REJECTED = STATUS


class CollectError(EsmflowError):
    """The records and the segments do not add up. The message says what is missing and what to do."""


@dataclass(frozen=True)
class Joined:
    """A block of records: rows of the manifest, and where each one's vectors are."""

    table: pa.Table
    location: Location

    def embedded(self) -> Joined:
        """Those records of the block that have vectors."""
        there = self.location.segments >= 0
        return self if there.all() else Joined(self.table.filter(pa.array(there)), self.location[there])


def join(
    block: pa.RecordBatch,
    index: SegmentIndex,
    failures: Mapping[str, Failure],
    long: LongSequences,
) -> Joined:
    """Adds to a block of records where each one's embedding is, or why there is none.

    failures: by hexadecimal digest. A record that is neither embedded nor accounted for has no status.
    """
    table = pa.Table.from_batches([block])
    planned = table["digest"].is_valid().to_numpy()
    digests = _digest_bytes(table["digest"])
    location = _locate(index, digests, planned)
    embedded = location.segments >= 0
    hexadecimal = _hexadecimal(digests, planned)
    reason, detail, failed = _failures(table, hexadecimal, planned & ~embedded, failures)
    status = np.select([embedded, failed, ~planned], [0, 1, 2], default=-1)
    cut = embedded & long.is_cut(table["length"].to_numpy())
    columns = {
        "sample": table["sample"],
        "file": table["file"],
        "record": table["position"],
        "id": table["id"],
        "description": table["description"],
        "length": table["length"],
        "digest": hexadecimal,
        "status": _choose(status, STATUS),
        "reason": reason,
        "detail": detail,
        "truncated": cut & (not long.windows),
        "windowed": cut & long.windows,
        "precision": _of_segment(location.segments, index.precisions),
        "segment": _of_segment(location.segments, index.names),
        "row": pa.array(location.rows.astype(np.int64), mask=~embedded),
    }
    schema = manifest_schema(block.schema)
    columns |= {name: table[name] for name in schema.names[len(MANIFEST_SCHEMA) :]}
    return Joined(pa.table(columns, schema=schema), location)


def _digest_bytes(column: pa.ChunkedArray) -> np.ndarray:
    """uint8 `[N, 16]`; zeros where there is none."""
    filled = pc.fill_null(column, bytes(DIGEST_BYTES)).combine_chunks()
    values = np.frombuffer(filled.buffers()[1], np.uint8, len(filled) * DIGEST_BYTES, filled.offset * DIGEST_BYTES)
    return values.reshape(-1, DIGEST_BYTES)


def _locate(index: SegmentIndex, digests: np.ndarray, planned: np.ndarray) -> Location:
    found = index.locate(digests)
    # A rejected record has no digest, whatever stands in its place.
    return found if planned.all() else Location(*(np.where(planned, v, n) for v, n in zip(_fields(found), (-1, -1, 0))))


def _fields(location: Location) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return location.segments, location.rows, location.lengths


_HEXADECIMAL = np.array([f"{byte:02x}".encode() for byte in range(256)])


def _hexadecimal(digests: np.ndarray, valid: np.ndarray) -> pa.Array:
    width = 2 * DIGEST_BYTES
    text = np.ascontiguousarray(_HEXADECIMAL[digests]).view(np.uint8)
    offsets = np.arange(0, (len(digests) + 1) * width, width, dtype=np.int32)
    whole = pa.StringArray.from_buffers(len(digests), pa.py_buffer(offsets), pa.py_buffer(text))
    return whole if valid.all() else pc.if_else(pa.array(valid), whole, None)


def _failures(
    table: pa.Table, hexadecimal: pa.Array, lost: np.ndarray, failures: Mapping[str, Failure]
) -> tuple[Any, Any, np.ndarray]:
    """Reason and detail of every record, and which of those without a vector have failed."""
    failed = np.zeros(len(table), bool)
    if not lost.any():
        return table["reason"], table["detail"], failed
    reasons, details = table["reason"].to_pylist(), table["detail"].to_pylist()
    for i in np.flatnonzero(lost).tolist():
        if failure := failures.get(hexadecimal[i].as_py()):
            reasons[i], details[i], failed[i] = failure.reason.value, failure.detail, True
    return pa.array(reasons, MANIFEST_SCHEMA.field("reason").type), pa.array(details, pa.string()), failed


def _choose(numbers: np.ndarray, names: Sequence[str]) -> pa.DictionaryArray:
    """Names by their numbers; null where a number is negative."""
    codes = pa.array(numbers.astype(np.int32), mask=numbers < 0)
    return pa.DictionaryArray.from_arrays(codes, pa.array(names, pa.string()))


def _of_segment(numbers: np.ndarray, values: Sequence[str]) -> pa.DictionaryArray:
    """What `values` has for each segment number, with no more entries in the dictionary than a block needs."""
    used, codes = np.unique(numbers, return_inverse=True)
    names, of_used = np.unique([values[n] if n >= 0 else "" for n in used], return_inverse=True)
    return _choose(np.where(numbers >= 0, of_used[codes], -1), names.tolist())


@dataclass
class Tally:
    """Counts records by what became of them."""

    records: int = 0
    status: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    truncated: int = 0
    windowed: int = 0
    lost: int = 0
    first_lost: list[str] = field(default_factory=list)

    def count(self, joined: pa.Table) -> None:
        self.records += len(joined)
        self.status.update(_counts(joined["status"]))
        self.reasons.update(_counts(joined["reason"]))
        self.truncated += pc.sum(joined["truncated"]).as_py() or 0
        self.windowed += pc.sum(joined["windowed"]).as_py() or 0
        if joined["status"].null_count:
            lost = joined.filter(joined["status"].is_null())
            self.lost += len(lost)
            rows = lost.select(["file", "record", "id"]).slice(0, 3 - len(self.first_lost)).to_pylist()
            self.first_lost += [record_name(row["file"], row["record"], row["id"]) for row in rows]

    def check(self, planned: int) -> None:
        """Raises CollectError unless records = embedded + failed + rejected, and as many as were `planned`."""
        if self.lost:
            raise CollectError(
                f"{self.lost} records have neither an embedding nor a reason, the first: {'; '.join(self.first_lost)}. "
                "Segments are missing from the store; run again with --forcerun plan to compute them"
            )
        if self.records != planned or self.records != self.status.total():
            raise CollectError(
                f"records do not add up: {planned} planned, {self.records} read, {dict(self.status)}; "
                "run again with --forcerun plan"
            )


def _counts(column: pa.ChunkedArray) -> dict[str, int]:
    counted = column.drop_null().value_counts().to_pylist()
    return {entry["values"]: entry["counts"] for entry in counted}
