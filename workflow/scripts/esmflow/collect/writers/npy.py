"""`npy`: `embeddings.npy` and `ids.npy`, made to be mapped. Layout: docs/formats.md."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np

from esmflow.collect.tables import utf8
from esmflow.collect.writers.base import Batch, EmbeddingWriter
from esmflow.files import write_json


class NpyWriter(EmbeddingWriter):
    """Appends block by block, in bounded memory. What is not known before the end is written at the end."""

    def open(self) -> None:
        # Open until it is whole: a file that is left behind would pass for a complete one.
        self._vectors = self.enter(_growing(self.new_file("embeddings.npy")))
        # Ids have one width in a file that can be mapped, and the widest may come last: they wait in one without.
        self._ids = self.enter(tempfile.TemporaryFile(dir=self.folder))
        self._widths: list[np.ndarray] = []
        self._rows: list[np.ndarray] = []

    def add(self, batch: Batch) -> None:
        self._vectors.append(batch.arrays[self.description.array])
        text, widths = utf8(batch.records["id"].combine_chunks())
        self._ids.write(text)
        self._widths.append(widths)
        self._rows.append(self.description.array.rows(batch.lengths))

    def finish(self) -> None:
        self._write_ids()
        if not self.description.array.is_pooled:
            with open(self.new_file("offsets.npy"), "wb") as handle:
                np.save(handle, np.concatenate([np.zeros(1, np.int64), *self._rows]).cumsum())
        write_json(self.folder / "description.json", self.description.attributes())

    def _write_ids(self) -> None:
        widest = max(int(widths.max(initial=1)) for widths in self._widths)
        self._ids.seek(0)
        with _growing(self.new_file("ids.npy")) as file:
            for widths in self._widths:
                text = np.frombuffer(self._ids.read(int(widths.sum())), np.uint8)
                padded = np.zeros((len(widths), widest), np.uint8)
                padded[np.arange(widest) < widths[:, None]] = text
                file.append(padded.view(f"S{widest}")[:, 0])


@contextmanager
def _growing(path: Path) -> Iterator[_NpyFile]:
    with open(path, "wb") as handle:
        file = _NpyFile(handle)
        yield file
        handle.seek(0)
        file.write_header()


class _NpyFile:
    """An `.npy` file that grows: its header is written again, in the room that NumPy leaves, when the size is known."""

    def __init__(self, handle: BinaryIO) -> None:
        self._handle = handle
        self._rows = 0
        self._like: np.ndarray | None = None

    def append(self, values: np.ndarray) -> None:
        if self._like is None:
            self._like = values[:0].copy()
            self.write_header()
        self._handle.write(np.ascontiguousarray(values).data)
        self._rows += len(values)

    def write_header(self) -> None:
        assert self._like is not None
        content = np.lib.format.header_data_from_array_1_0(self._like)
        np.lib.format.write_array_header_1_0(self._handle, {**content, "shape": (self._rows, *self._like.shape[1:])})
