"""Turn what is written under headers into residues, or say why that cannot be done; many sequences at a time."""

from __future__ import annotations

import string
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from esmflow.failures import Reason
from esmflow.vocabulary import RESIDUES

# A protein of this many residues that is spelled with nucleotide letters only is a nucleotide sequence.
_NUCLEOTIDE_MIN_LENGTH = 60
_NUCLEOTIDES = b"ACGTUN"
_IS_NUCLEOTIDE = np.isin(np.arange(256), list(_NUCLEOTIDES))

_RESIDUE_BYTES = RESIDUES.encode()
_SPACE = string.whitespace.encode()
# ASCII only: str.upper would turn letters of other alphabets into residues.
_UPPER = bytes.maketrans(string.ascii_lowercase.encode(), string.ascii_uppercase.encode())
_FOREIGN = 0xFF
_MARK_FOREIGN = bytes(byte if byte in _RESIDUE_BYTES else _FOREIGN for byte in range(256))

_VALID_LETTERS = str.maketrans("", "", RESIDUES)
_UPPER_WITHOUT_SPACE = str.maketrans(string.ascii_lowercase, string.ascii_uppercase, string.whitespace)


@dataclass(frozen=True)
class ResiduePolicy:
    """What to do with residues and lengths that ESM-2 has no token or no room for.

    invalid: `reject` or `replace_with_x`. nucleotides: `reject` or `keep`.
    max_residues: longer records are rejected; None keeps them.
    """

    invalid: str = "reject"
    nucleotides: str = "reject"
    max_residues: int | None = None


@dataclass(frozen=True)
class Normalised:
    """Sequences after normalisation, in the order they came.

    sequences: upper-case residues, without white space and without a trailing stop; empty if rejected.
    lengths: residues of each, int64 `[N]`, those of rejected ones too. reasons, details: by index, of those that are
    rejected, and details also of those that were changed to be kept.
    """

    sequences: list[bytes]
    lengths: np.ndarray
    reasons: dict[int, Reason]
    details: dict[int, str]


def normalise(bodies: list[bytes], policy: ResiduePolicy) -> Normalised:
    """Normalises sequences as they are written: lines with `\\n` ends, in UTF-8 where they are not ASCII."""
    # Most of them are plain residues: whatever can be, is done to all of them at once, and only where that finds
    # something else is a record looked at by itself.
    sequences = [body.replace(b"\n", b"") for body in bodies]
    joined = b"".join(sequences)
    lengths = np.fromiter(map(len, sequences), np.int64, len(sequences))
    reasons: dict[int, Reason] = {}
    details: dict[int, str] = {}
    if foreign := len(joined.translate(None, _RESIDUE_BYTES)):
        for i in _with_foreign_bytes(joined, lengths, foreign):
            residues = sequences[i].translate(_UPPER, _SPACE).rstrip(b"*")
            if residues.translate(None, _RESIDUE_BYTES):
                residues, lengths[i], reason, details[i] = _normalise_text(bodies[i], policy)
                if reason:
                    reasons[i] = reason
            else:
                lengths[i] = len(residues)
            sequences[i] = residues
        joined = b"".join(sequences)

    for i in np.flatnonzero(lengths == 0).tolist():
        reasons[i], details[i] = Reason.EMPTY_SEQUENCE, "no residues"
    if policy.nucleotides == "reject":
        for i in _nucleotides(sequences, joined):
            reasons[i] = Reason.NUCLEOTIDE_SEQUENCE
            details[i] = f"{lengths[i]} letters, all of them A, C, G, T, U or N"
            sequences[i] = b""
    if policy.max_residues is not None:
        for i in np.flatnonzero(lengths > policy.max_residues).tolist():
            if i not in reasons:
                reasons[i] = Reason.TOO_LONG
                details[i] = f"{lengths[i]} residues; the limit is {policy.max_residues}"
                sequences[i] = b""
    return Normalised(sequences, lengths, reasons, {i: detail for i, detail in details.items() if detail})


def _with_foreign_bytes(joined: bytes, lengths: np.ndarray, foreign: int) -> Iterable[int]:
    """Which sequences hold a byte that is no residue; all of them where looking would take longer."""
    if foreign > len(lengths) // 4:
        return range(len(lengths))
    positions = np.flatnonzero(np.frombuffer(joined.translate(_MARK_FOREIGN), np.uint8) == _FOREIGN)
    return np.unique(np.searchsorted(np.cumsum(lengths), positions, side="right")).tolist()


def _nucleotides(sequences: list[bytes], joined: bytes) -> list[int]:
    """Which sequences are long enough and spelled with nucleotide letters only."""
    lengths = np.fromiter(map(len, sequences), np.int64, len(sequences))
    residues = np.frombuffer(joined, np.uint8)
    starts = np.cumsum(lengths) - lengths
    candidates = np.flatnonzero(lengths >= _NUCLEOTIDE_MIN_LENGTH)
    # Few proteins get past their first letters.
    for offset in range(_NUCLEOTIDE_MIN_LENGTH):
        if not len(candidates):
            break
        candidates = candidates[_IS_NUCLEOTIDE[residues[starts[candidates] + offset]]]
    return [i for i in candidates.tolist() if not sequences[i].translate(None, _NUCLEOTIDES)]


def _normalise_text(body: bytes, policy: ResiduePolicy) -> tuple[bytes, int, Reason | None, str]:
    """One sequence with something in it that is no residue: what is left of it, its length, and what was wrong.

    As text, since what is not ASCII is one letter in several bytes.
    """
    lines = body.decode("utf-8", "surrogateescape").split("\n")
    text = "".join(line.rstrip() for line in lines).translate(_UPPER_WITHOUT_SPACE).rstrip("*")
    invalid = text.translate(_VALID_LETTERS)
    if not invalid:
        return text.encode("ascii"), len(text), None, ""
    if policy.invalid == "reject":
        where = text.index(invalid[0]) + 1
        more = f", and {len(invalid) - 1} more" if len(invalid) > 1 else ""
        if "\ufeff" in invalid:
            more += "; files with byte order marks were joined here, and what follows the mark is not read"
        return b"", len(text), Reason.INVALID_RESIDUE, f"{invalid[0]!r} at residue {where}{more}"
    replaced = text.translate({ord(letter): "X" for letter in set(invalid)})
    return replaced.encode("ascii"), len(text), None, f"{len(invalid)} residues replaced with X"
