"""Read protein FASTA files as people have them, and normalise their records.

This module finds the records of a file and says for each either its normalised residues or why it is rejected. It does
so a block of records at a time: ten million proteins are too many to take one by one.
"""

from __future__ import annotations

import os
import string
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from esmflow.digests import sequence_digests
from esmflow.failures import Reason
from esmflow.normalisation import Normalised, ResiduePolicy, normalise
from esmflow.streams import COMPRESSED_SUFFIXES, DAMAGE, text_chunks, without_compression

__all__ = [
    "COMPRESSED_SUFFIXES", "Record", "RecordBlock", "ResiduePolicy", "count_sequences", "fasta_stem", "read_blocks",
    "read_records",
]  # fmt: skip

BLOCK_BYTES = 1 << 19
STRICT = ResiduePolicy()

_NEXT_HEADER = b"\n>"
_LINE_END, _HEADER = _NEXT_HEADER
# Titles of these are split by Arrow; any other by Python, which knows white space and line ends of all alphabets.
_PLAIN_TITLE = "".join(set(string.printable) - set("\x0b\x0c\r")).encode()


@dataclass(frozen=True, slots=True)
class Record:
    """One FASTA entry, normalised, or the reason why it is rejected.

    position: 1 for the first record of the file; 0 for a row about the file itself.
    sequence: upper-case residues, without white space and without a trailing stop; empty if rejected.
    detail: what is wrong, or a remark about a record that is kept.
    """

    file: str
    position: int
    id: str
    description: str
    sequence: str
    length: int
    reason: Reason | None = None
    detail: str = ""


@dataclass(frozen=True)
class RecordBlock:
    """Records of one file that follow one another, by columns; what each means is said in `Record`.

    first_position: the position of the first. residues: those of all sequences end to end, nothing of rejected ones.
    lengths: int64 `[N]`, those of rejected ones too. digests: uint8 `[K, 16]`, of those that are not rejected. reasons
    and details: by index, where there are any.
    """

    file: str
    first_position: int
    ids: pa.StringArray
    descriptions: pa.StringArray
    residues: bytes
    lengths: np.ndarray
    digests: np.ndarray
    reasons: dict[int, Reason] = field(default_factory=dict)
    details: dict[int, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls, file: str, first_position: int, ids: pa.StringArray, descriptions: pa.StringArray, found: Normalised
    ) -> RecordBlock:
        """A block of records out of their titles and what became of their sequences."""
        valid = np.ones(len(found.lengths), bool)
        valid[list(found.reasons)] = False
        digests = sequence_digests(found.residues, found.lengths[valid])
        about = (found.residues, found.lengths, digests, found.reasons, found.details)
        return cls(file, first_position, ids, descriptions, *about)

    def __len__(self) -> int:
        return len(self.lengths)

    def valid(self) -> np.ndarray:
        """Which records are not rejected: bool `[N]`."""
        valid = np.ones(len(self), bool)
        valid[list(self.reasons)] = False
        return valid

    def rejected(self) -> Iterator[Record]:
        """The records that are rejected, one by one."""
        for i, reason in sorted(self.reasons.items()):
            title = (self.ids[i].as_py(), self.descriptions[i].as_py())
            yield Record(self.file, self.first_position + i, *title, "", int(self.lengths[i]), reason, self.details[i])

    def records(self) -> Iterator[Record]:
        """The records one by one."""
        ends = np.cumsum(np.where(self.valid(), self.lengths, 0)).tolist()
        columns = (self.ids.to_pylist(), self.descriptions.to_pylist(), self.lengths.tolist(), [0, *ends], ends)
        for i, (identifier, description, length, start, end) in enumerate(zip(*columns)):
            sequence = self.residues[start:end].decode("ascii")
            about = (self.reasons.get(i), self.details.get(i, ""))
            yield Record(self.file, self.first_position + i, identifier, description, sequence, length, *about)


# Makes a block; may be run in another process.
BlockTask = Callable[[], RecordBlock]


def file_row(file: str, position: int, reason: Reason, detail: str) -> RecordBlock:
    """A rejected row about a file as a whole, as a block of its own."""
    nothing = pa.array([""], pa.string())
    return RecordBlock.of(
        file, position, nothing, nothing, Normalised(b"", np.zeros(1, np.int64), {0: reason}, {0: detail})
    )


def fasta_stem(path: str | os.PathLike[str]) -> str:
    """The file's name without its compression and FASTA suffixes: `a/b.faa.gz` gives `b`."""
    name = without_compression(path)
    return name.rsplit(".", 1)[0] if "." in name.lstrip(".") else name


def count_sequences(path: str | os.PathLike[str]) -> int:
    """How many records a FASTA file holds, rejected ones included."""
    count, last = 0, b"\n"
    for chunk in text_chunks(path):
        count += _count_next_headers(last + chunk)
        last = chunk[-1:] or last
    return count


def _count_next_headers(text: bytes) -> int:
    # Four times as fast as bytes.count.
    letters = np.frombuffer(text, np.uint8)
    marks = np.flatnonzero(letters[1:] == _HEADER)
    return int(np.count_nonzero(letters[marks] == _LINE_END))


def read_records(path: str | os.PathLike[str], policy: ResiduePolicy = STRICT) -> Iterator[Record]:
    """Yields every record of a FASTA file in order, one by one; see `read_blocks`."""
    for block in read_blocks(path, policy):
        yield from block.records()


