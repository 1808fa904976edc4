"""Tensor files: `.safetensors` files that know their own checksums, so that no flipped bit is taken for data.

Metadata has two keys for this. `checksums` gives the CRC-32 of each tensor's bytes, as JSON; `checksum` that of the
rest of the header: every tensor's type and shape and all other metadata. A file is written to a temporary name and
renamed, so it is whole or it is not there.
"""

from __future__ import annotations

import json
import mmap
import os
import zlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from esmflow.errors import EsmflowError
from esmflow.files import atomic_path

_DTYPES = {"F32": np.float32, "F16": np.float16, "U8": np.uint8, "I32": np.int32, "I64": np.int64, "U64": np.uint64}
_CHUNK_BYTES = 1 << 20


class DamagedFileError(EsmflowError):
    """A tensor file whose content is not what was written. The message names the file and what is wrong with it."""


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Writes a tensor file, atomically."""
    contiguous = {name: np.ascontiguousarray(values) for name, values in tensors.items()}
    checksums = {name: zlib.crc32(values.reshape(-1).view(np.uint8).data) for name, values in contiguous.items()}
    described = {name: (values.dtype.str, values.shape) for name, values in contiguous.items()}
    complete = {**metadata, "checksums": json.dumps(checksums)}
    complete["checksum"] = _header_checksum(described, complete)
    with atomic_path(path) as temporary:
        save_file(contiguous, temporary, complete)


@dataclass(frozen=True)
class _Entry:
    """Where a tensor is in its file, counted in bytes from the start of the file, and what it is."""

    dtype: np.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


class TensorFile:
    """An open tensor file whose header is whole and whose length is right."""

    def __init__(self, path: Path, handle: BufferedReader) -> None:
        self._path = path
        self._handle = handle
        try:
            self.metadata, self._entries = _read_header(path, handle)
            self._checksums: dict[str, int] = json.loads(self.metadata["checksums"])
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise DamagedFileError(f"{path}: not a tensor file, or its header is damaged ({error!r})") from error

    def names(self) -> Collection[str]:
        """The names of the tensors."""
        return self._entries.keys()

    def mapped(self) -> dict[str, np.ndarray]:
        """Every tensor, mapped from the file: single rows of files of any size can be read. Nothing is checked.

        All of them hold one mapping, which counts as one open file.
        """
        mapping = mmap.mmap(self._handle.fileno(), 0, access=mmap.ACCESS_READ)
        return {
            name: np.ndarray(entry.shape, entry.dtype, mapping, entry.begin)
            if entry.begin < entry.end
            else np.empty(entry.shape, entry.dtype)
            for name, entry in self._entries.items()
        }

    def check(self, names: Collection[str] | None = None) -> None:
        """Reads tensors (None: all) through and raises DamagedFileError if one is not what was written."""
        for name in self._entries if names is None else names:
            if name not in self._entries:
                raise DamagedFileError(f"{self._path}: has no tensor {name}")
            if self._checksum(self._entries[name]) != self._checksums.get(name):
                raise DamagedFileError(f"{self._path}: damaged: the checksum of its tensor {name} does not match")

    def _checksum(self, entry: _Entry) -> int:
        found = 0
        # Into the same memory again and again: new memory costs more than what is done with it.
        chunk = memoryview(bytearray(min(_CHUNK_BYTES, entry.end - entry.begin)))
        self._handle.seek(entry.begin)
        for start in range(entry.begin, entry.end, _CHUNK_BYTES):
            # What is missing at the end of a file that got shorter meanwhile does not match either.
            found = zlib.crc32(chunk[: self._handle.readinto(chunk[: entry.end - start])], found)
        return found


def forget_pages(array: np.ndarray) -> None:
    """Gives back the memory that a mapped array's file takes in this process. What is read again is mapped again."""
    if isinstance(array.base, mmap.mmap):
        array.base.madvise(mmap.MADV_DONTNEED)


@contextmanager
def open_tensors(path: Path) -> Iterator[TensorFile]:
    """Opens a tensor file. Raises DamagedFileError if it is truncated or its header is damaged."""
    with open(path, "rb") as handle:
        yield TensorFile(path, handle)


def _read_header(path: Path, handle: BufferedReader) -> tuple[dict[str, str], dict[str, _Entry]]:
    size = os.fstat(handle.fileno()).st_size
    header_size = int.from_bytes(handle.read(8), "little")
    if not 0 < header_size <= size - 8:
        raise DamagedFileError(f"{path}: truncated")
    header: dict[str, Any] = json.loads(handle.read(header_size))
    metadata = header.pop("__metadata__")
    data = 8 + header_size
    entries = {
        name: _Entry(np.dtype(_DTYPES[e["dtype"]]), tuple(e["shape"]), *(data + offset for offset in e["data_offsets"]))
        for name, e in header.items()
    }
    if metadata["checksum"] != _header_checksum({n: (e.dtype.str, e.shape) for n, e in entries.items()}, metadata):
        raise DamagedFileError(f"{path}: damaged: the checksum of its header does not match")
    if size != max((entry.end for entry in entries.values()), default=data):
        raise DamagedFileError(f"{path}: truncated")
    if any(e.end - e.begin != e.dtype.itemsize * int(np.prod(e.shape, dtype=np.int64)) for e in entries.values()):
        raise DamagedFileError(f"{path}: damaged: its header contradicts itself")
    return metadata, entries


def _header_checksum(described: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]) -> str:
    covered = [described, {key: value for key, value in metadata.items() if key != "checksum"}]
    return f"{zlib.crc32(json.dumps(covered, sort_keys=True).encode()):08x}"
