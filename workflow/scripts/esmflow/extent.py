"""How much there is to embed, in the units that time and disk go by."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from esmflow.engine import is_pooled


@dataclass
class Extent:
    """Sequences, their residues and their pairs of residues, after truncation to `max_residues` if it is set."""

    max_residues: int | None = None
    sequences: int = 0
    residues: int = 0
    pairs: int = 0

    def add(self, lengths: np.ndarray) -> None:
        """Adds sequences, given by their residues before truncation: int64 `[N]`."""
        kept = lengths if self.max_residues is None else np.minimum(lengths, self.max_residues)
        self.sequences += len(kept)
        self.residues += int(kept.sum())
        self.pairs += int((kept**2).sum())

    def rows(self, array: str) -> int:
        """Rows of all sequences in the array of this name; see `engine.rows_per_sequence`."""
        if is_pooled(array):
            return self.sequences
        return self.pairs if array == "contacts" else self.residues
