"""The tables that a run ends with: the manifest (Parquet and TSV) and the failures."""

from __future__ import annotations

import csv
from contextlib import ExitStack
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from esmflow.files import atomic_path
from esmflow.threads import Background

_TEXT = pa.dictionary(pa.int32(), pa.string())
MANIFEST_SCHEMA = pa.schema(
    [
        ("sample", _TEXT),
        ("file", _TEXT),
        ("record", pa.int64()),
        ("id", pa.string()),
        ("description", pa.string()),
        ("length", pa.int64()),
        ("digest", pa.string()),
        ("status", _TEXT),
        ("reason", _TEXT),
        ("detail", pa.string()),
        ("truncated", pa.bool_()),
        ("windowed", pa.bool_()),
        ("precision", _TEXT),
        ("segment", _TEXT),
        ("row", pa.int64()),
    ]
)


class ManifestWriter:
    """The manifest, as Parquet and as TSV, each written in a thread of its own. Both are whole when the block ends."""

    def __init__(self, parquet: str, tsv: str) -> None:
        self._paths = parquet, tsv

    def __enter__(self) -> ManifestWriter:
        with ExitStack() as stack:
            parquet, tsv = (stack.enter_context(atomic_path(path)) for path in self._paths)
            options = pyarrow.csv.WriteOptions(delimiter="\t", quoting_style="needed")
            # Ids and digests repeat too seldom for a dictionary.
            repeating = [field.name for field in MANIFEST_SCHEMA if field.type == _TEXT]
            self._parquet = stack.enter_context(
                pq.ParquetWriter(parquet, MANIFEST_SCHEMA, compression="zstd", use_dictionary=repeating)
            )
            self._tsv = stack.enter_context(pyarrow.csv.CSVWriter(tsv, _plain(MANIFEST_SCHEMA), write_options=options))
            self._writing = stack.enter_context(Background()), stack.enter_context(Background())
            self._open = stack.pop_all()
        return self

    def write(self, joined: pa.Table) -> None:
        """Adds rows. What goes wrong with them may be raised by the next call, or at the end of the block."""
        parquet, tsv = self._writing
        parquet.run(self._parquet.write_table, joined)
        tsv.run(self._write_tsv, joined)

    def _write_tsv(self, joined: pa.Table) -> None:
        self._tsv.write_table(joined.cast(_plain(MANIFEST_SCHEMA)))

    def __exit__(self, *error: Any) -> None:
        self._open.__exit__(*error)


def _plain(schema: pa.Schema) -> pa.Schema:
    """The schema without dictionaries, which the CSV writer does not take."""
    return pa.schema([(f.name, f.type.value_type if pa.types.is_dictionary(f.type) else f.type) for f in schema])


class FailureTable:
    """`failures.tsv`: one row for every record without an embedding."""

    COLUMNS = ("file", "record", "id", "reason", "detail")

    def __init__(self, path: str) -> None:
        self._target = atomic_path(path)

    def __enter__(self) -> FailureTable:
        self._handle = open(self._target.__enter__(), "w", newline="", encoding="utf-8")
        self._writer = csv.writer(self._handle, delimiter="\t", lineterminator="\n")
        self._writer.writerow(self.COLUMNS)
        return self

    def write(self, joined: pa.Table) -> None:
        without = joined.filter(joined["reason"].is_valid())
        self._writer.writerows(zip(*(without[column].to_pylist() for column in self.COLUMNS)))

    def __exit__(self, *error: Any) -> None:
        self._handle.close()
        self._target.__exit__(*error)
