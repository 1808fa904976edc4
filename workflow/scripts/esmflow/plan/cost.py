"""How much there is to embed, in the units that time and disk go by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from esmflow.arrays import is_pooled
from esmflow.checkpoint.file import ModelDimensions

# A dry run imports this module, where there may be nothing but Snakemake.
if TYPE_CHECKING:
    import numpy as np


@dataclass
class Extent:
    """Sequences, their residues and their pairs of residues, after truncation to `max_residues` if it is set."""

    max_residues: int | None = None
    sequences: int = 0
    residues: int = 0
    pairs: int = 0

    def add(self, lengths: np.ndarray) -> None:
        """Adds sequences, given by their residues before truncation: int64 `[N]`."""
        kept = lengths if self.max_residues is None else lengths.clip(max=self.max_residues)
        self.sequences += len(kept)
        self.residues += int(kept.sum())
        self.pairs += int((kept**2).sum())

    def rows(self, array: str) -> int:
        """Rows of all sequences in the array of this name; see `engine.rows_per_sequence`."""
        if is_pooled(array):
            return self.sequences
        return self.pairs if array == "contacts" else self.residues


@dataclass(frozen=True)
class CostModel:
    """Estimated work of one sequence, in floating-point operations.

    For t tokens, L layers of width D: the matrix products take 24·D²·t in each layer (q, k, v and output projection
    8·D²·t, feed-forward 16·D²·t) and attention 4·D·t² (scores and weighted values), counting a multiply-add as two.
    """

    dimensions: ModelDimensions
    max_residues: int | None = None

    def cost(self, residues: Any) -> Any:
        """Operations for a sequence of this many residues, after truncation to `max_residues`, with cls and eos.

        Takes a number or an array of them, and returns the same.
        """
        if self.max_residues is not None:
            whole = isinstance(residues, int)
            residues = min(residues, self.max_residues) if whole else residues.clip(max=self.max_residues)
        tokens = residues + 2
        width = self.dimensions.hidden
        return self.dimensions.layers * (24.0 * width * width * tokens + 4.0 * width * tokens * tokens)
