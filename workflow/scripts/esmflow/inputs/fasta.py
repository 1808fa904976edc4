"""Read protein FASTA files as people have them, and normalise their records.

This module finds the records of a file and says for each either its normalised residues or why it is rejected. It does
so a block of records at a time: ten million proteins are too many to take one by one.
"""

from __future__ import annotations

import os
import re
import string
from collections.abc import Iterable, Iterator
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from esmflow.failures import Reason
from esmflow.inputs.records import STRICT, BlockTask, Record, RecordBlock, file_row, printable
from esmflow.inputs.residues import ResiduePolicy, headers_in, normalise
from esmflow.inputs.streams import BYTE_ORDER_MARK, DAMAGE, LONGEST_TEXT, TrailingData, text_chunks

BLOCK_BYTES = 1 << 19

_NEXT_HEADER = b"\n>"
_LINE_END, _HEADER = _NEXT_HEADER
_SEQUENCE_LETTERS = (string.ascii_letters + string.whitespace + "*.-").encode()
# What a3m files may begin with: a mark, or the lengths of a query's chains and how often they occur.
_A3M_TITLE = re.compile(r"#A3M#|#\d[\d,]*\s+\d[\d,]*")
_FIRST_HEADER = re.compile(rb"\n[ \t\v\f]*>")
_JOINED = "cut off the line before it, which lacked its end"
# Of text above the first header.
_LINES_KEPT, _LINE_SHOWN = 10_000, 120
# Of a record that is too large.
_TITLE_SHOWN = 1000
# Titles of these are split by Arrow; any other by Python, which knows white space and line ends of all alphabets.
_PLAIN_TITLE = "".join(set(string.printable) - set("\x0b\x0c\r")).encode()


def count_sequences(path: str | os.PathLike[str]) -> int:
    """How many records a FASTA file holds, rejected ones included."""
    blocks = _whole_records(_after_preamble(text_chunks(path), []))
    return sum(1 if too_large else _cut_at_joined_headers(text)[2] for text, too_large in blocks)


def _cut_at_joined_headers(text: bytes) -> tuple[bytes, list[int], int]:
    """Gives headers that are joined to the line before them, where that is certain, a line of their own.

    So a file without its last line end leaves them when another is appended to it. Takes whole records, and returns
    them, where those headers begin, and how many records there are.
    """
    letters = np.frombuffer(text, np.uint8)
    # Four times as fast as bytes.count.
    marks = np.flatnonzero(letters[1:] == _HEADER)
    inside = marks[letters[marks] != _LINE_END] + 1
    count = 1 + len(marks) - len(inside)
    whole, cuts = bytearray(), []
    done = line_end = 0
    for mark in inside.tolist():
        if mark < line_end:
            continue
        start = text.rfind(b"\n", 0, mark) + 1
        line_end = end if (end := text.find(b"\n", mark)) >= 0 else len(text)
        if text[start] != _HEADER and _is_joined(text[start:mark], text[mark + 1 : line_end]):
            # The byte order mark of the file that was appended goes.
            whole += text[done:start] + text[start:mark].replace(BYTE_ORDER_MARK, b"") + b"\n"
            cuts.append(len(whole))
            done = mark
    return (bytes(whole) + text[done:] if cuts else text), cuts, count + len(cuts)


def _is_joined(before: bytes, after: bytes) -> bool:
    """Whether a line of sequence text, cut at a `>`, is residues and a header for certain, and no stray `>`."""
    residues, title = before.replace(BYTE_ORDER_MARK, b"").strip(), after.strip()
    if not title or residues.translate(None, _SEQUENCE_LETTERS):
        return False
    return not residues or not title.isalpha() or (residues.isupper() and not title.isupper())


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
        for text, too_large in _whole_records(_after_preamble(text_chunks(path), preamble)):
            if position == 0 and preamble:
                yield _preamble_row(file, preamble)
            if too_large:
                position += 1
                yield partial(_too_large_row, file, position, text)
                continue
            whole, cuts, count = _cut_at_joined_headers(text)
            yield partial(_read_block, file, position + 1, whole, cuts, policy)
            position += count
    except DAMAGE as error:
        if position == 0 and preamble:
            yield _preamble_row(file, preamble)
        detail = f"{file} cannot be read past record {position}: {error}"
        yield partial(file_row, file, position + 1, Reason.UNREADABLE_FILE, detail)
        return
    if position == 0:
        if preamble and not any(">" in line for line in preamble):
            detail = f"{file} has no line with a '>', so it is no FASTA; it begins {preamble[0][:60]!r}"
            yield partial(file_row, file, 0, Reason.OTHER_FORMAT, detail)
        elif preamble:
            yield _preamble_row(file, preamble)
        else:
            yield partial(file_row, file, 0, Reason.EMPTY_FILE, f"{file} holds no record")


