"""Read proteins from tables: Parquet, TSV or CSV with the columns `id` and `sequence`, and perhaps `description`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from esmflow.failures import Reason
from esmflow.inputs.columns import (
    DESCRIPTION,
    ID,
    SEQUENCE,
    Row,
    TableError,
    check_columns,
    table_columns,
    table_rows,
)
from esmflow.inputs.records import BlockTask, RecordBlock, file_row, printable
from esmflow.inputs.residues import ResiduePolicy, normalise
from esmflow.inputs.streams import DAMAGE, suffix

_READ = (ID, SEQUENCE, DESCRIPTION)
_BATCH_ROWS = 2048
_BATCH_BYTES = 1 << 20


def annotation_columns(path: str) -> list[str]:
    """The columns of a table that say more about its records: all but those that are read, and vectors."""
    vectors = vector_columns(path)
    return [name for name in table_columns(path) if name and name not in (*_READ, *vectors)]


def vector_columns(path: str) -> list[str]:
    """The columns of a Parquet table that hold vectors, such as embeddings: too much for a manifest."""
    return [field.name for field in pq.read_schema(path) if _is_vector(field.type)] if _is_parquet(path) else []


def _is_parquet(path: str) -> bool:
    return suffix(path) == ".parquet"


def _is_vector(kind: pa.DataType) -> bool:
    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return any(is_list(kind) for is_list in lists) and (
        pa.types.is_floating(kind.value_type) or _is_vector(kind.value_type)
    )


def table_block_tasks(path: str | os.PathLike[str], policy: ResiduePolicy) -> Iterator[BlockTask]:
    """Yields the tasks that make a table's blocks of records, as `fasta.block_tasks` does for FASTA.

    Raises TableError when a column is missing or of a type that cannot hold it, OSError when the file is not there.
    """
    file = os.fspath(path)
    open(file, "rb").close()
    check_columns(path)
    position = 0
    try:
        for batch, wrong in _parquet_batches(file) if _is_parquet(file) else _text_batches(file):
            if len(batch):
                yield partial(read_batch, file, position + 1, batch, wrong, policy)
            position += len(batch)
    # Arrow says ArrowInvalid when a file is no Parquet.
    except (*DAMAGE, pa.ArrowInvalid) as error:
        detail = f"{file} cannot be read past record {position}: {error}"
        yield partial(file_row, file, position + 1, Reason.UNREADABLE_FILE, detail)
        return
    if position == 0:
        yield partial(file_row, file, 0, Reason.EMPTY_FILE, f"{file} holds no record")


# Rows, and what is wrong with those that cannot be read, by index.
Wrong = Mapping[int, tuple[Reason, str]]
Batch = tuple[pa.RecordBatch, Wrong]


def _parquet_batches(path: str) -> Iterator[Batch]:
    with pq.ParquetFile(path) as table:
        needed = [name for name in _READ if name in table.schema_arrow.names]
        for batch in table.iter_batches(_BATCH_ROWS, columns=[*needed, *annotation_columns(path)]):
            yield batch, {}


def _text_batches(path: str) -> Iterator[Batch]:
    names = table_columns(path)
    places = {name: names.index(name) for name in names if name}
    rows: list[Row] = []
    size = 0
    source = table_rows(path)
    next(source, None)
    try:
        for row in source:
            rows.append(row)
            size += sum(map(len, row.cells))
            if len(rows) == _BATCH_ROWS or size >= _BATCH_BYTES:
                yield _batch(path, rows, places)
                rows, size = [], 0
    except DAMAGE:
        yield _batch(path, rows, places)
        raise
    yield _batch(path, rows, places)


def _batch(path: str, rows: Sequence[Row], places: Mapping[str, int]) -> Batch:
    """Rows as columns of bytes, so that an id that is not UTF-8 does not cost the file."""
    wrong = {
        i: (Reason.UNREADABLE_FILE, f"{path}, line {row.line}: {row.wrong}") for i, row in enumerate(rows) if row.wrong
    }
    columns = {name: [row.cells[at] if at < len(row.cells) else b"" for row in rows] for name, at in places.items()}
    for i in wrong:
        columns[SEQUENCE][i] = b""
    return pa.record_batch({name: pa.array(column, pa.binary()) for name, column in columns.items()}), wrong


def read_batch(
    file: str, first_position: int, batch: pa.RecordBatch, wrong: Wrong, policy: ResiduePolicy
) -> RecordBlock:
    """Rows with the columns `id`, `sequence` and perhaps `description`, as a block of records."""
    columns = dict(zip(batch.schema.names, batch.columns))
    ids = pc.utf8_trim_whitespace(_texts(file, ID, columns[ID]))
    nothing = pa.array([""] * len(batch), pa.string())
    descriptions = _texts(file, DESCRIPTION, columns[DESCRIPTION]) if DESCRIPTION in columns else nothing
    sequences = pa.concat_arrays([_cast(file, SEQUENCE, columns[SEQUENCE], pa.large_binary()).fill_null(b"")])
    offsets = np.frombuffer(sequences.buffers()[1], np.int64)[sequences.offset : sequences.offset + len(batch) + 1]
    text = bytes(sequences.buffers()[2] or b"")
    line_ends = np.flatnonzero(np.frombuffer(text, np.uint8) == ord("\n"))
    found = normalise(text, offsets[:-1], offsets[1:], line_ends, policy)
    for i, reason_and_detail in wrong.items():
        found.reasons[i], found.details[i] = reason_and_detail
    others = {name: _spelled(column) for name, column in columns.items() if name not in _READ}
    return replace(RecordBlock.of(file, first_position, ids, descriptions, found), annotations=others)


def _cast(file: str, name: str, column: pa.Array, kind: pa.DataType) -> pa.Array:
    try:
        return column.cast(kind)
    except (pa.ArrowNotImplementedError, pa.ArrowTypeError) as error:
        raise TableError(f"{file}: its column {name} is of type {column.type}; it must hold text") from error


def _spelled(column: pa.Array) -> pa.StringArray:
    """An annotation as text: lists and structs in JSON, all else as Arrow or else Python writes it."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    try:
        if pa.types.is_nested(column.type):
            spell: Callable[[Any], str] = partial(json.dumps, ensure_ascii=False, default=_in_json)
        elif pa.types.is_duration(column.type):
            # Arrow would write a number, without its unit.
            spell = str
        else:
            return _texts("", "", column)
    except TableError:
        spell = str
    values = column.to_pylist()
    return _texts("", "", pa.array(["" if value is None else spell(value) for value in values], pa.string()))


def _in_json(value: Any) -> str:
    return printable(value) if isinstance(value, bytes) else str(value)


def _texts(file: str, name: str, column: pa.Array) -> pa.StringArray:
    """A column of any type as text that every output can hold."""
    try:
        texts = _cast(file, name, column, pa.string()).fill_null("")
        texts.validate(full=True)
        if not pc.any(pc.match_substring_regex(texts, r"[\x00-\x08\x0e-\x1b\x7f-\x{84}\x{86}-\x{9f}]")).as_py():
            return texts
        column = texts
    except pa.ArrowInvalid:
        pass
    return pa.array([printable(text or b"") for text in column.cast(pa.binary()).to_pylist()], pa.string())
