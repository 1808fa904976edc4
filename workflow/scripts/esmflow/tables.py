"""The tables that a run ends with: the manifest (Parquet and TSV) and the failures."""

from __future__ import annotations

import csv
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from esmflow.files import atomic_path

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
    """The manifest, as Parquet and as TSV."""

    def __init__(self, parquet: str, tsv: str) -> None:
        self._targets = [atomic_path(parquet), atomic_path(tsv)]

    def __enter__(self) -> ManifestWriter:
        parquet, tsv = (target.__enter__() for target in self._targets)
        options = pyarrow.csv.WriteOptions(delimiter="\t", quoting_style="needed")
        # Ids and digests repeat too seldom for a dictionary.
        repeating = [field.name for field in MANIFEST_SCHEMA if field.type == _TEXT]
        self._parquet = pq.ParquetWriter(parquet, MANIFEST_SCHEMA, compression="zstd", use_dictionary=repeating)
        self._tsv = pyarrow.csv.CSVWriter(tsv, _plain(MANIFEST_SCHEMA), write_options=options)
        return self

    def write(self, joined: pa.Table) -> None:
        self._parquet.write_table(joined)
        self._tsv.write_table(joined.cast(_plain(MANIFEST_SCHEMA)))

    def __exit__(self, *error: Any) -> None:
        self._parquet.close()
        self._tsv.close()
        for target in self._targets:
            target.__exit__(*error)


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
