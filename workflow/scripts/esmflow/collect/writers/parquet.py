"""`parquet`: one `embeddings.parquet` with a fixed-size list column. Layout: docs/formats.md.

Written by Polars: Arrow's own writer looks at every value of a list by itself and is five times slower.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Full, Queue

import pyarrow as pa
import pyarrow.parquet as pq

from esmflow.collect.tables import MANIFEST_SCHEMA
from esmflow.collect.writers.base import Batch, Description, EmbeddingWriter
from esmflow.files import atomic_path

# Each of its threads holds vectors, and two are as fast as a disk. It looks at this once, when it is imported.
os.environ.setdefault("POLARS_MAX_THREADS", "2")
import polars as pl
from polars.io.plugins import register_io_source

_COLUMNS = ("id", "sample", "file", "record", "length")
_GROUP_BYTES = 16 << 20


class ParquetWriter(EmbeddingWriter):
    """Writes row groups of about 16 MB; a reader can take one at a time."""

    def __init__(self, folder: Path, descriptions: Sequence[Description]) -> None:
        super().__init__(folder, descriptions)
        self._target = atomic_path(folder / "embeddings.parquet")
        self._path = self._target.__enter__()
        self._metadata = {name: str(value) for name, value in self.description.attributes().items()}
        self._sink: _Sink | None = None

    def add(self, batch: Batch) -> None:
        values = batch.arrays[self.description.array]
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])
        if not self.description.array.is_pooled:
            offsets = pa.array(self.description.array.offsets(batch.lengths), pa.int64())
            vectors = pa.LargeListArray.from_arrays(offsets, vectors)
        table = _table([batch.records[name] for name in _COLUMNS], vectors)
        rows = max(1, len(table) * _GROUP_BYTES // max(values.nbytes, 1))
        if self._sink is None:
            self._sink = _Sink(self._path, table, rows, self._metadata)
        for start in range(0, len(table), rows):
            self._sink.write(table.slice(start, rows))

    def close(self) -> None:
        if self._sink is None:
            empty = _table([pa.array([], MANIFEST_SCHEMA.field(name).type) for name in _COLUMNS], _NO_VECTORS)
            pq.write_table(empty.replace_schema_metadata(self._metadata), self._path)
        else:
            self._sink.close()
        self._target.__exit__(None, None, None)

    def abandon(self) -> None:
        if self._sink is not None:
            self._sink.abandon()


_NO_VECTORS = pa.array([], pa.list_(pa.float32(), 0))


def _table(columns: Sequence[pa.Array | pa.ChunkedArray], vectors: pa.Array) -> pa.Table:
    return pa.table([*columns, vectors], names=[*_COLUMNS, "embedding"])


class _Sink:
    """A Parquet file that Polars writes in threads of its own, from tables that are handed over one by one.

    Polars fetches what it writes: one table waits until it is fetched, so that memory is bounded.
    """

    def __init__(self, path: Path, like: pa.Table, rows_per_group: int, metadata: Mapping[str, str]) -> None:
        """like: has the columns of the tables that will follow."""
        self._path = path
        self._waiting: Queue[pa.Table | None] = Queue(1)
        tables = register_io_source(lambda *_: self._fetch(), schema=_as_frame(like.slice(0, 0)).schema)
        self._thread = ThreadPoolExecutor(1)
        self._writing = self._thread.submit(
            tables.sink_parquet,
            path,
            # Vectors do not get smaller.
            compression="uncompressed",
            statistics=False,
            row_group_size=rows_per_group,
            metadata=dict(metadata),
        )

    def write(self, table: pa.Table) -> None:
        """Hands over a table. Raises what has ended the writing."""
        if not self._hand_over(table):
            self._wait_for_end()

    def close(self) -> None:
        """Returns when the file is whole. Raises what has ended the writing."""
        self._hand_over(None)
        self._wait_for_end()
        self._thread.shutdown()

    def abandon(self) -> None:
        """Ends the thread, which would wait for tables for ever. Does nothing if it has ended."""
        self._hand_over(None)
        self._thread.shutdown()

    def _hand_over(self, table: pa.Table | None) -> bool:
        """Waits until Polars has fetched the table before. False if it fetches no more. None is the end."""
        while not self._writing.done():
            try:
                self._waiting.put(table, timeout=0.5)
                return True
            except Full:
                continue
        return False

    def _wait_for_end(self) -> None:
        try:
            self._writing.result()
        except pl.exceptions.PolarsError as error:
            raise OSError(f"{self._path.parent}: embeddings.parquet cannot be written ({error})") from error

    def _fetch(self) -> Iterator[pl.DataFrame]:
        while (table := self._waiting.get()) is not None:
            yield _as_frame(table)


def _as_frame(table: pa.Table) -> pl.DataFrame:
    frame = pl.from_arrow(table)
    assert isinstance(frame, pl.DataFrame)
    return frame
