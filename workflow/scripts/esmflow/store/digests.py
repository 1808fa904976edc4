"""Many digests of sequences, small in memory: finding them, and telling which are the same."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from esmflow.inputs.residues import DIGEST_BYTES


class DigestTable:
    """Digests in order, each with a number. Takes 16 bytes of memory for each digest, and 4 for its number."""

    def __init__(self) -> None:
        # Compared as two integers, big-endian, digests have the order of their bytes.
        self._high = np.empty(0, np.uint64)
        self._low = np.empty(0, np.uint64)
        self._numbers = np.empty(0, np.int32)

    @classmethod
    def of(cls, lists: Iterable[np.ndarray]) -> DigestTable:
        """A table of several lists of digests, each uint8 `[N, 16]`, numbered as they come."""
        arrays = [np.empty((0, DIGEST_BYTES), np.uint8), *lists]
        digests = np.concatenate(arrays)
        first = first_of_each(digests)
        table = cls()
        table._high, table._low = halves(digests[first])
        table._numbers = np.repeat(np.arange(-1, len(arrays) - 1, dtype=np.int32), list(map(len, arrays)))[first]
        return table

    def __len__(self) -> int:
        return len(self._high)

    def add(self, digests: np.ndarray, number: int = 0) -> None:
        """Adds digests that are in order, differ, and are not in the table: uint8 `[N, 16]`."""
        high, low = halves(digests)
        at = self._places(high, low)
        self._high = np.insert(self._high, at, high)
        self._low = np.insert(self._low, at, low)
        self._numbers = np.insert(self._numbers, at, np.int32(number))

    def find(self, digests: np.ndarray) -> np.ndarray:
        """The number of each digest, -1 for those that are not in the table; quick when they are in order."""
        high, low = halves(digests)
        if not len(self):
            return np.full(len(high), -1, np.int32)
        at = np.minimum(self._places(high, low), len(self) - 1)
        there = (self._high[at] == high) & (self._low[at] == low)
        return np.where(there, self._numbers[at], np.int32(-1))

    def _places(self, high: np.ndarray, low: np.ndarray) -> np.ndarray:
        """Where each digest is, or would be."""
        at = np.searchsorted(self._high, high)
        # Two digests may share their first half, if hardly ever: step over those whose second half is smaller.
        while len(self):
            inside = np.minimum(at, len(self) - 1)
            before = (at < len(self)) & (self._high[inside] == high) & (self._low[inside] < low)
            if not before.any():
                break
            at = at + before
        return at


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
