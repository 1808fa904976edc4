"""`parquet`: one `embeddings.parquet` with a fixed-size list column. Layout: docs/formats.md."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from esmflow.engine import is_pooled, row_offsets
from esmflow.files import atomic_path
from esmflow.tables import MANIFEST_SCHEMA
from esmflow.writers.base import Batch, Description, EmbeddingWriter

_COLUMNS = ("id", "sample", "file", "record", "length")
# The writer needs several times this much beside it.
_GROUP_BYTES = 16 << 20


class ParquetWriter(EmbeddingWriter):
    """Writes row groups of about 16 MB; a reader can take one at a time."""

    def __init__(self, folder: Path, descriptions: Sequence[Description]) -> None:
        super().__init__(folder, descriptions)
        self._target = atomic_path(folder / "embeddings.parquet")
        self._path = self._target.__enter__()
        self._writer: pq.ParquetWriter | None = None

    def add(self, batch: Batch) -> None:
        values = batch.arrays[self.description.array]
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), type=_vector(values))
        if not is_pooled(self.description.array):
            offsets = pa.array(row_offsets(self.description.array, batch.lengths), pa.int64())
            vectors = pa.LargeListArray.from_arrays(offsets, vectors, type=pa.large_list(_item(vectors.type)))
        if self._writer is None:
            self._writer = self._open(vectors.type)
        columns = [batch.records[name] for name in _COLUMNS]
        table = pa.table([*columns, vectors], schema=self._writer.schema)
        self._writer.write_table(table, row_group_size=max(1, len(table) * _GROUP_BYTES // max(values.nbytes, 1)))

    def close(self) -> None:
        if self._writer is None:
            self._writer = self._open(pa.list_(_item(pa.float32()), 0))
        self._writer.close()
        self._target.__exit__(None, None, None)

    def _open(self, vectors: pa.DataType) -> pq.ParquetWriter:
        fields = [MANIFEST_SCHEMA.field(name) for name in _COLUMNS]
        metadata = {name: str(value) for name, value in self.description.attributes().items()}
        schema = pa.schema([*fields, pa.field("embedding", vectors, nullable=False)], metadata)
        # Vectors do not get smaller, and repeat nothing that a dictionary could hold.
        leaf = "embedding" + ".list.element" * str(vectors).count("list<")
        compression = {**dict.fromkeys(_COLUMNS, "zstd"), leaf: "none"}
        return pq.ParquetWriter(
            self._path, schema, compression=compression, use_dictionary=["sample", "file"], write_statistics=["id"]
        )


def _vector(values: np.ndarray) -> pa.DataType:
    return pa.list_(_item(pa.from_numpy_dtype(values.dtype)), values.shape[1])


def _item(value_type: pa.DataType) -> pa.Field:
    return pa.field("element", value_type, nullable=False)
