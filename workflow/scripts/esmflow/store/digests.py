"""Many digests of sequences, small in memory: finding them, and telling which are the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from esmflow.inputs.residues import DIGEST_BYTES


@dataclass(frozen=True)
class DigestIndex:
    """Digests in order, with columns of whatever else is known of each. The one way to find sequences among millions.

    high, low: uint64 `[N]`, the halves of the digests, in the order of `high`. Takes 16 bytes of memory for each
    digest, and what its columns take. A digest may be there more than once, in columns that differ.
    """

    high: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))
    low: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))
    columns: Mapping[str, np.ndarray] = field(default_factory=dict)

    @classmethod
    def of(cls, pieces: dict[str, list[np.ndarray]]) -> DigestIndex:
        """An index of digests that are in no order, in pieces: of `high`, of `low` and of each column.

        The lists are taken out of `pieces` one after the other, so that few copies live at once.
        """
        high = _join(pieces.pop("high"), np.uint64)
        order = np.argsort(high)
        high = high[order]
        low = _join(pieces.pop("low"), np.uint64)[order]
        return cls(high, low, {name: _join(pieces.pop(name), np.int32)[order] for name in list(pieces)})

    def __len__(self) -> int:
        return len(self.high)

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return sum(column.nbytes for column in (self.high, self.low, *self.columns.values()))

    def merged(self, other: DigestIndex) -> DigestIndex:
        """The digests of both, which have the same columns."""
        at = np.searchsorted(self.high, other.high, "right")
        columns = {name: np.insert(values, at, other.columns[name]) for name, values in self.columns.items()}
        return DigestIndex(np.insert(self.high, at, other.high), np.insert(self.low, at, other.low), columns)

    def find(
        self, digests: np.ndarray, accept: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None
    ) -> np.ndarray:
        """The place of each digest, uint8 `[N, 16]`: int64 `[N]`, -1 for those that are not here.

        accept: is given numbers of digests and a place of each, and says which of them will do, bool. A digest that is
        here more than once gets the first place that will.
        """
        high, low = halves(digests)
        found = np.full(len(high), -1, np.int64)
        if not len(self):
            return found
        at = self._first_places(high)
        # Each of them at its place, then at the next one those for which that was not it and which may have another:
        # the same digest comes more than once, or, if hardly ever, two digests share their first half.
        looking = np.arange(len(high))
        while len(looking):
            inside = at[looking] < len(self)
            looking = looking[inside] if not inside.all() else looking
            near = self.high[at[looking]] == high[looking]
            looking = looking[near] if not near.all() else looking
            here = self.low[at[looking]] == low[looking]
            if accept is not None:
                here[here] = accept(looking[here], at[looking[here]])
            found[looking[here]] = at[looking[here]]
            looking = looking[~here]
            at[looking] += 1
        return found

    def _first_places(self, high: np.ndarray) -> np.ndarray:
        # Searching in order finds the next one near the last one: several times faster in a large index.
        if np.all(high[1:] >= high[:-1]):
            return np.searchsorted(self.high, high)
        order = np.argsort(high)
        at = np.empty(len(high), np.int64)
        at[order] = np.searchsorted(self.high, high[order])
        return at

    def values(self, column: str, places: np.ndarray, missing: int = -1) -> np.ndarray:
        """What a column has at places that `find` returned; `missing` where it found none."""
        values = np.full(len(places), missing, self.columns[column].dtype)
        there = places >= 0
        values[there] = self.columns[column][places[there]]
        return values


def _join(pieces: list[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate([*pieces, np.empty(0, dtype)])


def first_of_each(digests: np.ndarray) -> np.ndarray:
    """Where each different digest comes first, in the order of the digests: indices into uint8 `[N, 16]`."""
    high, low = halves(digests)
    order = np.argsort(high, kind="stable")
    sorted_high, sorted_low = high[order], low[order]
    same_half = sorted_high[1:] == sorted_high[:-1]
    if np.any(same_half & (sorted_low[1:] != sorted_low[:-1])):
        order = np.lexsort((low, high))
        sorted_high, sorted_low = high[order], low[order]
        same_half = sorted_high[1:] == sorted_high[:-1]
    repeated = same_half & (sorted_low[1:] == sorted_low[:-1])
    return order[np.concatenate(([True], ~repeated))[: len(order)]]


def halves(digests: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The halves of digests, uint8 `[N, 16]`, as integers: uint64 `[N]` each. They have the order of the bytes."""
    pairs = np.ascontiguousarray(digests).reshape(-1, DIGEST_BYTES).view(">u8").astype(np.uint64)
    return np.ascontiguousarray(pairs[:, 0]), np.ascontiguousarray(pairs[:, 1])
