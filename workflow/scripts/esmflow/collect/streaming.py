"""Pass vectors from segments to writers in pieces of bounded size, in the order of the records."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Self

import numpy as np
import pyarrow as pa

from esmflow.arrays import Array
from esmflow.collect.joining import CollectError, Joined
from esmflow.collect.sequences import InputSequences
from esmflow.collect.tables import MANIFEST_SCHEMA
from esmflow.collect.writers.base import Batch, EmbeddingWriter
from esmflow.store.gather import Location, SegmentIndex
from esmflow.threads import Background

# Large enough that what is near in a segment is read together, small enough for a laptop: two pieces live at once, one
# being gathered and one being written.
_PIECE_BYTES = 96 << 20
# What writers want to know of a record.
_COLUMNS = ["sample", "file", "record", "id", "description", "length", "digest"]
_NOWHERE = Location(*(np.empty(0, np.int32) for _ in range(3)))
_HALF = np.dtype(np.float16)
# The bits of fp16's infinities.
_INFINITE, _NEGATIVE_INFINITE = 0x7C00, 0xFC00


@dataclass(frozen=True)
class _Run:
    """Records of one input file that follow one another; `begins` if they are its first."""

    file: str
    begins: bool
    records: pa.Table
    location: Location


class VectorStream:
    """Gathers the vectors of records that follow one another and hands them to writers, file by file.

    Memory is bounded by two pieces, except where a single record has more.
    """

    def __init__(
        self,
        index: SegmentIndex,
        writers: Sequence[EmbeddingWriter],
        sequences: InputSequences,
        half: bool,
        writing: Background,
    ) -> None:
        self._index = index
        self._writers = writers
        self._sequences = sequences if any(writer.wants_sequences for writer in writers) else None
        self._half = half
        self._writing = writing
        self._waiting: list[_Run] = []
        self._bytes = 0
        self._file: str | None = None
        self._written = False

    @classmethod
    @contextmanager
    def open(
        cls, index: SegmentIndex, writers: Sequence[EmbeddingWriter], sequences: InputSequences, half: bool
    ) -> Iterator[Self]:
        """half: pooled vectors are rounded to fp16. The writers' files are complete after the block."""
        with ExitStack() as opened:
            for writer in writers:
                opened.enter_context(writer)
            stream = cls(index, writers, sequences, half, opened.enter_context(Background()))
            yield stream
            stream._flush()
            if not stream._written:
                stream._write_nothing()

    def add(self, file: str, joined: Joined) -> None:
        """Takes records of one input file. Those without a vector are left out."""
        if not self._writers:
            return
        begins, self._file = file != self._file, file
        embedded = joined.embedded()
        ends = np.cumsum(self._bytes_of(embedded.location.lengths))
        start = 0
        while start < len(ends) or begins:
            before = ends[start - 1] if start else 0
            end = int(np.searchsorted(ends, before + _PIECE_BYTES - self._bytes, "right"))
            if end == start and start < len(ends) and not self._waiting:
                end += 1  # A record that is larger than a piece is one of its own.
            part = slice(start, end)
            annotations = embedded.table.column_names[len(MANIFEST_SCHEMA) :]
            records = embedded.table.select([*_COLUMNS, *annotations])[part]
            self._waiting.append(_Run(file, begins, records, embedded.location[part]))
            self._bytes += int(ends[end - 1] - before) if end > start else 0
            start, begins = end, False
            if start < len(ends):
                self._flush()

    def _bytes_of(self, lengths: np.ndarray) -> np.ndarray:
        total = np.zeros(len(lengths), np.int64)
        for array in self._arrays():
            shape, dtype = self._index.shapes.get(array, ((), np.dtype(np.float32)))
            size = _HALF.itemsize if self._rounds(array) else dtype.itemsize
            total += array.rows(lengths) * int(np.prod(shape)) * size
        return total

    def _arrays(self) -> list[Array]:
        return sorted({array for writer in self._writers for array in writer.arrays})

    def _rounds(self, array: Array) -> bool:
        return self._half and array.is_vector

    def _flush(self) -> None:
        runs, self._waiting, self._bytes = self._waiting, [], 0
        if runs:
            piece = self._gather(runs)
            self._written = self._written or len(piece) > 0
            self._writing.run(self._write, runs, piece)

    def _write_nothing(self) -> None:
        """Of a run in which nothing was embedded the files are empty, and no less complete."""
        self._writing.wait()
        nobody = MANIFEST_SCHEMA.empty_table().select(_COLUMNS)
        for writer in self._writers:
            if not writer.by_file:
                writer.add(self._gather([_Run("", False, nobody, _NOWHERE)]))

    def _write(self, runs: Sequence[_Run], piece: Batch) -> None:
        for writer in self._writers:
            if not writer.by_file:
                if len(piece):
                    writer.add(piece)
                continue
            start = 0
            for run in runs:
                if run.begins:
                    writer.begin_file(run.file)
                if len(run.records):
                    writer.add(piece.part(start, start + len(run.records)))
                start += len(run.records)

    def _gather(self, runs: Sequence[_Run]) -> Batch:
        records = pa.concat_tables([run.records for run in runs], promote_options="default").combine_chunks()
        location = Location(
            *(np.concatenate([getattr(run.location, name) for run in runs]) for name in ("segments", "rows", "lengths"))
        )
        # A store without a segment does not say how wide they are.
        arrays = {array: np.empty((0, 0), np.float32) for array in self._arrays()}
        for array in arrays.keys() & self._index.shapes.keys():
            rounds = self._rounds(array)
            arrays[array] = self._index.gather(location, array, to_half if rounds else None)
            if rounds:
                _check_range(array, arrays[array], records)
        sequences = self._sequences.of(records) if self._sequences else ()
        return Batch(records, arrays, location.lengths, sequences)


def to_half(values: np.ndarray) -> np.ndarray:
    """fp16 values. By torch, whose conversion is ten times as fast as NumPy's."""
    import torch

    # Threads would wait for one another longer than they work: there are a few hundred vectors at a time.
    torch.set_num_threads(1)
    return torch.from_numpy(values).half().numpy()


def _check_range(array: Array, values: np.ndarray, records: pa.Table) -> None:
    """Raises CollectError for a record with a value that fp16 cannot hold. Segments hold finite values only."""
    # As integers, the bits of infinities are the largest of each sign, and are compared far faster than as fp16.
    bits = values.view(np.int16), values.view(np.uint16)
    if bits[0].max(initial=0) < _INFINITE and bits[1].max(initial=0) < _NEGATIVE_INFINITE:
        return
    beyond = np.flatnonzero(~np.isfinite(values).all(axis=1))
    record = records.slice(int(beyond[0]), 1).to_pylist()[0]
    raise CollectError(
        f"{record['file']}, record {record['record']} ({record['id']}): {array} has a value beyond 65504, the largest "
        "that fp16 holds; set pooled_precision: fp32"
    )
