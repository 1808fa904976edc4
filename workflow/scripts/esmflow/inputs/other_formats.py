"""Read proteins by Biopython: GenBank, EMBL, UniProt's files, PDB, mmCIF, PIR and Stockholm."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterable, Iterator
from functools import partial
from typing import AnyStr, NamedTuple

import pyarrow as pa
from Bio import SeqIO
from Bio.SeqRecord import SeqRecord

from esmflow.failures import Reason
from esmflow.inputs.columns import DESCRIPTION, ID, SEQUENCE
from esmflow.inputs.kinds import Kind
from esmflow.inputs.records import BlockTask, file_row, printable
from esmflow.inputs.residues import ResiduePolicy
from esmflow.inputs.streams import open_bytes
from esmflow.inputs.tables import read_batch

_BATCH_RECORDS = 512
# What Biopython calls what is not there.
_UNKNOWN = ("<unknown id>", "<unknown name>", "<unknown description>", ".")


class _Entry(NamedTuple):
    """One protein as it is written. wrong: why there is none, if there is none."""

    id: str
    description: str
    sequence: bytes
    wrong: tuple[Reason, str] | None = None


class _Lines(Iterator[AnyStr]):
    """A file for Biopython to read, line by line, without the blank ones, at which its parsers give up."""

    def __init__(self, lines: Iterable[AnyStr], end: AnyStr) -> None:
        self._lines: Iterator[AnyStr] = (line for line in lines if line.strip())
        self._end: AnyStr = end

    def __next__(self) -> AnyStr:
        return next(self._lines)

    def readline(self) -> AnyStr:
        return next(self._lines, self._end)

    def read(self, size: int = -1) -> AnyStr:
        """No more than a line. Of size 0 it tells whether this is text."""
        return self.readline() if size else self._end


def other_block_tasks(path: str | os.PathLike[str], kind: Kind, policy: ResiduePolicy) -> Iterator[BlockTask]:
    """Yields the tasks that make a file's blocks of records, as `fasta.block_tasks` does for FASTA.

    The file is read entry by entry, but for alignments and structures, which Biopython reads whole.
    """
    file = os.fspath(path)
    position = 0
    error = None
    with open_bytes(path) as stream:
        text = io.TextIOWrapper(stream, "utf-8-sig", "backslashreplace")  # type: ignore[type-var]
        lines = _Lines(text, "") if kind.parser != "uniprot-xml" else _Lines(map(str.encode, text), b"")
        entries = (_entry(record, kind) for record in SeqIO.parse(lines, kind.parser))
        while error is None:
            batch, error = _next_batch(entries)
            if batch:
                columns = {
                    ID: pa.array([printable(entry.id.encode()) for entry in batch], pa.string()),
                    DESCRIPTION: pa.array([printable(entry.description.encode()) for entry in batch], pa.string()),
                    SEQUENCE: pa.array([entry.sequence for entry in batch], pa.binary()),
                }
                wrong = {i: entry.wrong for i, entry in enumerate(batch) if entry.wrong}
                yield partial(read_batch, file, position + 1, pa.record_batch(columns), wrong, policy)
            position += len(batch)
            if len(batch) < _BATCH_RECORDS:
                break
    if error is not None:
        detail = f"{file} cannot be read as {kind.name} past record {position}: {error or type(error).__name__}"
        yield partial(file_row, file, position + 1, Reason.UNREADABLE_FILE, detail)
    elif position == 0:
        yield partial(file_row, file, 0, Reason.EMPTY_FILE, f"{file} is {kind.name} without {kind.holds}")


def _next_batch(entries: Iterator[_Entry]) -> tuple[list[_Entry], Exception | None]:
    """The next entries, and the error that ended reading, if one did."""
    batch: list[_Entry] = []
    with warnings.catch_warnings():
        # About fields that are not read here.
        warnings.simplefilter("ignore")
        try:
            while len(batch) < _BATCH_RECORDS and (entry := next(entries, None)) is not None:
                batch.append(entry)
        # Biopython's parsers raise whatever comes when a file is damaged.
        except Exception as error:
            return batch, error
    return batch, None


def _entry(record: SeqRecord, kind: Kind) -> _Entry:
    notes = record.annotations
    candidates = [record.id, *(str(notes.get(name, "")) for name in ("locus_tag", "gene"))]
    identifier = next((each for each in candidates if each and each not in _UNKNOWN), "")
    description = "" if record.description in (*_UNKNOWN, record.id) else record.description or ""
    if record.seq is None:
        return _Entry(identifier, description, b"", (Reason.EMPTY_SEQUENCE, "a CDS without a translation"))
    sequence = bytes(record.seq)
    if kind.parser in ("pdb-seqres", "cif-seqres") and sequence and not sequence.strip(b"X"):
        return _Entry(
            identifier,
            description,
            b"",
            (Reason.NUCLEOTIDE_SEQUENCE, "a chain without amino acids: DNA, RNA or others"),
        )
    return _Entry(identifier, description, sequence)
