"""What every output format has in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
import pyarrow as pa

from esmflow.arrays import ATTENTION, Array
from esmflow.files import atomic_path

Entered = TypeVar("Entered")


@dataclass(frozen=True)
class Description:
    """What the values of one output are: written into formats that can hold it.

    precision: what was used; more than one if `auto` met different cards.
    """

    array: Array
    model: str
    precision: str
    fingerprint: str
    versions: Mapping[str, str]

    def attributes(self) -> dict[str, str | int]:
        """All of it, flat, as formats store it beside the vectors."""
        return {
            "model": self.model,
            **({} if self.array.layer is None else {"layer": self.array.layer}),
            "pooling": self.array.kind,
            "precision": self.precision,
            "fingerprint": self.fingerprint,
            **{f"version_{name}": version for name, version in self.versions.items()},
        }


@dataclass(frozen=True)
class Batch:
    """Embedded records that follow one another.

    records: sample, file, record, id, description, length and digest of each, as in the manifest, and annotations
    behind them. arrays: for each output `[N, D]` or `[N]` if it is pooled, else the rows of all records (see
    `Array.rows`).
    lengths: residues of each that were embedded, `[N]`. sequences: all residues of each, if a writer of the run wants
    them.
    """

    records: pa.Table
    arrays: Mapping[Array, np.ndarray]
    lengths: np.ndarray
    sequences: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.records)

    @property
    def ids(self) -> np.ndarray:
        """The ids, as an array of strings."""
        return self.records["id"].to_numpy()

    def part(self, start: int, end: int) -> Batch:
        """The records from `start` to before `end`."""
        arrays = {}
        for array, values in self.arrays.items():
            offsets = array.offsets(self.lengths)
            arrays[array] = values[offsets[start] : offsets[end]]
        return Batch(self.records.slice(start, end - start), arrays, self.lengths[start:end], self.sequences[start:end])

    def values(self, array: Array) -> list[np.ndarray]:
        """One output, record by record.

        `[D]`, `[]`, `[residues, D or 33]`, `[residues]`, `[residues, residues]`, or, with cls and eos,
        `[heads, residues + 2, residues + 2]`.
        """
        values = self.arrays[array]
        if array.is_pooled:
            return [np.asarray(each) for each in values]
        parts = np.split(values, array.offsets(self.lengths)[1:])[:-1]
        if array.kind == "contacts":
            return [part.reshape(n, n) for part, n in zip(parts, self.lengths)]
        if array.kind == ATTENTION:
            return [part.T.reshape(-1, n + 2, n + 2) for part, n in zip(parts, self.lengths)]
        return parts


class Numbering:
    """Numbers texts as they come, so that a name that many records share takes four bytes of each."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    @property
    def names(self) -> list[str]:
        """The text of each number."""
        return list(self._numbers)

    def encode(self, column: pa.ChunkedArray) -> np.ndarray:
        """The numbers of a column of the manifest, a dictionary of texts: int32 `[N]`. New texts get new numbers."""
        values = column.combine_chunks()
        indices = values.indices.to_numpy()
        # A dictionary may hold names that no record of the batch has. Counting finds the others sooner than sorting.
        used = np.flatnonzero(np.bincount(indices))
        numbers = np.zeros(len(values.dictionary), np.int32)
        names = values.dictionary.take(used).to_pylist()
        numbers[used] = [self._numbers.setdefault(each, len(self._numbers)) for each in names]
        return numbers[indices]


class EmbeddingWriter(ABC):
    """Writes outputs of one run in one format. Records come in input order, file by file.

    A context manager: `open` is called where its block begins, `finish` where it ends without an error. What it opens
    through `enter` and `new_file` is closed, and gets its name, after that; after an error it is closed and removed.
    """

    by_file = False
    """Whether it wants to be told where an input file begins; otherwise a batch may hold records of several."""

    wants_sequences = False
    """Whether it writes residues too: then the input files are read once more."""

    def __init__(self, folder: Path, descriptions: Sequence[Description]) -> None:
        """descriptions: of the outputs it writes; one, unless its format joins them."""
        self.folder = folder
        self.descriptions = descriptions
        self.description = descriptions[0]
        self.opened = ExitStack()

    @property
    def arrays(self) -> list[Array]:
        """The outputs that it writes."""
        return [description.array for description in self.descriptions]

    def __enter__(self) -> Self:
        with self.opened:
            self.open()
            self.opened = self.opened.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if kind is None:
            with self.opened:
                self.finish()
        else:
            self.opened.__exit__(kind, error, trace)

    def enter(self, manager: AbstractContextManager[Entered]) -> Entered:
        """Begins a block that lasts until the writer is done."""
        return self.opened.enter_context(manager)

    def new_file(self, name: str) -> Path:
        """Where to write a file that is called `name`, below the folder, once it is complete."""
        return self.enter(atomic_path(self.folder / name))

    def open(self) -> None:  # noqa: B027
        """Opens what all records go to."""

    def begin_file(self, name: str) -> None:  # noqa: B027
        """The records that follow are of another input file. name: of that file's own outputs, safe as a file name."""

    @abstractmethod
    def add(self, batch: Batch) -> None:
        """Adds embedded records. None only once, in the place of all, in a run in which nothing was embedded."""

    def finish(self) -> None:  # noqa: B027
        """Writes what is not known before the last record."""
