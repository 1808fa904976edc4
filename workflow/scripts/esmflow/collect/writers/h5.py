"""`h5`: one `embeddings.h5` for the whole run. Layout: docs/formats.md."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from esmflow.collect.writers.base import Batch, EmbeddingWriter, Numbering

_CHUNK_BYTES = 1 << 20
_FEWEST_ROWS = 16


class Hdf5Writer(EmbeddingWriter):
    """What formats in HDF5 have in common."""

    def new_h5(self, name: str, **options: Any) -> h5py.File:
        """A new HDF5 file. There are no locks: nobody else knows its name, and there are file systems without any."""
        self._disk = self.enter(_Disk(self.new_file(name)))
        return self.enter(h5py.File(self._disk, "w", **options))

    def check_disk(self) -> None:
        """Raises what went wrong with the file, if anything has."""
        if self._disk.error is not None:
            raise self._disk.error

    def append(self, group: h5py.Group, name: str, values: np.ndarray) -> h5py.Dataset:
        """Adds rows to a dataset, which the first of them make. Objects are strings.

        Chunks have about a megabyte, or the first rows, if those are less: then they are most often all that there are.
        """
        if name in group:
            dataset = group[name]
            dataset.resize(len(dataset) + len(values), axis=0)
            dataset[len(dataset) - len(values) :] = values
        else:
            dtype = h5py.string_dtype() if values.dtype == object else values.dtype
            layout: dict[str, Any] = {}
            if len(values):
                rows = _CHUNK_BYTES // max(int(dtype.itemsize * np.prod(values.shape[1:])), 128)
                chunks = (min(max(rows, 1), max(len(values), _FEWEST_ROWS)), *values.shape[1:])
                layout = {"chunks": chunks, "maxshape": (None, *values.shape[1:])}
            dataset = group.create_dataset(name, data=values, dtype=dtype, **layout)
        self.check_disk()
        return dataset


class _Disk(io.RawIOBase):
    """The file that HDF5 writes to, as h5py takes it: one in which writing never seems to fail.

    HDF5 ends the process with a segmentation fault when it closes a file whose disk is full. So the first error is
    kept, what cannot be written is remembered for the few times that HDF5 reads it again, and the error is raised by
    `Hdf5Writer.check_disk`, or at the end of the block.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._file = open(path, "w+b", buffering=0)
        self._lost: dict[int, bytes] = {}
        self.error: OSError | None = None

    def __enter__(self) -> _Disk:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._file.close()
        if kind is None and self.error is not None:
            raise self.error

    def seek(self, offset: int, whence: int = 0, /) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def write(self, data: Any, /) -> int:
        left = memoryview(data).cast("B")
        begin = self._file.tell()
        try:
            while left and self.error is None:
                left = left[self._file.write(left) :]
        except OSError as error:
            self.error = OSError(error.errno, error.strerror, str(self._file.name))
        if left:
            self._lost[begin] = bytes(data)
        return len(data)

    def readinto(self, buffer: Any, /) -> int:
        lost = self._lost.get(self._file.tell(), b"")[: len(buffer)]
        read = self._file.readinto(buffer)
        buffer[: len(lost)] = lost
        # HDF5 would take less than it asks for as an error too.
        return max(read, len(buffer) if self.error else len(lost))

    def truncate(self, size: int | None = None, /) -> int:
        try:
            return self._file.truncate(size)
        except OSError as error:
            self.error = self.error or error
            return size or 0

    def flush(self) -> None:
        """Nothing is buffered."""


class H5Writer(Hdf5Writer):
    """Appends block by block, in bounded memory."""

    def open(self) -> None:
        self._file = self.new_h5("embeddings.h5")
        self._file.attrs.update(self.description.attributes())
        self._samples = Numbering()

    def add(self, batch: Batch) -> None:
        array = self.description.array
        self.append(self._file, "ids", batch.ids)
        self.append(self._file, "sample_numbers", self._samples.encode(batch.records["sample"]))
        self.append(self._file, "embeddings", batch.arrays[array])
        if not array.is_pooled:
            offsets = array.offsets(batch.lengths)
            following = "offsets" in self._file
            self.append(self._file, "offsets", self._file["offsets"][-1] + offsets[1:] if following else offsets)

    def finish(self) -> None:
        self._file.create_dataset("samples", data=np.array(self._samples.names, h5py.string_dtype()))
