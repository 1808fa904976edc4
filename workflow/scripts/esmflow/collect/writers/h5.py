"""`h5`: one `embeddings.h5` for the whole run. Layout: docs/formats.md."""

from __future__ import annotations

from typing import Any

import h5py
import numpy as np

from esmflow.collect.writers.base import Batch, EmbeddingWriter, Numbering

_CHUNK_BYTES = 1 << 20
_FEWEST_ROWS = 16


class H5Writer(EmbeddingWriter):
    """Appends block by block, in bounded memory."""

    def open(self) -> None:
        self._file = new_h5(self, "embeddings.h5")
        self._file.attrs.update(self.description.attributes())
        self._samples = Numbering()

    def add(self, batch: Batch) -> None:
        array = self.description.array
        append(self._file, "ids", batch.ids)
        append(self._file, "sample_numbers", self._samples.encode(batch.records["sample"]))
        append(self._file, "embeddings", batch.arrays[array])
        if not array.is_pooled:
            offsets = array.offsets(batch.lengths)
            following = "offsets" in self._file
            append(self._file, "offsets", self._file["offsets"][-1] + offsets[1:] if following else offsets)

    def finish(self) -> None:
        self._file.create_dataset("samples", data=np.array(self._samples.names, h5py.string_dtype()))


def new_h5(writer: EmbeddingWriter, name: str, **options: Any) -> h5py.File:
    """A new HDF5 file of a writer's.

    Without HDF5's own lock: nobody else knows the file's name, and there are file systems that have no locks.
    """
    return writer.enter(h5py.File(writer.new_file(name), "w", locking=False, **options))


def append(group: h5py.Group, name: str, values: np.ndarray) -> h5py.Dataset:
    """Adds rows to a dataset, which the first of them make. Objects are strings.

    Chunks have about a megabyte, or the first rows, if those are less: then they are most often all that there are.
    """
    if name in group:
        dataset = group[name]
        dataset.resize(len(dataset) + len(values), axis=0)
        dataset[len(dataset) - len(values) :] = values
        return dataset
    dtype = h5py.string_dtype() if values.dtype == object else values.dtype
    if not len(values):
        return group.create_dataset(name, data=values, dtype=dtype)
    rows = _CHUNK_BYTES // max(int(dtype.itemsize * np.prod(values.shape[1:])), 128)
    chunks = (min(max(rows, 1), max(len(values), _FEWEST_ROWS)), *values.shape[1:])
    return group.create_dataset(name, data=values, dtype=dtype, chunks=chunks, maxshape=(None, *values.shape[1:]))
