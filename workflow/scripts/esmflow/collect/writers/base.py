"""What every output format has in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from esmflow.arrays import Array


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

    records: sample, file, record, id, description and length of each, as in the manifest. arrays: for each output
    `[N, D]` if it is pooled, else the records' rows end to end (see `Array.rows`). lengths: residues of
    each that were embedded, `[N]`.
    """

    records: pa.Table
    arrays: Mapping[Array, np.ndarray]
    lengths: np.ndarray

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
        return Batch(self.records.slice(start, end - start), arrays, self.lengths[start:end])

    def values(self, array: Array) -> list[np.ndarray]:
        """One output, record by record: `[D]`, `[residues, D]`, `[residues, 33]` or `[residues, residues]`."""
        values = self.arrays[array]
        if array.is_pooled:
            return list(values)
        parts = np.split(values, array.offsets(self.lengths)[1:-1])
        return [part.reshape(n, n) for part, n in zip(parts, self.lengths)] if array.kind == "contacts" else parts


class EmbeddingWriter(ABC):
    """Writes outputs of one run in one format. Records come in input order, file by file.

    Every file is complete once it has its name: a writer that is not closed leaves none behind under it.
    """

    by_file = False
    """Whether it wants to be told where an input file begins; otherwise a batch may hold records of several."""

    def __init__(self, folder: Path, descriptions: Sequence[Description]) -> None:
        """descriptions: of the outputs it writes; one, unless its format joins them."""
        self.folder = folder
        self.descriptions = descriptions
        self.description = descriptions[0]

    @property
    def arrays(self) -> list[Array]:
        """The outputs that it writes."""
        return [description.array for description in self.descriptions]

    def begin_file(self, path: str) -> None:  # noqa: B027
        """The records that follow are of this input file."""

    @abstractmethod
    def add(self, batch: Batch) -> None:
        """Adds embedded records; at least one."""

    @abstractmethod
    def close(self) -> None:
        """Finishes what is open; every file is complete afterwards."""

    def abandon(self) -> None:  # noqa: B027
        """Lets go of what a writer that could not be closed still holds; does nothing after `close`."""
