"""Read protein FASTA files as people have them, and normalise their records.

Parsing is Biopython's; this module opens the file (plain, gz, bz2, xz, zst), deals with what is around the records, and
says for every record either its normalised residues or why it is rejected.
"""

from __future__ import annotations

import bz2
import gzip
import io
import itertools
import lzma
import os
import string
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import pyarrow as pa
from Bio.SeqIO.FastaIO import SimpleFastaParser

from esmflow.failures import Reason
from esmflow.vocabulary import RESIDUES

COMPRESSED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst")

# A protein of this many residues that is spelled with nucleotide letters only is a nucleotide sequence.
_NUCLEOTIDE_MIN_LENGTH = 60
_NUCLEOTIDE_LETTERS = str.maketrans("", "", "ACGTUN")
_VALID_LETTERS = str.maketrans("", "", RESIDUES)
# ASCII only: str.upper would turn letters of other alphabets into residues.
_UPPER_WITHOUT_SPACE = str.maketrans(string.ascii_lowercase, string.ascii_uppercase, string.whitespace)
# What a damaged or mislabelled compressed file raises while it is read.
_DAMAGE = (OSError, EOFError, zlib.error, lzma.LZMAError)


@dataclass(frozen=True)
class ResiduePolicy:
    """What to do with residues and lengths that ESM-2 has no token or no room for.

    invalid: `reject` or `replace_with_x`. nucleotides: `reject` or `keep`.
    max_residues: longer records are rejected; None keeps them.
    """

    invalid: str = "reject"
    nucleotides: str = "reject"
    max_residues: int | None = None


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


def fasta_stem(path: str | os.PathLike[str]) -> str:
    """The file's name without its compression and FASTA suffixes: `a/b.faa.gz` gives `b`."""
    name = Path(path).name
    for suffix in COMPRESSED_SUFFIXES:
        name = name.removesuffix(suffix)
    return name.rsplit(".", 1)[0] if "." in name.lstrip(".") else name


def count_sequences(path: str | os.PathLike[str]) -> int:
    """How many records a FASTA file holds, rejected ones included."""
    with _open_text(path) as handle:
        return sum(1 for line in handle if line.startswith(">"))


def read_records(path: str | os.PathLike[str], policy: ResiduePolicy = ResiduePolicy()) -> Iterator[Record]:
    """Yields every record of a FASTA file in order, streaming, each normalised or rejected with a reason.

    What is wrong with the file as a whole (empty, damaged, text above the first header) is yielded as a rejected record
    too, so that it is accounted for like any other; the records that could be read are kept. Only a file that does not
    exist or may not be opened raises OSError.
    """
    file = os.fspath(path)
    position = 0
    with _open_text(path) as handle:
        lines = iter(handle)
        try:
            preamble, records = _split_preamble(lines)
            if preamble:
                detail = f"{file} has text above its first '>', beginning {preamble[:60]!r}"
                yield Record(file, 0, "", "", "", 0, Reason.TEXT_BEFORE_HEADER, detail)
            # A record is complete only when the next one begins or the file ends whole, so one is held back: in a
            # truncated file it is the one that was cut.
            for title, sequence in SimpleFastaParser(records):
                position += 1
                yield _normalise(file, position, title, sequence, policy)
        except _DAMAGE as error:
            detail = f"{file} cannot be read past record {position}: {error}"
            yield Record(file, position + 1, "", "", "", 0, Reason.UNREADABLE_FILE, detail)
            return
    if position == 0 and not preamble:
        yield Record(file, 0, "", "", "", 0, Reason.EMPTY_FILE, f"{file} holds no record")


def _open_text(path: str | os.PathLike[str]) -> TextIO:
    """Opens a file as text, decompressed by its suffix.

    Bytes that are not UTF-8 (old headers) come as one lone surrogate each, a byte order mark is dropped, and every kind
    of line end is understood.
    """
    name = os.fspath(path)
    raw = open(path, "rb")
    stream: io.BufferedIOBase = raw
    if name.endswith(".gz"):
        stream = gzip.GzipFile(fileobj=raw, mode="rb")
    elif name.endswith(".bz2"):
        stream = bz2.BZ2File(raw, "rb")
    elif name.endswith(".xz"):
        stream = lzma.LZMAFile(raw, "rb")
    elif name.endswith(".zst"):
        # Arrow's reader notices a truncated file; the zstandard package's takes it for a whole one.
        stream = pa.CompressedInputStream(raw, "zstd")
    return _ClosingBoth(stream, raw)


class _ClosingBoth(io.TextIOWrapper):
    """Text over a decompressor; gzip and its like leave the file below them open."""

    def __init__(self, stream: io.BufferedIOBase, raw: io.BufferedReader) -> None:
        super().__init__(stream, encoding="utf-8-sig", errors="surrogateescape", newline=None)  # type: ignore[arg-type]
        self._raw_file = raw

    def close(self) -> None:
        super().close()
        self._raw_file.close()


def _split_preamble(lines: Iterator[str]) -> tuple[str, Iterable[str]]:
    """The text above the first header, if any, and the lines from that header on."""
    preamble = ""
    for line in lines:
        if line.startswith(">"):
            return preamble, itertools.chain([line], lines)
        if not preamble:
            preamble = line.strip()
    return preamble, iter(())


def _printable(title: str) -> str:
    """The title with bytes that are not UTF-8, and NUL, which HDF5 cannot store, written as escapes: `\\xe9`."""
    return title.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace").replace("\0", "\\x00")


def _normalise(file: str, position: int, title: str, sequence: str, policy: ResiduePolicy) -> Record:
    identifier, description = (*_printable(title).split(maxsplit=1), "", "")[:2]

    def rejected(reason: Reason, detail: str) -> Record:
        return Record(file, position, identifier, description, "", len(sequence), reason, detail)

    sequence = sequence.translate(_UPPER_WITHOUT_SPACE).rstrip("*")
    if not sequence:
        return rejected(Reason.EMPTY_SEQUENCE, "no residues")
    remark = ""
    invalid = sequence.translate(_VALID_LETTERS)
    if invalid:
        if policy.invalid == "reject":
            where = sequence.index(invalid[0]) + 1
            more = f", and {len(invalid) - 1} more" if len(invalid) > 1 else ""
            if "\ufeff" in invalid:
                more += "; files with byte order marks were joined here, and what follows the mark is not read"
            return rejected(Reason.INVALID_RESIDUE, f"{invalid[0]!r} at residue {where}{more}")
        sequence = sequence.translate({ord(letter): "X" for letter in set(invalid)})
        remark = f"{len(invalid)} residues replaced with X"
    length = len(sequence)
    spelled_as_nucleotides = length >= _NUCLEOTIDE_MIN_LENGTH and not sequence.translate(_NUCLEOTIDE_LETTERS)
    if spelled_as_nucleotides and policy.nucleotides == "reject":
        return rejected(Reason.NUCLEOTIDE_SEQUENCE, f"{length} letters, all of them A, C, G, T, U or N")
    if policy.max_residues is not None and length > policy.max_residues:
        return rejected(Reason.TOO_LONG, f"{length} residues; the limit is {policy.max_residues}")
    return Record(file, position, identifier, description, sequence, length, None, remark)
