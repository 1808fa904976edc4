"""Input files as bytes: decompressed by their first bytes and read in chunks, with one kind of line end."""

from __future__ import annotations

import bz2
import errno
import gzip
import io
import lzma
import os
import stat
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TABLE_SUFFIXES = (".parquet", ".tsv", ".csv")
COMPRESSED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst")
_MAGIC = ((b"\x1f\x8b", ".gz"), (b"BZh", ".bz2"), (b"\xfd7zXZ\0", ".xz"), (b"\x28\xb5\x2f\xfd", ".zst"))
_MAGIC_BYTES = 6


class TrailingData(OSError):
    """Compressed data, all of which has been read, is followed by something else. The message says by what."""


# What a damaged or mislabelled compressed file raises while it is read.
DAMAGE = (OSError, EOFError, zlib.error, lzma.LZMAError)

LONGEST_TEXT = 10_000_000
"""Bytes of one record, or of one line of a table: what goes on for longer is no protein, and may be without an end."""

_CHUNK_BYTES = 1 << 18
_HEAD_BYTES = 4096
# Arrow's decompressor drops what it has when it meets damage within one call, so little is asked of it at a time.
_ARROW_CHUNK_BYTES = 8192
BYTE_ORDER_MARK = b"\xef\xbb\xbf"

NO_FILE = "is no file but a pipe, socket or device: write it to a file first"


def without_compression(path: str | os.PathLike[str]) -> str:
    """The file's name without its folder and its compression suffix: `a/b.faa.gz` gives `b.faa`."""
    name = Path(path).name
    for suffix in COMPRESSED_SUFFIXES:
        if name.lower().endswith(suffix):
            name = name[: -len(suffix)]
    return name


def suffix(path: str | os.PathLike[str]) -> str:
    """What a file's name ends in, in lower case, compression aside: `.faa` for `a/b.FAA.gz`."""
    return os.path.splitext(without_compression(path))[1].lower()


def is_table(path: str | os.PathLike[str]) -> bool:
    """Whether a file is read as a table, which its suffix says; TSV and CSV may be compressed."""
    return suffix(path) in TABLE_SUFFIXES


def _compression(path: str | os.PathLike[str], head: bytes) -> str:
    """How a file is compressed, as a suffix: by what it begins with, or by its name, so that damage is noticed."""
    found = next((suffix for magic, suffix in _MAGIC if head.startswith(magic)), None)
    return found or os.path.splitext(path)[1].lower()


class _Parts(io.RawIOBase):
    """What a file holds whose parts were compressed one by one and joined.

    Python's own readers of bzip2 and xz end without a word where something follows that is not compressed.
    """

    def __init__(
        self, raw: io.BufferedReader, begin: Callable[[], bz2.BZ2Decompressor | lzma.LZMADecompressor]
    ) -> None:
        self._raw, self._begin = raw, begin
        self._part = begin()
        self._parts_read, self._is_new = 0, True

    def readable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        found = b""
        while not found:
            data = b""
            if self._part.eof:
                # Parts may be padded with zeros.
                data = self._part.unused_data.lstrip(b"\0")
                while not data and (data := self._raw.read1(_CHUNK_BYTES)):
                    data = data.lstrip(b"\0")
                if not data:
                    return 0
                self._part = self._begin()
                self._parts_read, self._is_new = self._parts_read + 1, True
            elif self._part.needs_input:
                data = self._raw.read1(_CHUNK_BYTES)
            try:
                if not data and self._part.needs_input:
                    raise EOFError("the compressed data ends before its end marker")
                found = self._part.decompress(data, len(target))
            except DAMAGE as error:
                if not self._parts_read or not self._is_new:
                    raise
                raise TrailingData(f"what follows is not compressed like what is before it ({error})") from error
            self._is_new &= not found
        target[: len(found)] = found
        return len(found)


def _open(path: str | os.PathLike[str]) -> io.BufferedReader:
    """Opens a file. Raises OSError for what can be read but once, and waits for ever where nobody writes to it."""
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise OSError(errno.ESPIPE, f"it {NO_FILE}", os.fspath(path))
    return open(path, "rb")


@contextmanager
def open_bytes(path: str | os.PathLike[str]) -> Iterator[io.BufferedIOBase]:
    """Opens a file for reading, decompressed. Raises OSError if it is not there or may not be read."""
    with _open(path) as raw:
        compression = _compression(path, raw.peek(_MAGIC_BYTES))
        stream: io.BufferedIOBase = raw
        if compression == ".gz":
            stream = gzip.GzipFile(fileobj=raw, mode="rb")
        elif compression == ".bz2":
            stream = io.BufferedReader(_Parts(raw, bz2.BZ2Decompressor), _CHUNK_BYTES)
        elif compression == ".xz":
            stream = io.BufferedReader(_Parts(raw, lzma.LZMADecompressor), _CHUNK_BYTES)
        elif compression == ".zst":
            # Arrow's reader notices a truncated file; the zstandard package's takes it for a whole one. Imported here,
            # since a dry run imports this module, where there may be nothing but Snakemake.
            import pyarrow as pa

            stream = pa.CompressedInputStream(raw, "zstd")
        try:
            yield stream
        finally:
            stream.close()


def text_chunks(path: str | os.PathLike[str]) -> Iterator[bytes]:
    """Yields a file's content piece by piece: without a byte order mark, every line end (`\\r\\n`, `\\r`) as `\\n`.

    Raises one of `DAMAGE` where the file cannot be read on; what came before has been yielded then.
    """
    with open_bytes(path) as stream:
        size = _CHUNK_BYTES if isinstance(stream, io.BufferedIOBase) else _ARROW_CHUNK_BYTES
        start, held = b"", b""
        at_start = True
        while chunk := _read(stream, size, is_first=at_start and not start):
            if at_start:
                start += chunk
                if len(start) < len(BYTE_ORDER_MARK):
                    continue
                chunk, at_start = start.removeprefix(BYTE_ORDER_MARK), False
            if held or b"\r" in chunk:
                chunk = held + chunk
                # The other half of a \r\n may be in the next chunk.
                held = b"\r" if chunk.endswith(b"\r") else b""
                chunk = chunk.removesuffix(b"\r").replace(b"\r\n", b"\n").replace(b"\r", b"\n")
            yield chunk
        if at_start:
            yield start.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        if held:
            yield b"\n"


def _read(stream: io.BufferedIOBase, size: int, is_first: bool) -> bytes:
    """Some of what is left."""
    try:
        return stream.read1(size)
    except gzip.BadGzipFile as error:
        # The other message of that error is about a checksum.
        if is_first or "Not a gzipped file" not in str(error):
            raise
        raise TrailingData(f"what follows is not compressed by gzip ({error})") from error


def first_bytes(path: str | os.PathLike[str]) -> bytes:
    """What a file begins with, decompressed as far as that can be done. Raises OSError if it may not be read."""
    head = b""
    _open(path).close()
    try:
        with open_bytes(path) as stream:
            while len(head) < _HEAD_BYTES and (more := stream.read1(_HEAD_BYTES)):
                head += more
    except DAMAGE:
        pass
    return head


def is_fasta(head: bytes) -> bool:
    """Whether text begins with a FASTA header."""
    return head.removeprefix(BYTE_ORDER_MARK).lstrip().startswith(b">")
