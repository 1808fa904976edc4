"""The table of records: one row for every FASTA entry, written while planning and joined while collecting."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from esmflow.failures import Reason
from esmflow.files import atomic_path
from esmflow.inputs.records import Record, RecordBlock
from esmflow.inputs.residues import DIGEST_BYTES
from esmflow.threads import Background

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
# Of the others hardly a value comes twice.
_DICTIONARIES = ["sample", "file", "reason", "detail"]
# Names that a run's tables use, or AnnData: an annotation of such a name is called input_NAME.
_TAKEN = frozenset(
    (
        *RECORD_SCHEMA.names,
        "record",
        "status",
        "truncated",
        "windowed",
        "precision",
        "segment",
        "row",
        "_index",
        "embedding",
    )
)
_NOTHING: Mapping[str, str] = MappingProxyType({})
_REASON_NUMBER = {reason: number for number, reason in enumerate(Reason)}


class RecordTable:
    """Writes `records.parquet` block by block in bounded memory; the file appears whole when the block ends.

    Compression is done in a thread of its own. annotations: the names of what the inputs say about records besides;
    each is a column behind the others.
    """

    def __init__(self, path: str | os.PathLike[str], annotations: Sequence[str] = ()) -> None:
        self._path = path
        self._annotations = annotations
        self._schema = pa.schema([*RECORD_SCHEMA, *((name, _TEXT) for name in _free_names(annotations))])
        self._waiting: list[pa.RecordBatch] = []
        self._rows = 0

    def __enter__(self) -> RecordTable:
        with ExitStack() as stack:
            temporary = stack.enter_context(atomic_path(self._path))
            self._writer = stack.enter_context(
                pq.ParquetWriter(
                    temporary,
                    self._schema,
                    compression="zstd",
                    use_dictionary=[*_DICTIONARIES, *self._schema.names[len(RECORD_SCHEMA) :]],
                )
            )
            self._writing = stack.enter_context(Background())
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        with self._stack:
            if error[0] is not None:
                raise error[1]
            self._flush(last=True)

    def add(self, sample: str, record: Record, digest: bytes | None) -> None:
        """Adds one record; `digest` is None for a rejected one."""
        block = RecordBlock(
            record.file,
            record.position,
            pa.array([record.id]),
            pa.array([record.description]),
            record.sequence.encode(),
            np.array([record.length]),
            np.frombuffer(digest or b"", np.uint8).reshape(-1, DIGEST_BYTES),
            {0: record.reason} if record.reason else {},
            {0: record.detail} if record.detail else {},
        )
        self.add_block(sample, block)

    def add_block(self, sample: str, block: RecordBlock, about: Mapping[str, str] = _NOTHING) -> None:
        """Adds a block of records; about: annotations of all of them, where they have none of that name themselves."""
        rows = len(block)
        valid = block.valid()
        reasons = np.zeros(rows, np.int32)
        details = [""] * rows
        for i, reason in block.reasons.items():
            reasons[i] = _REASON_NUMBER[reason]
        for i, detail in block.details.items():
            details[i] = detail
        digests = np.zeros((rows, DIGEST_BYTES), np.uint8)
        digests[valid] = block.digests
        buffers = [pa.array(valid).buffers()[1], pa.py_buffer(digests)]
        self._waiting.append(
            pa.RecordBatch.from_arrays(
                [
                    _same(sample, rows),
                    _same(block.file, rows),
                    pa.array(np.arange(block.first_position, block.first_position + rows)),
                    block.ids,
                    block.descriptions,
                    pa.array(block.lengths),
                    pa.Array.from_buffers(pa.binary(DIGEST_BYTES), rows, buffers),
                    pa.DictionaryArray.from_arrays(pa.array(reasons, mask=valid), pa.array(list(_REASON_NUMBER))),
                    pa.array(details),
                    *(
                        block.annotations[name].dictionary_encode()
                        if name in block.annotations
                        else _same(about.get(name, ""), rows)
                        for name in self._annotations
                    ),
                ],
                schema=self._schema,
            )
        )
        self._rows += rows
        if self._rows >= ROWS_PER_GROUP:
            self._flush()

    def _flush(self, last: bool = False) -> None:
        """Hands whole row groups to the thread, and at the end what is left."""
        table = pa.Table.from_batches(self._waiting, self._schema)
        rows = len(table) if last else len(table) - len(table) % ROWS_PER_GROUP
        self._waiting = table.slice(rows).to_batches()
        self._rows = len(table) - rows
        if rows:
            self._writing.run(self._write, table.slice(0, rows))

    def _write(self, table: pa.Table) -> None:
        self._writer.write_table(table.unify_dictionaries(), ROWS_PER_GROUP)


def _free_names(annotations: Sequence[str]) -> list[str]:
    """The names of their columns: their own, where they are not taken."""
    names: list[str] = []
    for name in annotations:
        while name in _TAKEN or name in names:
            name = f"input_{name}"
        names.append(name)
    return names


def _same(value: str, rows: int) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(np.zeros(rows, np.int32), pa.array([value]))
