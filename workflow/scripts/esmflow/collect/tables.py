"""The tables that a run ends with: the manifest (Parquet and TSV) and the failures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from esmflow.files import atomic_path
from esmflow.plan.record_table import RECORD_SCHEMA
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


def manifest_schema(records: pa.Schema) -> pa.Schema:
    """The manifest's columns, and behind them the annotations that the table of records has."""
    return pa.schema([*MANIFEST_SCHEMA, *list(records)[len(RECORD_SCHEMA) :]])


FAILURE_COLUMNS = ("file", "record", "id", "reason", "detail")


@contextmanager
def open_tables(
    manifest: str, manifest_tsv: str, failures: str, schema: pa.Schema = MANIFEST_SCHEMA
) -> Iterator[Callable[[pa.Table], None]]:
    """The manifest, as Parquet and as TSV, and `failures.tsv`, which has those of its rows that have a reason.

    Gives the function that adds rows of the manifest; what goes wrong with them may be raised by its next call, or at
    the end of the block. The files are complete after that.
    """
    # Ids and digests repeat too seldom for a dictionary.
    repeating = [field.name for field in schema if field.type == _TEXT]
    with (
        atomic_path(manifest) as path,
        pq.ParquetWriter(path, schema, compression="zstd", use_dictionary=repeating) as parquet,
        open_tsv(manifest_tsv, schema.names) as tsv,
        open_tsv(failures, FAILURE_COLUMNS) as failed,
        # Each file has a thread of its own.
        Background() as to_parquet,
        Background() as to_tsv,
    ):

        def write(rows: pa.Table) -> None:
            to_parquet.run(parquet.write_table, rows)
            to_tsv.run(tsv, rows)
            failed(rows.filter(rows["reason"].is_valid()))

        yield write


@contextmanager
def open_tsv(target: str, columns: Sequence[str]) -> Iterator[Callable[[pa.Table], None]]:
    """A TSV file that whatever splits lines at tabs can read: without quotes, see `_cell`."""
    with atomic_path(target) as path, open(path, "wb") as handle:
        handle.write("\t".join(_cell(pa.array(columns, pa.string())).to_pylist()).encode() + b"\n")

        def write(rows: pa.Table) -> None:
            cells = [_cell(rows[name].combine_chunks()) for name in columns]
            cells[-1] = pc.binary_join_element_wise(cells[-1], "", "\n", null_handling="replace")
            handle.write(utf8(pc.binary_join_element_wise(*cells, "\t", null_handling="replace"))[0])

        yield write


def utf8(strings: pa.StringArray) -> tuple[memoryview, np.ndarray]:
    """Strings end to end, and the bytes of each, int32 `[N]`."""
    _, offsets, text = strings.buffers()
    ends = np.frombuffer(offsets, np.int32)[strings.offset : strings.offset + len(strings) + 1]
    return memoryview(text or b"")[ends[0] : ends[-1]], np.diff(ends)


def _cell(values: pa.Array) -> pa.StringArray:
    """Values as the cells of a TSV file can have them.

    A tab or a line end would begin another cell, and readers take double quotes for the bounds of one: they become a
    space and a single quote. Other control characters, which a terminal obeys, become a replacement character. An
    apostrophe goes before what a spreadsheet would take for a formula.
    """
    if pa.types.is_dictionary(values.type):
        return pa.DictionaryArray.from_arrays(values.indices, _cell(values.dictionary)).cast(pa.string())
    if not pa.types.is_string(values.type):
        return values.cast(pa.string())
    if not _may_need_it(values):
        return values
    for pattern, replacement in _REPLACED:
        values = pc.replace_substring_regex(values, pattern, replacement)
    return values


def _may_need_it(values: pa.StringArray) -> bool:
    """Whether `_cell` might change a text: a look at bytes, which is tens of times as fast as a search for patterns."""
    text, widths = utf8(values)
    codes = np.frombuffer(text, np.uint8)
    first = codes[(np.cumsum(widths) - widths)[widths > 0]]
    return bool(((codes < 32) | (codes == ord('"')) | (codes > 126)).any() or np.isin(first, _FORMULA).any())


_FORMULA = np.frombuffer(b"=+-@", np.uint8)
_REPLACED = (
    (r"[\t\n\v\f\r\x{85}\x{2028}\x{2029}]", " "),
    ('"', "'"),
    (r"[\x00-\x1f\x7f-\x{9f}]", "\N{REPLACEMENT CHARACTER}"),
    (r"^([=+\-@])", r"'\1"),
)
