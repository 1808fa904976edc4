"""Read proteins from tables: Parquet, TSV or CSV with the columns `id` and `sequence`, and perhaps `description`."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from esmflow.errors import EsmflowError
from esmflow.failures import Reason
from esmflow.inputs.records import BlockTask, RecordBlock, file_row, printable
from esmflow.inputs.residues import ResiduePolicy, normalise
from esmflow.inputs.streams import DAMAGE, suffix, text_chunks

_DELIMITERS = {".tsv": "\t", ".csv": ","}
_NEEDED = ("id", "sequence")
_OPTIONAL = "description"
_COLUMNS = (*_NEEDED, _OPTIONAL)
_BATCH_ROWS = 2048
_BATCH_BYTES = 1 << 20
# Arrow says so when a file is no Parquet or no CSV.
_DAMAGE = (*DAMAGE, pa.ArrowInvalid)


class TableError(EsmflowError):
    """A table that does not have the columns it needs. The message names the file and what was found in it."""


def check_columns(path: str | os.PathLike[str]) -> None:
    """Raises TableError unless the table has its columns. A file that cannot be read as a table is left to be read."""
    try:
        columns = _columns(path)
    except _DAMAGE:
        return
    missing = [name for name in _NEEDED if name not in columns]
    if columns and missing:
        raise TableError(
            f"{path}: has no column {' and no column '.join(missing)}; its columns are {', '.join(columns)}. Rename "
            "the columns that hold the ids and the residues to id and sequence"
        )


def table_block_tasks(path: str | os.PathLike[str], policy: ResiduePolicy) -> Iterator[BlockTask]:
    """Yields the tasks that make a table's blocks of records, as `fasta.block_tasks` does for FASTA.

    Raises TableError when a column is missing or of a type that cannot hold it, OSError when the file is not there.
    """
    file = os.fspath(path)
    open(file, "rb").close()
    check_columns(path)
    position = 0
    rows_read = False
    bad_rows: list[tuple[int, str]] = []
    try:
        is_parquet = suffix(path) == ".parquet"
        for batch in _parquet_batches(path) if is_parquet else _text_batches(path, bad_rows):
            if len(batch):
                yield partial(_read_batch, file, position + 1, batch, policy)
            position += len(batch)
            for row, detail in bad_rows:
                rows_read = True
                yield partial(file_row, file, row, Reason.UNREADABLE_FILE, f"{file}, line {row}: {detail}")
            bad_rows.clear()
    except _DAMAGE as error:
        detail = f"{file} cannot be read past record {position}: {error}"
        yield partial(file_row, file, position + 1, Reason.UNREADABLE_FILE, detail)
        return
    if position == 0 and not rows_read:
        yield partial(file_row, file, 0, Reason.EMPTY_FILE, f"{file} holds no record")


def _columns(path: str | os.PathLike[str]) -> list[str]:
    """The names in the table's head; none if it is empty."""
    if suffix(path) == ".parquet":
        return pq.read_schema(path).names
    head = b""
    for chunk in text_chunks(path):
        head += chunk
        if b"\n" in chunk:
            break
    line = head.split(b"\n", 1)[0].decode("utf-8", "replace")
    return next(csv.reader([line], delimiter=_DELIMITERS[suffix(path)]), [])


def _parquet_batches(path: str | os.PathLike[str]) -> Iterator[pa.RecordBatch]:
    with pq.ParquetFile(path) as table:
        columns = [name for name in _COLUMNS if name in table.schema_arrow.names]
        yield from table.iter_batches(_BATCH_ROWS, columns=columns)


def _text_batches(path: str | os.PathLike[str], bad_rows: list[tuple[int, str]]) -> Iterator[pa.RecordBatch]:
    """A text table, a batch of rows at a time. Rows of the wrong width are put into `bad_rows`."""
    columns = [name for name in _COLUMNS if name in _columns(path)]
    if not columns:
        return

    def note(row: pyarrow.csv.InvalidRow) -> str:
        bad_rows.append((row.number, f"{row.actual_columns} cells where the head has {row.expected_columns}"))
        return "skip"

    lines = _WholeLines(text_chunks(path))
    yield from pyarrow.csv.open_csv(
        io.BufferedReader(lines, _BATCH_BYTES),
        # One thread: only then is it known which row is wrong.
        pyarrow.csv.ReadOptions(use_threads=False, block_size=_BATCH_BYTES),
        pyarrow.csv.ParseOptions(delimiter=_DELIMITERS[suffix(path)], invalid_row_handler=note),
        # Bytes, so that an id that is not UTF-8 does not cost the file.
        pyarrow.csv.ConvertOptions(include_columns=columns, column_types=dict.fromkeys(columns, pa.binary())),
    )
    if lines.damage is not None:
        raise lines.damage


class _WholeLines(io.RawIOBase):
    """A stream of whole lines that ends early where its source is damaged, and keeps the error.

    Arrow reads ahead, so an error raised while it reads would cost rows that were read before.
    """

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self.damage: BaseException | None = None
        self._chunks = chunks
        self._ready = b""
        self._begun = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            try:
                chunk = next(self._chunks, b"")
            except DAMAGE as error:
                # The line that was cut is not given.
                self.damage, self._begun = error, b""
                return 0
            if not chunk:
                self._ready, self._begun = self._begun, b""
                break
            lines, end, rest = chunk.rpartition(b"\n")
            self._ready, self._begun = (self._begun + lines + end, rest) if end else (b"", self._begun + rest)
        size = min(len(buffer), len(self._ready))
        buffer[:size], self._ready = self._ready[:size], self._ready[size:]
        return size


def _read_batch(file: str, first_position: int, batch: pa.RecordBatch, policy: ResiduePolicy) -> RecordBlock:
    columns = dict(zip(batch.schema.names, batch.columns))
    ids = _texts(columns["id"])
    descriptions = _texts(columns[_OPTIONAL]) if _OPTIONAL in columns else pa.array([""] * len(batch))
    try:
        sequences = columns["sequence"].cast(pa.large_binary()).fill_null(b"")
    except (pa.ArrowNotImplementedError, pa.ArrowTypeError) as error:
        raise TableError(
            f"{file}: its column sequence is of type {columns['sequence'].type}; it must hold text"
        ) from error
    sequences = pa.concat_arrays([sequences])
    offsets = np.frombuffer(sequences.buffers()[1], np.int64)[sequences.offset : sequences.offset + len(batch) + 1]
    text = bytes(sequences.buffers()[2] or b"")
    line_ends = np.flatnonzero(np.frombuffer(text, np.uint8) == ord("\n"))
    found = normalise(text, offsets[:-1], offsets[1:], line_ends, policy)
    return RecordBlock.of(file, first_position, ids, descriptions, found)


def _texts(column: pa.Array) -> pa.StringArray:
    """A column of any type as text that every output can hold."""
    try:
        texts = column.cast(pa.string()).fill_null("")
        if not pc.any(pc.match_substring(texts, "\0")).as_py():
            return texts
        return pc.replace_substring(texts, "\0", "\\x00")
    except pa.ArrowInvalid:
        return pa.array([printable(text or b"") for text in column.cast(pa.binary()).to_pylist()], pa.string())
