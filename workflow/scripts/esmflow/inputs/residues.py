"""Residues: the alphabet of all models; making residues of what is written under headers, or saying why that cannot be;
the digest by which a sequence is known everywhere. Many sequences at a time."""

from __future__ import annotations

import hashlib
import string
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from esmflow.failures import Reason
from esmflow.text import plural

# ESM-2's vocabulary of 33 tokens, as fair-esm numbers them (`esm.data.Alphabet.from_architecture("ESM-1b")`).
CLS, PAD, EOS, UNK = 0, 1, 2, 3
RESIDUES = "LAGVSERTIDPKQNFYMHWCXBUZO.-"
FIRST_RESIDUE = 4
SIZE = 33
# What stands in a copy of a sequence for a residue that is hidden from the model, and its token. No input has it.
MASKED, MASK = "_", 32

RESIDUE_TOKEN = {residue: FIRST_RESIDUE + i for i, residue in enumerate(RESIDUES)}

DIGEST_BYTES = 16

# A protein of this many residues that is spelled with nucleotide letters only is a nucleotide sequence.
_NUCLEOTIDE_MIN_LENGTH = 60
_NUCLEOTIDES = b"ACGTUN"
# With codes for several nucleotides (IUPAC) among its letters it must have all four, as hardly a protein has.
_NUCLEOTIDE_CODES = _NUCLEOTIDES + b"RYSWKMBDHV"
_IS_NUCLEOTIDE_CODE = np.isin(np.arange(256), list(_NUCLEOTIDE_CODES))
_FEWEST_PLAIN, _FEWEST_OF_EACH = 0.9, 0.05

# Gaps of alignments. They have tokens, but a protein has none of them.
GAPS = "-."
# Positions of a protein that have no token: leucine or isoleucine, and a stop that was read through.
_REPLACEABLE = "J*"
AMINO_ACIDS = RESIDUES.removesuffix(".-")
_SPACE = string.whitespace.encode()
# ASCII only: str.upper would turn letters of other alphabets into residues.
_UPPER = bytes.maketrans(string.ascii_lowercase.encode(), string.ascii_uppercase.encode())
_A, _LETTERS = ord("A"), 26
_CAPITALS = bytes(range(_A, _A + _LETTERS))
_OTHER_CAPITALS = _CAPITALS.translate(None, AMINO_ACIDS.encode())
_IS_AMINO_ACID = np.isin(np.arange(256), list(AMINO_ACIDS.encode()))

_WITHOUT_GAPS = str.maketrans("", "", GAPS)
_WITH_X = str.maketrans(dict.fromkeys(_REPLACEABLE, "X"))
# Of headers that were found in the wrong place so many are named, and so many letters of each.
_HEADERS_NAMED, _HEADER_SHOWN = 20, 100
_UPPER_WITHOUT_SPACE = str.maketrans(string.ascii_lowercase, string.ascii_uppercase, string.whitespace)


@dataclass(frozen=True)
class ResiduePolicy:
    """What to do with residues and lengths that a model has no token or no room for.

    invalid: `reject` or `replace_with_x`. nucleotides: `reject` or `keep`. gaps: `reject`, `remove` or `keep`.
    max_residues: longer records are rejected; None keeps them.
    """

    invalid: str = "reject"
    nucleotides: str = "reject"
    max_residues: int | None = None
    gaps: str = "reject"

    @classmethod
    def configured(cls, config: Mapping[str, Any], longest: int | None = None) -> ResiduePolicy:
        """As a configuration has it. longest: residues that the model can take whole, None if any number."""
        limit = {"reject": config["max_residues"], "whole": longest}.get(config["long_sequences"])
        return cls(config["invalid_residues"], config["nucleotide_sequences"], limit, config["gaps"])

    @property
    def letters(self) -> str:
        """What is a residue under this policy."""
        return RESIDUES if self.gaps == "keep" else AMINO_ACIDS

    @property
    def stops(self) -> str:
        """What is passed over at the end of a sequence: gffread writes a stop as `.`, which may be a gap too."""
        return "*" if self.gaps == "keep" else "*."


@dataclass(frozen=True)
class Normalised:
    """Sequences after normalisation, in the order they came.

    residues: all of them end to end: upper-case residues, without white space and without trailing stops; nothing of
    rejected ones. lengths: residues of each, int64 `[N]`, those of rejected ones too. reasons, details: by index, of
    those that are rejected, and details also of those that were changed to be kept.
    """

    residues: bytes
    lengths: np.ndarray
    reasons: dict[int, Reason]
    details: dict[int, str]


