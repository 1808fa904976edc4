"""Candidates: the sequences, chosen while planning, that the certificate may compute again.

Chosen by their digests, which are as good as random: of each length bin those that come first. That takes bounded
memory however many sequences there are, and does not depend on their order.
"""

from __future__ import annotations

import heapq
from pathlib import Path
from typing import Any

import numpy as np

from esmflow.inputs.residues import DIGEST_BYTES
from esmflow.plan.shards import write_shard

CANDIDATES_PER_BIN = 128
"""More than a certificate takes, since some may fail; also the largest sample."""

# Of sequences that take much memory, and of which there are few, a few will do.
_LONG_BIN = 13
_LONG_PER_BIN = 8
_BINS = 40
# Of a large window all would be looked at one by one: what the first ones leave no room for is passed over after these.
_AT_ONCE = 2048


def length_bin(residues: int) -> int:
    """The bin of a sequence: lengths from 2ⁿ⁻¹ to 2ⁿ - 1 share bin n."""
    return residues.bit_length()


def candidates_of_bin(number: int) -> int:
    """How many sequences of a bin are kept."""
    return CANDIDATES_PER_BIN if number < _LONG_BIN else _LONG_PER_BIN


class Candidates:
    """Of each length bin the sequences with the lowest digests, out of all that are offered, repeats or not."""

    def __init__(self) -> None:
        # Heaps with the highest digest on top, as integers, because they can be negated.
        self._bins: list[list[tuple[int, bytes, str]]] = [[] for _ in range(_BINS)]
        self._kept: set[bytes] = set()
        # The highest digest of each full bin, and its first half for a quick look at many.
        self._limits = [b"\xff" * DIGEST_BYTES] * _BINS
        self._first_halves = np.full(_BINS, np.iinfo(np.uint64).max, np.uint64)

    def offer(self, digest: bytes, sequence: str) -> None:
        """Takes one sequence into account."""
        bin_number = length_bin(len(sequence))
        if digest >= self._limits[bin_number] or digest in self._kept:
            return
        kept, room = self._bins[bin_number], candidates_of_bin(bin_number)
        heapq.heappush(kept, (-int.from_bytes(digest), digest, sequence))
        self._kept.add(digest)
        if len(kept) > room:
            self._kept.remove(heapq.heappop(kept)[1])
        if len(kept) == room:
            self._limits[bin_number] = kept[0][1]
            self._first_halves[bin_number] = int.from_bytes(kept[0][1][:8])

    def offer_block(
        self, digests: np.ndarray, residues: Any, lengths: np.ndarray, rows: np.ndarray | slice = slice(None)
    ) -> None:
        """Takes many sequences into account, which lie end to end. digests: uint8 `[N, 16]`; lengths: `[N]`.

        residues: bytes, or what has them. rows: the numbers of the sequences that are meant, if not all are.
        """
        first_halves = np.ascontiguousarray(digests).view(">u8")[:, 0]
        # frexp's exponent of a whole number is its bit length.
        bins = np.frexp(lengths)[1]
        ends = np.cumsum(lengths)
        text = memoryview(residues)
        meant = np.arange(len(lengths))[rows]
        for start in range(0, len(meant), _AT_ONCE):
            part = meant[start : start + _AT_ONCE]
            for i in part[first_halves[part] <= self._first_halves[bins[part]]]:
                self.offer(digests[i].tobytes(), str(text[ends[i] - lengths[i] : ends[i]], "ascii"))

    def sequences(self) -> dict[bytes, str]:
        """Those with the lowest digests, by digest."""
        return {digest: sequence for entries in self._bins for _, digest, sequence in entries}


def write_candidates(path: Path, *candidates: Candidates) -> None:
    """Writes them as a FASTA file whose ids are digests, each once."""
    write_shard(path, sorted({digest: s for each in candidates for digest, s in each.sequences().items()}.items()))