def read_blocks(path: str | os.PathLike[str], policy: ResiduePolicy = STRICT) -> Iterator[RecordBlock]:
    """Yields every record of a FASTA file in order, streaming, each normalised or rejected with a reason.

    What is wrong with the file as a whole (empty, damaged, text above the first header) is yielded as a rejected record
    too, so that it is accounted for like any other; the records that could be read are kept. Only a file that does not
    exist or may not be opened raises OSError.
    """
    return (task() for task in block_tasks(path, policy))


def block_tasks(path: str | os.PathLike[str], policy: ResiduePolicy) -> Iterator[BlockTask]:
    """Yields, for each block that `read_blocks` yields, the task that makes it; the file is read meanwhile."""
    file = os.fspath(path)
    open(file, "rb").close()
    position = 0
    preamble: list[str] = []
    try:
        for text in _whole_records(_after_preamble(text_chunks(path), preamble)):
            if position == 0 and preamble:
                yield _preamble_row(file, preamble[0])
            yield partial(_read_block, file, position + 1, text, policy)
            position += 1 + _count_next_headers(text)
    except DAMAGE as error:
        if position == 0 and preamble:
            yield _preamble_row(file, preamble[0])
        detail = f"{file} cannot be read past record {position}: {error}"
        yield partial(file_row, file, position + 1, Reason.UNREADABLE_FILE, detail)
        return
    if position == 0:
        if preamble:
            yield _preamble_row(file, preamble[0])
        else:
            yield partial(file_row, file, 0, Reason.EMPTY_FILE, f"{file} holds no record")


def _preamble_row(file: str, preamble: str) -> BlockTask:
    detail = f"{file} has text above its first '>', beginning {preamble[:60]!r}"
    return partial(file_row, file, 0, Reason.TEXT_BEFORE_HEADER, detail)


def _after_preamble(chunks: Iterator[bytes], preamble: list[str]) -> Iterator[bytes]:
    """The chunks from the first header on. The first line above it that is not blank is put into `preamble`."""
    line_end = b"\n"
    for chunk in chunks:
        # As if a line had ended before the file, whose first line may be a header.
        start = (line_end + chunk).find(_NEXT_HEADER)
        above = chunk if start < 0 else chunk[:start]
        if not preamble and above:
            lines = map(str.strip, above.decode("utf-8", "surrogateescape").split("\n"))
            preamble += [line for line in lines if line][:1]
        if start >= 0:
            yield chunk[start:]
            yield from chunks
        line_end = chunk[-1:] or line_end


def _whole_records(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Cuts text that begins with a header into blocks of whole records, each beginning with a header.

    A record is whole only when the next one begins or the file ends, so when reading fails the last one is not: it is
    dropped before the error is raised on.
    """
    text = bytearray()
    searched = 0
    try:
        for chunk in chunks:
            text += chunk
            if len(text) >= BLOCK_BYTES:
                cut = text.rfind(_NEXT_HEADER, searched)
                # One record can be longer than a block.
                searched = max(0, len(text) - 1)
                if cut >= 0:
                    with memoryview(text) as view:
                        whole = bytes(view[: cut + 1])
                    yield whole
                    del text[: cut + 1]
                    searched = 0
    except DAMAGE:
        cut = text.rfind(_NEXT_HEADER)
        if cut >= 0:
            yield bytes(text[: cut + 1])
        raise
    if text:
        yield bytes(text)


def _read_block(file: str, first_position: int, text: bytes, policy: ResiduePolicy) -> RecordBlock:
    """A block of whole records that begins with a header."""
    letters = np.frombuffer(text, np.uint8)
    line_ends = np.flatnonzero(letters == _LINE_END)
    next_lines = line_ends[: np.searchsorted(line_ends, len(text) - 1)] + 1
    above_header = np.flatnonzero(letters[next_lines] == _HEADER)
    starts = np.concatenate(([0], next_lines[above_header]))
    # A header ends at the first line end from there on, or at the end of the text.
    title_ends = np.append(line_ends, len(text))[np.concatenate(([0], above_header + 1))]
    titles = [text[start:end] for start, end in zip((starts + 1).tolist(), title_ends.tolist())]
    ids, descriptions = _split_titles(titles)
    ends = np.append(starts[1:], len(text))
    found = normalise(text, title_ends, ends, line_ends, policy)
    return RecordBlock.of(file, first_position, ids, descriptions, found)


def _split_titles(titles: list[bytes]) -> tuple[pa.StringArray, pa.StringArray]:
    """Ids, which end at the first white space, and descriptions, which are the rest."""
    joined = b"".join(titles)
    if joined.translate(None, _PLAIN_TITLE):
        pairs = [(*printable(title).split(maxsplit=1), "", "")[:2] for title in titles]
        return pa.array([i for i, _ in pairs], pa.string()), pa.array([d for _, d in pairs], pa.string())
    offsets = np.zeros(len(titles) + 1, np.int32)
    np.cumsum(np.fromiter(map(len, titles), np.int32, len(titles)), out=offsets[1:])
    plain = pa.StringArray.from_buffers(len(titles), pa.py_buffer(offsets), pa.py_buffer(joined))
    parts = pc.ascii_split_whitespace(pc.ascii_trim_whitespace(plain), max_splits=1)
    has_description = np.diff(parts.offsets.to_numpy()) == 2
    rest = pc.list_element(pc.if_else(has_description, parts, pa.scalar(["", ""], pa.list_(pa.string()))), 1)
    return pc.list_element(parts, 0), rest


def printable(title: bytes) -> str:
    """A text with bytes that are not UTF-8, and NUL, which HDF5 cannot store, written as escapes: `\\xe9`."""
    # Two steps, as text is decoded in two: an escape for each byte that is not UTF-8, whatever surrounds it.
    text = title.decode("utf-8", "surrogateescape").rstrip()
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace").replace("\0", "\\x00")
