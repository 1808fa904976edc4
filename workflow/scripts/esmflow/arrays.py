"""What can be computed for a sequence, what the arrays are called, and where each sequence's rows are in them.

The rules import this, in environments without NumPy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

POOLED = ("mean", "bos", "max", "std")
PER_LAYER = (*POOLED, "per_residue")
OF_HEAD = ("logits", "entropy", "pseudo_perplexity")
INCLUDE = (*PER_LAYER, "contacts", *OF_HEAD)

ATTENTION = "attention"
"""The attention maps of a layer: of short sequences only, as they take as much as a sequence's length squared, for each
head."""

LOG_LIKELIHOOD = "log_likelihood"
"""Of each residue the logarithm of the probability that the model gives it: what `pseudo_perplexity` is put together
from where a sequence goes through the model in windows. Nobody can ask for it."""

MASKED_LOGITS = "masked_logits"
"""Of a copy of a sequence with one residue masked the logits at the mask, for masked marginals. Likewise."""

VOCABULARY_SIZE = 33
"""Tokens that ESM-2 knows: the width of `logits`."""


@dataclass(frozen=True, order=True)
class Array:
    """One array that is computed for every sequence, such as `mean_layer36` or `contacts`.

    kind: one of `INCLUDE`, `ATTENTION`, or of the two that nobody can ask for. layer: None for contacts and for what is
        made of logits, which are of the whole model.
    """

    kind: str
    layer: int | None = None

    @classmethod
    @lru_cache(maxsize=1024)
    def named(cls, name: str) -> Array:
        """The array of this name."""
        kind, _, layer = name.partition("_layer")
        return cls(kind, int(layer) if layer else None)

    @property
    def name(self) -> str:
        """`{kind}_layer{n}`, or the kind alone: what it is called in segments, folders and files."""
        return self.kind if self.layer is None else f"{self.kind}_layer{self.layer}"

    def __str__(self) -> str:
        return self.name

    @property
    def is_pooled(self) -> bool:
        """Whether it has one row for each sequence, rather than a number that its length decides."""
        return self.is_vector or self.kind in ("pseudo_perplexity", MASKED_LOGITS)

    @property
    def is_vector(self) -> bool:
        """Whether it has one vector for each sequence."""
        return self.kind in POOLED

    def row(self, hidden: int, heads: int = 1) -> tuple[int, ...]:
        """The shape of one row, for a model of this width and so many heads: `()` is a number."""
        if self.kind == ATTENTION:
            return (heads,)
        if self.kind in ("logits", MASKED_LOGITS):
            return (VOCABULARY_SIZE,)
        return (hidden,) if self.kind in PER_LAYER else ()

    def rows(self, lengths: np.ndarray) -> np.ndarray:
        """How many rows each sequence has, from the residue counts `[N]`: int64 `[N]`.

        One for pooled arrays, one for each pair of residues for `contacts`, one for each pair of tokens, cls and eos
        among them, for `attention`, one for each residue for the others.
        """
        import numpy as np

        if self.is_pooled:
            return np.ones(len(lengths), np.int64)
        counts = np.asarray(lengths, np.int64)
        if self.kind == ATTENTION:
            return (counts + 2) ** 2
        return counts**2 if self.kind == "contacts" else counts

    def offsets(self, lengths: np.ndarray) -> np.ndarray:
        """Where each sequence's rows begin and end: int64 `[N + 1]`."""
        import numpy as np

        return np.concatenate(([0], np.cumsum(self.rows(lengths))))


@dataclass(frozen=True)
class Outputs:
    """What to compute for every sequence.

    layers: resolved layer numbers, 0 (scaled token embedding) to L (after the final layer norm), ascending.
    include: any of `INCLUDE` and `ATTENTION`. per_residue: `fp32` or `fp16`, the type of per-residue arrays; all others
        are fp32.
    """

    layers: tuple[int, ...]
    include: tuple[str, ...]
    per_residue: str = "fp32"

    @property
    def needs_logits(self) -> bool:
        """Whether anything is made of the language model head's logits."""
        return not {*OF_HEAD, LOG_LIKELIHOOD, MASKED_LOGITS}.isdisjoint(self.include)

    def of_layer(self, layer: int) -> list[Array]:
        """The arrays that are made from one layer: of its representation, and of its attention, which layer 0 lacks."""
        kinds = (*PER_LAYER, ATTENTION) if layer else PER_LAYER
        return [Array(kind, layer) for kind in self.include if kind in kinds]

    def arrays(self) -> list[Array]:
        """All arrays: those of each layer, then those of the model."""
        by_layer = [array for layer in self.layers for array in self.of_layer(layer)]
        return by_layer + [Array(kind) for kind in self.include if kind not in (*PER_LAYER, ATTENTION)]

    def names(self) -> list[str]:
        """The names of all arrays, in the same order."""
        return [array.name for array in self.arrays()]

    def row_bytes(self, array: Array, hidden: int, heads: int = 1) -> int:
        """Bytes of one row of an array, for a model of this width and so many heads."""
        half = array.kind == "per_residue" and self.per_residue == "fp16"
        return math.prod(array.row(hidden, heads)) * (2 if half else 4)


def resolve_layers(layers: Sequence[int], number_of_layers: int) -> tuple[int, ...]:
    """Turns layer numbers as a user writes them (negative ones count from the end, as in Python) into 0…L, ascending.

    Layer 0 is the token embedding, so a model of L layers has L + 1 representations and -1 means L.
    Raises ValueError for a layer that the model does not have.
    """
    resolved = set()
    for layer in layers:
        if not -number_of_layers - 1 <= layer <= number_of_layers:
            raise ValueError(
                f"layers: {layer} does not exist in this model: it has {number_of_layers} layers, "
                f"so layers go from {-number_of_layers - 1} to {number_of_layers}"
            )
        resolved.add(layer if layer >= 0 else number_of_layers + 1 + layer)
    return tuple(sorted(resolved))