def normalise(
    text: bytes, starts: np.ndarray, ends: np.ndarray, line_ends: np.ndarray, policy: ResiduePolicy
) -> Normalised:
    """Normalises the sequences that are written in `text` from `starts` to `ends`, int64 `[N]`.

    In UTF-8 where they are not ASCII. line_ends: where every `\\n` of the text is, in ascending order.
    """
    # Most of them are plain residues: whatever can be, is done to all of them at once, and only where that finds
    # something else is a sequence looked at by itself.
    view = memoryview(text)
    residues = b"".join([view[start:end] for start, end in zip(starts.tolist(), ends.tolist())]).replace(b"\n", b"")
    lengths = ends - starts - (np.searchsorted(line_ends, ends) - np.searchsorted(line_ends, starts))
    kept = lengths.copy()
    changed: dict[int, bytes] = {}
    reasons: dict[int, Reason] = {}
    details: dict[int, str] = {}

    def reject(index: int, reason: Reason, detail: str) -> None:
        changed[index], reasons[index], details[index] = b"", reason, detail

    first = np.cumsum(lengths) - lengths
    foreign = _foreign_bytes(residues)
    if len(foreign):
        letters, stops = policy.letters.encode(), policy.stops.encode()
        for i in _at(foreign, lengths):
            sequence = residues[first[i] : first[i] + lengths[i]].translate(_UPPER, _SPACE).rstrip(stops)
            if sequence.translate(None, letters):
                sequence, lengths[i], reason, details[i] = _normalise_text(text[starts[i] : ends[i]], policy)
                if reason:
                    reasons[i] = reason
            else:
                lengths[i] = len(sequence)
            changed[i] = sequence
        residues, kept = _with_changes(residues, kept, changed)
        changed.clear()

    for i in np.flatnonzero(lengths == 0).tolist():
        reject(i, Reason.EMPTY_SEQUENCE, "no residues")
    if policy.nucleotides == "reject":
        for i, spelled in _nucleotides(residues, kept):
            reject(i, Reason.NUCLEOTIDE_SEQUENCE, f"{lengths[i]} letters, all of them {spelled}")
    if policy.max_residues is not None:
        for i in np.flatnonzero(lengths > policy.max_residues).tolist():
            if i not in reasons:
                reject(i, Reason.TOO_LONG, f"{lengths[i]} residues; the limit is {policy.max_residues}")
    if changed:
        residues, _ = _with_changes(residues, kept, changed)
    return Normalised(residues, lengths, reasons, {i: detail for i, detail in details.items() if detail})


def _foreign_bytes(residues: bytes) -> np.ndarray:
    """Where the bytes are that are no amino acids, in ascending order."""
    letters = np.frombuffer(residues, np.uint8)
    # Nearly all letters are capitals and nearly all capitals amino acids, and that takes no table of bytes to see.
    found = np.flatnonzero(letters - np.uint8(_A) >= _LETTERS)
    found = found[~_IS_AMINO_ACID[letters[found]]]
    others = [np.flatnonzero(letters == other) for other in _OTHER_CAPITALS if other in residues]
    return np.sort(np.concatenate([found, *others])) if others else found


def _at(positions: np.ndarray, lengths: np.ndarray) -> list[int]:
    """Which of the sequences, that lie end to end, have these positions, which are in ascending order."""
    found = np.searchsorted(np.cumsum(lengths), positions, side="right")
    # Repeats are neighbours.
    return found[np.concatenate(([True], found[1:] != found[:-1]))].tolist()


def _with_changes(residues: bytes, lengths: np.ndarray, changed: dict[int, bytes]) -> tuple[bytes, np.ndarray]:
    """The residues of all sequences, and how many each has, when some sequences are replaced."""
    ends = np.cumsum(lengths)
    lengths = lengths.copy()
    pieces, done = [], 0
    for i in sorted(changed):
        pieces += [residues[done : ends[i] - lengths[i]], changed[i]]
        done = ends[i]
        lengths[i] = len(changed[i])
    return b"".join([*pieces, residues[done:]]), lengths


