"""`npy`: `embeddings.npy` and `ids.npy`, made to be mapped. Layout: docs/formats.md."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa

from esmflow.collect.writers.base import Batch, Description, EmbeddingWriter
from esmflow.files import atomic_path, write_json


class NpyWriter(EmbeddingWriter):
    """Appends block by block, in bounded memory. What is not known before the end is written at the end."""

    def __init__(self, folder: Path, descriptions: Sequence[Description]) -> None:
        super().__init__(folder, descriptions)
        self._files = ExitStack()
        # Open until it is whole: a file that is left behind would pass for a complete one.
        self._vectors = _NpyFile(self._files.enter_context(atomic_path(folder / "embeddings.npy")))
        # Ids have one width in a file that can be mapped, and the widest may come last: they wait in one without.
        self._ids = self._files.enter_context(tempfile.TemporaryFile(dir=folder))
        self._widths: list[np.ndarray] = []
        self._rows: list[np.ndarray] = []

    def add(self, batch: Batch) -> None:
        self._vectors.append(batch.arrays[self.description.array])
        text, widths = _utf8(batch.records["id"].combine_chunks())
        self._ids.write(text)
        self._widths.append(widths)
        if not self.description.array.is_pooled:
            self._rows.append(self.description.array.rows(batch.lengths))

    def close(self) -> None:
        with atomic_path(self.folder / "ids.npy") as path:
            self._write_ids(path)
        if not self.description.array.is_pooled:
            with atomic_path(self.folder / "offsets.npy") as path, open(path, "wb") as handle:
                np.save(handle, np.concatenate([np.zeros(1, np.int64), *self._rows]).cumsum())
        write_json(self.folder / "description.json", self.description.attributes())
        self._vectors.close()
        self._files.close()

    def _write_ids(self, path: Path) -> None:
        widest = max(1, *(int(widths.max()) for widths in self._widths), 1)
        self._ids.seek(0)
        file = _NpyFile(path)
        file.append(np.empty(0, f"S{widest}"))
        for widths in self._widths:
            ends = np.cumsum(widths)
            text = np.frombuffer(self._ids.read(int(ends[-1])), np.uint8)
            padded = np.zeros((len(widths), widest), np.uint8)
            padded[np.arange(widest) < widths[:, None]] = text
            file.append(padded.view(f"S{widest}")[:, 0])
        file.close()


def _utf8(ids: pa.StringArray) -> tuple[memoryview, np.ndarray]:
    """Strings end to end, and the bytes of each."""
    _, offsets, text = ids.buffers()
    ends = np.frombuffer(offsets, np.int32)[ids.offset : ids.offset + len(ids) + 1]
    return memoryview(text or b"")[ends[0] : ends[-1]], np.diff(ends)


class _NpyFile:
    """An `.npy` file that grows: its header is written again, in the room that NumPy leaves, when the size is known."""

    def __init__(self, path: Path) -> None:
        self._handle: BinaryIO = open(path, "wb")
        self._rows = 0
        self._row: tuple[int, ...] = (0,)
        self._dtype: np.dtype | None = None

    def append(self, values: np.ndarray) -> None:
        if self._dtype is None:
            self._dtype, self._row = values.dtype, values.shape[1:]
            self._write_header()
        self._handle.write(np.ascontiguousarray(values).data)
        self._rows += len(values)

    def close(self) -> None:
        if self._dtype is None:
            self._dtype = np.dtype(np.float32)
        self._handle.seek(0)
        self._write_header()
        self._handle.close()

    def _write_header(self) -> None:
        assert self._dtype is not None
        content = {
            "descr": np.lib.format.dtype_to_descr(self._dtype),
            "fortran_order": False,
            "shape": (self._rows, *self._row),
        }
        np.lib.format.write_array_header_1_0(self._handle, content)
