"""Rows of tab- and comma-separated text, and the columns that a table must have: for the sample sheet and for tables.

Needs nothing but Python, since a dry run reads the sheet where there may be nothing else.
"""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from esmflow.errors import EsmflowError
from esmflow.inputs.streams import (
    BYTE_ORDER_MARK,
    DAMAGE,
    LONGEST_TEXT,
    first_bytes,
    is_fasta,
    suffix,
    text_chunks,
)

TAB, COMMA, SEMICOLON = b"\t", b",", b";"
DELIMITERS = {".tsv": TAB, ".csv": COMMA}
ID, SEQUENCE, DESCRIPTION = "id", "sequence", "description"

_QUOTE = b'"'


class TableError(EsmflowError):
    """A table that does not have the columns it needs. The message names the file and what was found in it."""


class EndlessLineError(OSError):
    """A line that does not end where any row of proteins would. What comes before it can be used."""


class Row(NamedTuple):
    """One row of a text table.

    line: the number of the line it begins in, from 1. wrong: what is wrong with it, in words; its cells are then those
    between one delimiter and the next.
    """

    line: int
    cells: list[bytes]
    wrong: str = ""


def read_rows(chunks: Iterable[bytes], delimiter: bytes) -> Iterator[Row]:
    """Yields the rows of a text table, the head first, whose width the others must have. Empty lines are passed over.

    In text with tabs a line is a row, whatever quotation marks it has: most who write it do not quote. A cell that is
    quoted as a whole is unquoted all the same. In text with commas quoted cells may hold line ends. A quotation mark
    that is not closed costs its own row only: what follows it is read as rows.
    """
    lines = _lines(chunks)
    waiting: deque[bytes] = deque()
    number = width = 0
    while (line := waiting.popleft() if waiting else next(lines, None)) is not None:
        number += 1
        # What Excel writes above a head says which delimiter there is.
        if not line or (not width and line.startswith(b"sep=")):
            continue
        row = Row(number, line.split(delimiter))
        if _QUOTE in line:
            if delimiter == TAB:
                row = Row(number, _unquoted(line, row.cells, width))
            else:
                row, more = _quoted_row(row, line, delimiter, width, lines, waiting)
                number += more
        width = width or len(row.cells)
        if len(row.cells) != width and not row.wrong:
            row = row._replace(wrong=f"{len(row.cells)} cell{'s' * (len(row.cells) != 1)} where the head has {width}")
        yield row


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Whole lines, without their ends. A line that is cut by an error of reading is not given.

    Raises EndlessLineError for one of more than `LONGEST_TEXT` bytes, which may not fit into memory.
    """
    begun: list[bytes] = []
    for chunk in chunks:
        first, *others = chunk.split(b"\n")
        begun.append(first)
        if sum(map(len, begun)) > LONGEST_TEXT:
            raise EndlessLineError(f"a line has more than {LONGEST_TEXT:,} letters, which no table of proteins has")
        if others:
            yield b"".join(begun)
            yield from others[:-1]
            begun = [others[-1]]
    if any(begun):
        yield b"".join(begun)


def _unquoted(line: bytes, cells: list[bytes], width: int) -> list[bytes]:
    """The cells of a line with tabs and quotation marks. A mark that is not one of a pair around a cell is a letter."""
    try:
        quoted = _split(line, TAB)
    except ValueError:
        quoted = None
    if quoted is not None and (not width or len(quoted) == width):
        return quoted
    return [_without_quotes(cell) for cell in cells]


def _without_quotes(cell: bytes) -> bytes:
    inner = cell[1:-1].replace(_QUOTE * 2, b"")
    is_quoted = len(cell) > 1 and cell.startswith(_QUOTE) and cell.endswith(_QUOTE) and _QUOTE not in inner
    return cell[1:-1].replace(_QUOTE * 2, _QUOTE) if is_quoted else cell


def _quoted_row(
    row: Row, line: bytes, delimiter: bytes, width: int, lines: Iterator[bytes], waiting: deque[bytes]
) -> tuple[Row, int]:
    """The row that begins in this line, and how many more lines it takes; those are taken out of `waiting`."""
    parts, size = [line], len(line)
    while True:
        try:
            cells = _split(b"\n".join(parts), delimiter) if _QUOTE in parts[-1] else None
        except ValueError:
            return row._replace(wrong="text after a closing quotation mark"), 0
        if cells is not None:
            for _ in parts[1:]:
                waiting.popleft()
            return Row(row.line, cells), len(parts) - 1
        if len(parts) > len(waiting):
            following = next(lines, None)
            if following is None:
                return row._replace(wrong="a quotation mark that is never closed"), 0
            waiting.append(following)
        following = waiting[len(parts) - 1]
        size += len(following)
        if size > LONGEST_TEXT or _is_row(following, delimiter, width):
            return row._replace(wrong=f"a quotation mark that is not closed before line {row.line + len(parts)}"), 0
        parts.append(following)


def _is_row(line: bytes, delimiter: bytes, width: int) -> bool:
    """Whether a line inside a quoted cell looks like a row of its own, and not like text with commas in it."""
    if not width or line.count(_QUOTE) % 2:
        return False
    try:
        cells = _split(line, delimiter)
    except ValueError:
        return False
    return cells is not None and len(cells) == width > 1 and not any(cell[:1].isspace() for cell in cells)


def _split(text: bytes, delimiter: bytes) -> list[bytes] | None:
    """The cells of a row with quotation marks; None if one is not closed. Raises ValueError for text after one."""
    cells, at = [], 0
    while True:
        if not text.startswith(_QUOTE, at):
            cell, found, _ = text[at:].partition(delimiter)
            end = at + len(cell)
        else:
            end = text.find(_QUOTE, at + 1)
            while end >= 0 and text.startswith(_QUOTE, end + 1):
                end = text.find(_QUOTE, end + 2)
            if end < 0:
                return None
            cell = text[at + 1 : end].replace(_QUOTE * 2, _QUOTE)
            end += 1
            found = text[end : end + 1]
            if found not in (b"", delimiter):
                raise ValueError
        cells.append(cell)
        if not found:
            return cells
        at = end + 1


def table_rows(path: str | os.PathLike[str]) -> Iterator[Row]:
    """The rows of a text table: see `read_rows`.

    It is divided as its suffix says, or otherwise if only so its head has the columns that are needed: what goes by
    .csv has semicolons where commas are decimal points, or tabs.
    """
    own = DELIMITERS[suffix(path)]
    lines = first_bytes(path).removeprefix(BYTE_ORDER_MARK).splitlines()
    head = next((line for line in lines if line and not line.startswith(b"sep=")), b"")
    needed = {ID.encode(), SEQUENCE.encode()}
    delimiters = (own, TAB, SEMICOLON, COMMA)
    fits = (each for each in delimiters if needed <= {cell.strip().strip(_QUOTE) for cell in head.split(each)})
    return read_rows(text_chunks(path), next(fits, own))


def table_columns(path: str | os.PathLike[str]) -> list[str]:
    """The names in the table's head; none if it is empty."""
    if suffix(path) == ".parquet":
        import pyarrow.parquet as pq

        return pq.read_schema(path).names
    head = next(table_rows(path), None)
    return [cell.decode("utf-8", "replace").strip() for cell in head.cells] if head else []


