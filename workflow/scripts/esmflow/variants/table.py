"""The table of variants: what the user wrote, and which record's sequence each row is of."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from esmflow.inputs.columns import read_rows
from esmflow.inputs.ids import accession
from esmflow.inputs.records import RecordBlock
from esmflow.inputs.streams import text_chunks
from esmflow.text import record_name, shown
from esmflow.variants.copies import Place, places_of
from esmflow.variants.head import ID, SAMPLE, VARIANT, delimiter, head_of
from esmflow.variants.notation import Unscored, VariantError, check_residues, parse_variant

_TEXT = pa.dictionary(pa.int32(), pa.string())
PLANNED_SCHEMA = pa.schema(
    [
        (ID, pa.string()),
        (VARIANT, pa.string()),
        (SAMPLE, _TEXT),
        ("file", _TEXT),
        ("record", pa.int64()),
        ("reason", _TEXT),
        ("detail", pa.string()),
        ("sequence", pa.dictionary(pa.int32(), pa.large_string())),
    ]
)
# What stands in the table that is made of it.
_TAKEN = frozenset((*PLANNED_SCHEMA.names, "status", "wild_type_marginal", "masked_marginal"))
_LISTED = 3


@dataclass(frozen=True)
class VariantTable:
    """What the user wrote: columns of texts by their names, and by row what is wrong with those that cannot be read.

    lines: where each row is, for messages.
    """

    columns: Mapping[str, Sequence[str]]
    wrong: Mapping[int, str]
    lines: Sequence[int]

    def __len__(self) -> int:
        return len(self.lines)


def read_variants(path: str | os.PathLike[str]) -> VariantTable:
    """Reads a table whose head is in order. Raises VariantTableError otherwise, OSError if it cannot be read."""
    names = head_of(path)
    rows = list(read_rows(text_chunks(path), delimiter(path)))[1:]
    texts = [[cell.decode("utf-8", "backslashreplace").strip() for cell in row.cells] for row in rows]
    columns = {name: [cells[at] if at < len(cells) else "" for cells in texts] for at, name in enumerate(names) if name}
    wrong = {number: row.wrong for number, row in enumerate(rows) if row.wrong}
    return VariantTable(columns, wrong, [row.line for row in rows])


@dataclass(frozen=True)
class _Found:
    """A record that has one of the ids. why_not: why it has no sequence."""

    sample: str
    file: str
    position: int
    id: str
    sequence: str
    why_not: str

    def __str__(self) -> str:
        return record_name(self.file, self.position, self.id)


class RecordSearch:
    """Finds the records of a table's ids while the inputs are read, and says of each row which sequence it is of.

    An id is what a record is called, or the accession in that.
    """

    def __init__(self, table: VariantTable) -> None:
        self._table = table
        self._wanted = set(table.columns[ID]) - {""}
        self._by_id: dict[str, list[_Found]] = {}
        self._by_accession: dict[str, list[_Found]] = {}

    def take(self, sample: str, block: RecordBlock) -> None:
        """Looks for the ids among some records."""
        ends: np.ndarray | None = None
        for i, identifier in enumerate(block.ids.to_pylist()):
            short = accession(identifier) if "|" in identifier else ""
            if identifier not in self._wanted and short not in self._wanted:
                continue
            if ends is None:
                ends = np.cumsum(np.where(block.valid(), block.lengths, 0))
            sequence = block.residues[int(ends[i - 1]) if i else 0 : int(ends[i])].decode("ascii")
            reason = block.reasons.get(i)
            why_not = f"{reason.value} ({block.details.get(i, '')})" if reason else ""
            found = _Found(sample, block.file, block.first_position + i, identifier, sequence, why_not)
            self._by_id.setdefault(identifier, []).append(found)
            if short:
                self._by_accession.setdefault(short, []).append(found)

    def planned(self) -> pa.Table:
        """A row for each of the table's, with `PLANNED_SCHEMA` and the user's further columns as texts."""
        columns: dict[str, list] = {name: [] for name in PLANNED_SCHEMA.names}
        seen: dict[tuple[str, str, str], int] = {}
        samples = self._table.columns.get(SAMPLE, [""] * len(self._table))
        rows = zip(self._table.columns[ID], self._table.columns[VARIANT], samples)
        for number, (identifier, variant, sample) in enumerate(rows):
            line = self._table.lines[number]
            first = seen.setdefault((identifier, variant, sample), line)
            detail = f"repeats line {first}" if first != line else ""
            found, reason = None, None
            try:
                if number in self._table.wrong:
                    raise VariantError(Unscored.UNREADABLE_ROW, f"line {line}: {self._table.wrong[number]}")
                substitutions = parse_variant(variant)
                found = self._record(identifier, sample)
                check_residues(substitutions, identifier, found.sequence)
            except VariantError as error:
                reason, detail = error.reason, error.detail
            values = (
                *(identifier, variant, found.sample if found else sample or None),
                *((found.file, found.position) if found else (None, None)),
                *(reason, detail, found.sequence if found and not reason else None),
            )
            for column, value in zip(columns.values(), values, strict=True):
                column.append(value)
        planned = {
            each.name: pa.array(columns[each.name], _plain(each.type)).cast(each.type) for each in PLANNED_SCHEMA
        }
        for name, texts in self._table.columns.items():
            if name not in (ID, VARIANT, SAMPLE):
                while name in _TAKEN or name in planned:
                    name = f"input_{name}"
                planned[name] = pa.array(texts, pa.string())
        return pa.table(planned)

    def _record(self, identifier: str, sample: str) -> _Found:
        """The record that an id stands for. Raises VariantError where there is none, or several that differ."""
        found = self._by_id.get(identifier) or self._by_accession.get(identifier, [])
        of_sample = [each for each in found if not sample or each.sample == sample]
        if not of_sample:
            where = f" of sample {shown(sample)}" if found else ""
            raise VariantError(Unscored.UNKNOWN_ID, f"no record{where} is called {shown(identifier) or '(nothing)'}")
        usable = {each.sequence: each for each in reversed(of_sample) if not each.why_not}
        if not usable:
            raise VariantError(Unscored.REJECTED_RECORD, f"{of_sample[0]} was rejected: {of_sample[0].why_not}")
        if len(usable) > 1:
            listed = "; ".join(map(str, of_sample[:_LISTED]))
            remedy = "give them ids of their own" if sample else "add a column sample that says which one is meant"
            detail = f"{len(of_sample)} records are called {shown(identifier)} and differ: {listed}; {remedy}"
            raise VariantError(Unscored.AMBIGUOUS_ID, detail)
        return next(iter(usable.values()))


def _plain(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def places_by_sequence(planned: pa.Table, longest: int | None) -> dict[str, list[Place]]:
    """By sequence the places at which the rows that can be scored have substitutions. longest: see `places_of`."""
    numbers: dict[str, set[int]] = {}
    for variant, sequence in zip(planned[VARIANT].to_pylist(), planned["sequence"].to_pylist()):
        if sequence is not None:
            numbers.setdefault(sequence, set()).update(each.place for each in parse_variant(variant))
    return {sequence: list(places_of(sequence, sorted(of), longest)) for sequence, of in numbers.items()}
