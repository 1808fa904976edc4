"""`h5`: one `embeddings.h5` for the whole run. Layout: docs/formats.md."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np

from esmflow.collect.writers.base import Batch, Description, EmbeddingWriter
from esmflow.files import atomic_path

_CHUNK_BYTES = 1 << 20


class H5Writer(EmbeddingWriter):
    """Appends block by block, in bounded memory."""

    def __init__(self, folder: Path, descriptions: Sequence[Description]) -> None:
        super().__init__(folder, descriptions)
        self._target = atomic_path(folder / "embeddings.h5")
        self._file = h5py.File(self._target.__enter__(), "w")
        self._file.attrs.update(self.description.attributes())
        self._ids = growing(self._file, "ids", (), h5py.string_dtype())
        self._embeddings: h5py.Dataset | None = None
        self._offsets: h5py.Dataset | None = None
        if not self.description.array.is_pooled:
            self._offsets = self._file.create_dataset("offsets", (1,), np.int64, maxshape=(None,), chunks=(8192,))

    def add(self, batch: Batch) -> None:
        vectors = batch.arrays[self.description.array]
        if self._embeddings is None:
            self._embeddings = growing(self._file, "embeddings", vectors.shape[1:], vectors.dtype)
        append(self._embeddings, vectors)
        append(self._ids, batch.ids)
        if self._offsets is not None:
            rows = self.description.array.rows(batch.lengths)
            append(self._offsets, self._offsets[-1] + np.cumsum(rows))

    def close(self) -> None:
        if self._embeddings is None:
            self._file.create_dataset("embeddings", (0, 0), np.float32)
        self._file.close()
        self._target.__exit__(None, None, None)


def growing(group: h5py.Group, name: str, row: tuple[int, ...], dtype: np.dtype | type) -> h5py.Dataset:
    """An empty dataset that `append` adds rows of shape `row` to, in chunks of about a megabyte."""
    rows = max(1, _CHUNK_BYTES // max(int(np.dtype(dtype).itemsize * np.prod(row)), 128))
    return group.create_dataset(name, (0, *row), dtype, maxshape=(None, *row), chunks=(rows, *row))


def append(dataset: h5py.Dataset, values: np.ndarray) -> None:
    """Adds rows at the end."""
    start = dataset.shape[0]
    dataset.resize(start + len(values), axis=0)
    dataset[start:] = values