def check_columns(path: str | os.PathLike[str]) -> None:
    """Raises TableError unless the table has its columns. A file that cannot be read as a table is left to be read."""
    try:
        from esmflow.inputs.kinds import kind_of

        head = first_bytes(path)
        if is_fasta(head) or kind_of(path, head):
            return
        columns = table_columns(path)
    except (*DAMAGE, ValueError, ModuleNotFoundError):
        # ValueError: no Parquet. ModuleNotFoundError: there is nothing but Snakemake here; the plan step looks again.
        return
    missing = [name for name in (ID, SEQUENCE) if name not in columns]
    if columns and missing:
        raise TableError(
            f"{path}: has no column {' and no column '.join(missing)}; its columns are {', '.join(columns)}. Rename "
            "the columns that hold the ids and the residues to id and sequence"
        )
    if repeated := repeated_column(columns):
        raise TableError(f"{path}: its column {repeated} is there twice; rename or remove one")


def repeated_column(columns: Iterable[str]) -> str:
    """The first name that several columns have, if any."""
    return next((name for name, count in Counter(columns).items() if name and count > 1), "")


def is_table_of_proteins(path: str | os.PathLike[str]) -> bool:
    """Whether a table has the columns that it needs."""
    try:
        return {ID, SEQUENCE} <= set(table_columns(path))
    except (*DAMAGE, ValueError, ModuleNotFoundError):
        return False