def _preamble_row(file: str, preamble: list[str]) -> BlockTask:
    detail = f"{file} has text above its first '>', beginning {preamble[0][:60]!r}"
    if any(">" in line for line in preamble):
        detail += f"; joined to its lines and not read: {headers_in(preamble)}"
    return partial(file_row, file, 0, Reason.TEXT_BEFORE_HEADER, detail)


def _too_large_row(file: str, position: int, text: bytes) -> RecordBlock:
    """The row of a record of which only the beginning is there."""
    title = printable(text[1:].partition(b"\n")[0][:_TITLE_SHOWN])
    identifier, description = (*title.split(maxsplit=1), "", "")[:2]
    detail = f"more than {LONGEST_TEXT:,} letters"
    return file_row(file, position, Reason.RECORD_TOO_LARGE, detail, identifier, description)


def _after_preamble(chunks: Iterator[bytes], preamble: list[str]) -> Iterator[bytes]:
    """The chunks from the first header on.

    Of the lines above it the first that is not blank, and those with a `>` in them, are put into `preamble`.
    """
    line_end = b"\n"
    for chunk in chunks:
        # As if a line had ended before the file, whose first line may be a header.
        found = _FIRST_HEADER.search(line_end + chunk)
        start = found.end() - 1 - len(line_end) if found else -1
        above = chunk if start < 0 else chunk[:start]
        if above and (not preamble or (b">" in above and len(preamble) < _LINES_KEPT)):
            lines = [line for line in map(str.strip, above.decode("utf-8", "surrogateescape").split("\n")) if line]
            lines = [line for line in lines if not _A3M_TITLE.fullmatch(line)]
            preamble += [_shown(line) for i, line in enumerate(lines) if (i == 0 and not preamble) or ">" in line]
        if start >= 0:
            yield chunk[start:]
            yield from chunks
        last_line = chunk[chunk.rfind(b"\n") :]
        line_end = last_line if last_line[:1] == b"\n" and last_line.isspace() else last_line[-1:] or line_end


def _shown(line: str) -> str:
    """What may be told of a line above the first header, which may be as long as the file: its beginning, a header."""
    return line[:_LINE_SHOWN] if (at := line.find(">")) < 0 else line[: min(at, _LINE_SHOWN)] + line[at:][:_LINE_SHOWN]


def _whole_records(chunks: Iterable[bytes]) -> Iterator[tuple[bytes, bool]]:
    """Cuts text that begins with a header into blocks of whole records, each beginning with a header.

    A record is whole only when the next one begins or the file ends, so when reading fails the last one is not: it is
    dropped before the error is raised on. One that does not end within `LONGEST_TEXT` bytes is yielded by itself and
    marked: only its beginning, since it may be larger than memory.
    """
    text = bytearray()
    searched = 0
    passing_over = False
    try:
        for chunk in chunks:
            text += chunk
            if passing_over:
                begin = text.find(_NEXT_HEADER)
                # The last byte may be the line end before a header.
                del text[: begin + 1 if begin >= 0 else -1]
                passing_over = begin < 0
            if not passing_over and len(text) >= BLOCK_BYTES:
                cut = text.rfind(_NEXT_HEADER, searched)
                # One record can be longer than a block.
                searched = max(0, len(text) - 1)
                if cut >= 0:
                    with memoryview(text) as view:
                        whole = bytes(view[: cut + 1])
                    yield whole, False
                    del text[: cut + 1]
                    searched = 0
                if len(text) > LONGEST_TEXT:
                    yield bytes(text[:BLOCK_BYTES]), True
                    del text[:-1]
                    searched, passing_over = 0, True
    except TrailingData:
        if not passing_over:
            yield bytes(text), False
        raise
    except DAMAGE:
        cut = text.rfind(_NEXT_HEADER)
        if cut >= 0:
            yield bytes(text[: cut + 1]), False
        raise
    if text and not passing_over:
        yield bytes(text), False


def _read_block(file: str, first_position: int, text: bytes, cuts: list[int], policy: ResiduePolicy) -> RecordBlock:
    """A block of whole records that begins with a header. cuts: where headers begin that were joined to a line."""
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
    for i in np.searchsorted(starts, cuts).tolist():
        found.details[i] = "; ".join(filter(None, [_JOINED, found.details.get(i, "")]))
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
