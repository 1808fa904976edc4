"""How much there is to embed, in the units that time and disk go by."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from esmflow.arrays import ATTENTION, Array, Outputs
from esmflow.checkpoint.models import ModelDimensions
from esmflow.method import EMBED_WHOLE, LongSequences

if TYPE_CHECKING:
    import numpy as np


@dataclass
class Workload:
    """Sequences, their residues and their pairs of residues, after truncation to `max_residues` if it is set."""

    max_residues: int | None = None
    sequences: int = 0
    residues: int = 0
    pairs: int = 0

    def add(self, lengths: np.ndarray) -> None:
        """Adds sequences, given by their residues before truncation: int64 `[N]`."""
        kept = self.embedded(lengths)
        self.sequences += len(kept)
        self.residues += int(kept.sum())
        self.pairs += int((kept**2).sum())

    def embedded(self, lengths: np.ndarray) -> np.ndarray:
        """How many residues of each sequence are left by truncation."""
        return LongSequences(self.max_residues).embedded(lengths)

    def rows(self, array: Array) -> int:
        """Rows of all sequences in an array; see `Array.rows`."""
        if array.is_pooled:
            return self.sequences
        if array.kind == ATTENTION:
            return self.pairs + 4 * self.residues + 4 * self.sequences
        return self.pairs if array.kind == "contacts" else self.residues


@dataclass(frozen=True)
class CostModel:
    """Estimated work of one sequence, in floating-point operations.

    For t tokens, in each layer of width D: the matrix products take two for each of its weights and token (24·D²·t in
    ESM-2) and attention 4·D·t² (scores and weighted values), counting a multiply-add as two.
    """

    dimensions: ModelDimensions
    long: LongSequences = EMBED_WHOLE

    def cost(self, residues: Any) -> Any:
        """Operations for a sequence of this many residues: for each of its pieces, with cls and eos.

        Takes a number or an array of them, and returns the same.
        """
        tokens = self.long.piece_length(residues) + 2
        width, weights = self.dimensions.hidden, self.dimensions.layer_parameters
        of_piece = self.dimensions.layers * (2.0 * weights * tokens + 4.0 * width * tokens * tokens)
        return self.long.number_of_pieces(residues) * of_piece


# Of a shard, in memory and in one file.
_MAPS_BYTES = 1_000_000_000


def shard_limit(outputs: Outputs, dimensions: ModelDimensions, length: int) -> int:
    """The most residues of a shard of sequences of this length, with whose attention maps it is not too large."""
    rows = sum((length + 2) ** 2 for array in outputs.arrays() if array.kind == ATTENTION)
    return max(1, _MAPS_BYTES * length // (4 * dimensions.heads * rows)) if rows else sys.maxsize


# Less is not worth the start of another job, which takes 4 to 10 seconds; more than an hour of one is much to lose.
SHORTEST_JOB_SECONDS, LONGEST_JOB_SECONDS = 30, 3600
MOST_GROUPS = 10_000


def useful_groups(seconds: float, at_once: int) -> int:
    """How many shard groups to cut work of so many seconds into, of which `at_once` can run side by side.

    No group is of less than half a minute unless it is the only one. Where each of `at_once` would be of more than an
    hour, every one of them is cut into several.
    """
    if seconds < at_once * SHORTEST_JOB_SECONDS:
        groups = max(1, int(seconds / SHORTEST_JOB_SECONDS))
    else:
        groups = at_once * math.ceil(seconds / (at_once * LONGEST_JOB_SECONDS))
    return min(MOST_GROUPS, groups)
