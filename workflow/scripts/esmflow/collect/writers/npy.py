"""`npy`: `embeddings.npy` and `ids.npy`, made to be mapped. Layout: docs/formats.md."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, BinaryIO

import numpy as np

from esmflow.collect.tables import utf8
from esmflow.collect.writers.base import Batch, EmbeddingWriter, Numbering
from esmflow.files import shortened, write_json

# Ids of up to so many bytes are ordinary; files of ids up to this size need no care.
_ORDINARY = 100
_SMALL = 1 << 20


class NpyWriter(EmbeddingWriter):
    """Appends block by block, in bounded memory. What is not known before the end is written at the end."""

    def open(self) -> None:
        # Open until it is whole: a file that is left behind would pass for a complete one.
        self._vectors = self.enter(_growing(self.new_file("embeddings.npy")))
        # Ids have one width in a file that can be mapped, and the widest may come last: they wait in one without.
        self._ids = self.enter(tempfile.TemporaryFile(dir=self.folder))
        self._widths: list[np.ndarray] = []
        self._rows: list[np.ndarray] = []
        self._sample_numbers = self.enter(_growing(self.new_file("sample_numbers.npy")))
        self._samples = Numbering()

    def add(self, batch: Batch) -> None:
        self._vectors.append(batch.arrays[self.description.array])
        text, widths = utf8(batch.records["id"].combine_chunks())
        self._ids.write(text)
        self._widths.append(widths)
        self._sample_numbers.append(self._samples.encode(batch.records["sample"]))
        if not self.description.array.is_pooled:
            self._rows.append(self.description.array.rows(batch.lengths))

    def finish(self) -> None:
        self._write_ids()
        if not self.description.array.is_pooled:
            with open(self.new_file("offsets.npy"), "wb") as handle:
                np.save(handle, np.concatenate([np.zeros(1, np.int64), *self._rows]).cumsum())
        write_json(self.folder / "samples.json", self._samples.names)
        write_json(self.folder / "description.json", self.description.attributes())

    def _write_ids(self) -> None:
        width = id_width(np.concatenate(self._widths))
        self._ids.seek(0)
        row = 0
        with ExitStack() as files:
            file = files.enter_context(_growing(self.new_file("ids.npy")))
            long_ids: IO[str] | None = None
            for widths in self._widths:
                text = self._ids.read(int(widths.sum()))
                if widths.max(initial=0) > width:
                    if long_ids is None:
                        long_ids = files.enter_context(open(self.new_file("long_ids.jsonl"), "w", encoding="utf-8"))
                    text, widths = _shorten(text, widths, width, row, long_ids)
                padded = np.zeros((len(widths), width), np.uint8)
                padded[np.arange(width) < widths[:, None]] = np.frombuffer(text, np.uint8)
                file.append(padded.view(f"S{width}")[:, 0])
                row += len(widths)


def id_width(widths: np.ndarray) -> int:
    """How many bytes each id gets in a file that can be mapped: those of the longest, unless that one is an exception.

    widths: bytes of every id. Every record pays for the width: one id of 5,000 bytes would make ten million 50 GB.
    """
    longest = int(widths.max(initial=1))
    if len(widths) * longest <= _SMALL:
        return longest
    return min(longest, max(_ORDINARY, 2 * int(widths.mean())))


def _shorten(text: bytes, widths: np.ndarray, width: int, row: int, long_ids: IO[str]) -> tuple[bytes, np.ndarray]:
    """Ids of which none is longer than `width`; the long ones go to a file. row: of the first in all of the run."""
    ends = np.cumsum(widths)
    ids = [text[end - size : end] for end, size in zip(ends.tolist(), widths.tolist())]
    for i in np.flatnonzero(widths > width).tolist():
        identifier = ids[i].decode("utf-8")
        long_ids.write(json.dumps({"row": row + i, "id": identifier}) + "\n")
        ids[i] = shortened(identifier, width).encode()
    return b"".join(ids), np.array([len(identifier) for identifier in ids])


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