def _nucleotides(residues: bytes, lengths: np.ndarray) -> Iterator[tuple[int, str]]:
    """Which sequences are of nucleotides for certain, and what their letters are, in words."""
    letters = np.frombuffer(residues, np.uint8)
    ends = np.cumsum(lengths)
    starts = ends - lengths
    candidates = np.flatnonzero(lengths >= _NUCLEOTIDE_MIN_LENGTH)
    # Few proteins get past their first letters.
    for offset in range(_NUCLEOTIDE_MIN_LENGTH):
        if not len(candidates):
            break
        candidates = candidates[_IS_NUCLEOTIDE_CODE[letters[starts[candidates] + offset]]]
    for i in candidates.tolist():
        sequence = residues[starts[i] : ends[i]]
        if not sequence.translate(None, _NUCLEOTIDES):
            yield i, "A, C, G, T, U or N"
        elif not sequence.translate(None, _NUCLEOTIDE_CODES):
            a, c, g, t, u, n = map(sequence.count, _NUCLEOTIDES)
            plain, fewest = a + c + g + t + u + n, min(a, c, g, t + u)
            if plain >= _FEWEST_PLAIN * lengths[i] and fewest >= _FEWEST_OF_EACH * lengths[i]:
                yield i, "A, C, G, T, U, N or codes for several of them"


def _normalise_text(body: bytes, policy: ResiduePolicy) -> tuple[bytes, int, Reason | None, str]:
    """One sequence with something in it that is no residue: what is left of it, its length, and what was wrong.

    As text, since what is not ASCII is one letter in several bytes.
    """
    lines = body.decode("utf-8", "surrogateescape").split("\n")
    written = "".join(line.rstrip() for line in lines).translate(_UPPER_WITHOUT_SPACE).rstrip(policy.stops)
    text = written.translate(_WITHOUT_GAPS).rstrip(policy.stops) if policy.gaps == "remove" else written
    remarks = [f"{plural(len(written) - len(text), 'gap character')} removed"] if text != written else []
    foreign = text.translate(str.maketrans("", "", policy.letters))
    replaced = foreign.translate(_WITHOUT_GAPS)
    invalid = (
        replaced.translate(str.maketrans("", "", _REPLACEABLE)) if policy.invalid == "replace_with_x" else replaced
    )
    if invalid:
        where = _where(text, invalid) + "".join(f"; {hint}" for hint in _hints(lines, invalid))
        return b"", len(text), Reason.INVALID_RESIDUE, where
    if len(foreign) > len(replaced):
        gaps = "".join(letter for letter in foreign if letter in GAPS)
        kind = "an alignment" if "-" in gaps else "an alignment, or '.' stands for a stop codon"
        return b"", len(text), Reason.GAP_CHARACTERS, f"{_where(text, gaps)}; this looks like {kind}"
    if replaced:
        remarks.append(f"{plural(len(replaced), 'residue')} replaced with X")
    return text.translate(_WITH_X).encode("ascii"), len(text), None, "; ".join(remarks)


def _where(text: str, found: str) -> str:
    """Where the first of some letters is, that were found in this order, and how many there are besides."""
    more = f", and {len(found) - 1} more" if len(found) > 1 else ""
    return f"{found[0]!r} at residue {text.index(found[0]) + 1}{more}"


def _hints(lines: list[str], invalid: str) -> Iterator[str]:
    """What may have put these letters into a sequence."""
    if "\ufeff" in invalid:
        yield "files with byte order marks were joined here, and what follows the mark is not read"
    if ">" in invalid:
        yield (
            "a header is joined to this line, as when the file before it lacked its last line end; not read: "
            + headers_in(lines)
        )


def headers_in(lines: list[str]) -> str:
    """The headers that are joined to lines, in words: the first of them, shortened."""
    joined = [line[line.index(">") :].strip()[:_HEADER_SHOWN] for line in lines if ">" in line]
    more = f" and {len(joined) - _HEADERS_NAMED} more" if len(joined) > _HEADERS_NAMED else ""
    return ", ".join(map(repr, joined[:_HEADERS_NAMED])) + more


def sequence_digest(sequence: str) -> bytes:
    """The 16-byte BLAKE2b digest of normalised residues."""
    return hashlib.blake2b(sequence.encode("ascii"), digest_size=DIGEST_BYTES).digest()


def sequence_digests(residues: bytes, lengths: np.ndarray) -> np.ndarray:
    """The digests of sequences that lie end to end, given how long each is: uint8 `[N, 16]`."""
    # A copy is made sooner than a hash object that has to look at its parameters.
    begin = hashlib.blake2b(digest_size=DIGEST_BYTES).copy
    ends = np.cumsum(lengths).tolist()
    digests = []
    for start, end in zip([0, *ends], ends):
        hasher = begin()
        hasher.update(residues[start:end])
        digests.append(hasher.digest())
    return np.frombuffer(b"".join(digests), np.uint8).reshape(-1, DIGEST_BYTES)
