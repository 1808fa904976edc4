"""Records as readers give them: one by one, or a block of one file's records by columns."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from esmflow.failures import Reason
from esmflow.inputs.residues import Normalised, ResiduePolicy, sequence_digests

# All but white space.
_ESCAPED = {code: f"\\x{code:02x}" for code in (*range(9), *range(14, 28), *range(127, 133), *range(134, 160))}
STRICT = ResiduePolicy()


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
    and details: by index, where there are any. annotations: further columns of a table, by their names.
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
    annotations: dict[str, pa.StringArray] = field(default_factory=dict)

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


def file_row(
    file: str, position: int, reason: Reason, detail: str, identifier: str = "", description: str = ""
) -> RecordBlock:
    """A rejected row, about a file as a whole or a record that is not read, as a block of its own."""
    ids, descriptions = (pa.array([text], pa.string()) for text in (identifier, description))
    nothing = Normalised(b"", np.zeros(1, np.int64), {0: reason}, {0: detail})
    return RecordBlock.of(file, position, ids, descriptions, nothing)


def printable(title: bytes) -> str:
    """A text with bytes that are not UTF-8, and control characters, written as escapes: `\\xe9`.

    HDF5 cannot store NUL, and a terminal would obey the others.
    """
    # Two steps, as text is decoded in two: an escape for each byte that is not UTF-8, whatever surrounds it.
    text = title.decode("utf-8", "surrogateescape").rstrip()
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace").translate(_ESCAPED)
