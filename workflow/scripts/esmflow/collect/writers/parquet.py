"""`parquet`: one `embeddings.parquet` with a fixed-size list column. Layout: docs/formats.md.

Written by Polars: Arrow's own writer looks at every value of a list by itself and is five times slower.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from queue import Full, Queue

import pyarrow as pa

from esmflow.collect.writers.base import Batch, EmbeddingWriter

# Each of its threads holds vectors, and two are as fast as a disk. It looks at this once, when it is imported.
os.environ.setdefault("POLARS_MAX_THREADS", "2")
import polars as pl
from polars.io.plugins import register_io_source

_COLUMNS = ("id", "sample", "file", "record", "length")
_GROUP_BYTES = 16 << 20


class ParquetWriter(EmbeddingWriter):
    """Writes row groups of about 16 MB; a reader can take one at a time."""

    def open(self) -> None:
        self._path = self.new_file("embeddings.parquet")
        self._write: Callable[[pa.Table], None] | None = None

    def add(self, batch: Batch) -> None:
        values = batch.arrays[self.description.array]
        vectors: pa.Array = pa.array(values.reshape(-1))
        if values.ndim > 1:
            vectors = pa.FixedSizeListArray.from_arrays(vectors, max(1, values.shape[1]))
        if not self.description.array.is_pooled:
            offsets = pa.array(self.description.array.offsets(batch.lengths), pa.int64())
            vectors = pa.LargeListArray.from_arrays(offsets, vectors)
        columns = [batch.records[name] for name in _COLUMNS]
        table = pa.table([*columns, vectors], names=[*_COLUMNS, "embedding"])
        rows = max(1, len(table) * _GROUP_BYTES // max(values.nbytes, 1))
        if self._write is None:
            metadata = {name: str(value) for name, value in self.description.attributes().items()}
            self._write = self.enter(_writing(self._path, table, rows, metadata))
        for start in range(0, len(table), rows):
            self._write(table.slice(start, rows))


@contextmanager
def _writing(
    path: Path, like: pa.Table, rows_per_group: int, metadata: dict[str, str]
) -> Iterator[Callable[[pa.Table], None]]:
    """A Parquet file that Polars writes in threads of its own; gives the function that hands it tables, one by one.

    like: has the columns of the tables that will follow. Polars fetches what it writes: one table waits until it is
    fetched, so that memory is bounded. What ends the writing is raised by the next call, or at the end of the block.
    """
    waiting: Queue[pa.Table | None] = Queue(1)

    def fetch() -> Iterator[pl.DataFrame]:
        while (table := waiting.get()) is not None:
            yield _as_frame(table)

    def hand_over(table: pa.Table | None) -> None:
        """Waits until Polars has fetched the table before, or fetches no more. None is the end."""
        while not writing.done():
            try:
                return waiting.put(table, timeout=0.5)
            except Full:
                continue
        if table is not None:
            check()

    def check() -> None:
        try:
            writing.result()
        except pl.exceptions.PolarsError as error:
            raise OSError(f"{path.parent}: embeddings.parquet cannot be written ({error})") from error

    tables = register_io_source(lambda *_: fetch(), schema=_as_frame(like.slice(0, 0)).schema)
    with ThreadPoolExecutor(1) as thread:
        writing = thread.submit(
            tables.sink_parquet,
            path,
            # Vectors do not get smaller.
            compression="uncompressed",
            statistics=False,
            row_group_size=rows_per_group,
            metadata=metadata,
        )
        try:
            yield hand_over
        finally:
            # Else its thread would wait for tables for ever.
            hand_over(None)
    check()


def _as_frame(table: pa.Table) -> pl.DataFrame:
    frame = pl.from_arrow(table)
    assert isinstance(frame, pl.DataFrame)
    return frame
