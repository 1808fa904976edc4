"""Write what `torch.save({'proteins': [id, …], 'data': [tensor, …]})` would, without holding it in memory.

`torch.save` wants all tensors at once, and its pickler remembers each. Given one million of them as parts of one mapped
storage it took 62 s and 1.7 GB of memory, so ten million would take 17 GB; this takes 8 s and 5 MB. Here vectors go to
the file as they come: they are one storage, of which every tensor is a part. The format is PyTorch's own since 1.6: a
zip archive of uncompressed members. `data/0` has the bytes of the storage, `data.pkl` the rest: a tensor is a call of
`_rebuild_tensor_v2` with its storage, offset, size and strides.
"""

from __future__ import annotations

import math
import pickle
import shutil
import struct
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from functools import lru_cache
from io import BufferedWriter, RawIOBase
from pathlib import Path
from typing import IO, cast

import numpy as np

_ARCHIVE = "archive"
_STORAGES = {np.dtype(np.float32): b"FloatStorage", np.dtype(np.float16): b"HalfStorage"}
# Like torch, so that a reader can map the storage.
_ALIGNMENT = 64
_LOCAL_HEADER = 30
_ZIP64_FIELD = 20
_BUFFER_BYTES = 1 << 20


class TensorListFile:
    """One such file, growing; complete when its block ends without an error."""

    def __init__(self, path: Path) -> None:
        with ExitStack() as opened:
            self._zip = opened.enter_context(zipfile.ZipFile(path, "w"))
            self._ids = opened.enter_context(tempfile.TemporaryFile(dir=path.parent))
            # Opcodes of the tensors, which come after the ids.
            self._tensors = opened.enter_context(tempfile.TemporaryFile(dir=path.parent))
            storage = self._zip.open(_aligned(f"{_ARCHIVE}/data/0"), "w", force_zip64=True)
            # zipfile does some work in Python for each write, which a vector is too little for.
            self._storage = BufferedWriter(cast(RawIOBase, storage), _BUFFER_BYTES)
            self._opened = opened.pop_all()
        self._first: tuple[int, ...] | None = None
        self._values = 0
        self._dtype = np.dtype(np.float32)

    def append(self, ids: Iterable[str], values: Sequence[np.ndarray]) -> None:
        """Adds records: their ids, and an array of any shape for each, all of one type."""
        for identifier in ids:
            self._ids.write(_string(identifier))
        for array in values:
            self._dtype = array.dtype
            self._storage.write(np.ascontiguousarray(array).data)
            if self._first is None:
                self._first = array.shape
            else:
                self._tensors.write(_tensor(self._values, array.shape))
            self._values += array.size

    def __enter__(self) -> TensorListFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        with self._opened:
            self._storage.close()
            if kind is None:
                self._finish()

    def _finish(self) -> None:
        with self._zip.open(f"{_ARCHIVE}/data.pkl", "w", force_zip64=True) as handle:
            self._write_pickle(handle)
        self._zip.writestr(f"{_ARCHIVE}/byteorder", sys.byteorder)
        self._zip.writestr(f"{_ARCHIVE}/version", "3\n")

    def _write_pickle(self, handle: IO[bytes]) -> None:
        handle.write(pickle.PROTO + b"\x02" + pickle.EMPTY_DICT + pickle.MARK)
        handle.write(_string("proteins") + pickle.EMPTY_LIST + pickle.MARK)
        _copy(self._ids, handle)
        handle.write(pickle.APPENDS + _string("data") + pickle.EMPTY_LIST + pickle.MARK)
        if self._first is not None:
            storage = pickle.GLOBAL + b"torch\n" + _STORAGES[self._dtype] + b"\n"
            identity = _string("storage") + storage + _string("0") + _string("cpu") + _number(self._values)
            shared = (
                pickle.GLOBAL + b"torch._utils\n_rebuild_tensor_v2\n",
                pickle.MARK + identity + pickle.TUPLE + pickle.BINPERSID,
                pickle.GLOBAL + b"collections\nOrderedDict\n",
            )
            # The first tensor puts into the memo what the others take from there.
            remembered = [part + pickle.BINPUT + bytes([place]) for place, part in enumerate(shared)]
            handle.write(_tensor(0, self._first, *remembered))
        _copy(self._tensors, handle)
        handle.write(pickle.APPENDS + pickle.SETITEMS + pickle.STOP)


_FROM_MEMO = [pickle.BINGET + bytes([place]) for place in range(3)]


def _tensor(
    offset: int,
    shape: tuple[int, ...],
    function: bytes = _FROM_MEMO[0],
    storage: bytes = _FROM_MEMO[1],
    dictionary: bytes = _FROM_MEMO[2],
) -> bytes:
    """The call that makes one tensor, of a function, the storage, and the type of an empty dictionary."""
    return function + pickle.MARK + storage + _number(offset) + _after_offset(shape, dictionary)


@lru_cache
def _after_offset(shape: tuple[int, ...], dictionary: bytes) -> bytes:
    """The rest of the call, which is the same for all vectors of one size."""
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    # Neither a gradient nor backward hooks.
    no_hooks = dictionary + pickle.EMPTY_TUPLE + pickle.REDUCE
    return _numbers(shape) + _numbers(strides) + pickle.NEWFALSE + no_hooks + pickle.TUPLE + pickle.REDUCE


def _numbers(values: Sequence[int]) -> bytes:
    return pickle.MARK + b"".join(map(_number, values)) + pickle.TUPLE


def _number(value: int) -> bytes:
    if value < 1 << 31:
        return pickle.BININT + struct.pack("<i", value)
    return pickle.LONG1 + b"\x08" + struct.pack("<q", value)


def _string(text: str) -> bytes:
    encoded = text.encode("utf-8")
    return pickle.BINUNICODE + struct.pack("<I", len(encoded)) + encoded


def _aligned(name: str) -> zipfile.ZipInfo:
    """A member at the beginning of an archive, whose data begins at a multiple of the alignment."""
    member = zipfile.ZipInfo(name)
    begins = _LOCAL_HEADER + len(name) + _ZIP64_FIELD
    padding = -begins % _ALIGNMENT
    if padding < 4:
        padding += _ALIGNMENT
    # An extra field of the kind that torch fills up with: two letters, the size, and that many bytes.
    member.extra = b"FB" + struct.pack("<H", padding - 4) + b"Z" * (padding - 4)
    return member


def _copy(source: IO[bytes], target: IO[bytes]) -> None:
    source.seek(0)
    shutil.copyfileobj(source, target, 1 << 20)
