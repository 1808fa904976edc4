"""The table of records: one row for every FASTA entry, written while planning and joined while collecting."""

from __future__ import annotations

import os
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from esmflow.digests import DIGEST_BYTES
from esmflow.fasta import Record
from esmflow.files import atomic_path

ROWS_PER_GROUP = 65_536

_TEXT = pa.dictionary(pa.int32(), pa.string())
RECORD_SCHEMA = pa.schema(
    [
        ("sample", _TEXT),
        ("file", _TEXT),
        ("position", pa.int64()),
        ("id", pa.string()),
        ("description", pa.string()),
        ("length", pa.int64()),
        ("digest", pa.binary(DIGEST_BYTES)),
        ("reason", _TEXT),
        ("detail", pa.string()),
    ]
)


class RecordTable:
    """Writes `records.parquet` row by row in bounded memory; the file appears whole when the block ends."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._target = atomic_path(path)
        self._rows: list[tuple[Any, ...]] = []

    def __enter__(self) -> RecordTable:
        self._writer = pq.ParquetWriter(self._target.__enter__(), RECORD_SCHEMA, compression="zstd")
        return self

    def __exit__(self, *error: Any) -> None:
        try:
            self._flush()
            self._writer.close()
        finally:
            self._target.__exit__(*error)

    def add(self, sample: str, record: Record, digest: bytes | None) -> None:
        """Adds one record; `digest` is None for a rejected one."""
        reason = record.reason.value if record.reason else None
        self._rows.append(
            (
                sample,
                record.file,
                record.position,
                record.id,
                record.description,
                record.length,
                digest,
                reason,
                record.detail,
            )
        )
        if len(self._rows) >= ROWS_PER_GROUP:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            columns = [pa.array(column, field.type) for column, field in zip(zip(*self._rows), RECORD_SCHEMA)]
            self._writer.write_table(pa.Table.from_arrays(columns, schema=RECORD_SCHEMA))
            self._rows.clear()
