"""What can be computed for a sequence, what the arrays are called, and where each sequence's rows are in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

# A dry run imports this module, where there may be nothing but Snakemake.
if TYPE_CHECKING:
    import numpy as np

POOLED = ("mean", "bos")
PER_LAYER = (*POOLED, "per_residue")
INCLUDE = (*PER_LAYER, "contacts", "logits")


@dataclass(frozen=True)
class Outputs:
    """What to compute for every sequence.

    layers: resolved layer numbers, 0 (scaled token embedding) to L (after the final layer norm), ascending.
    include: any of `INCLUDE`.
    """

    layers: tuple[int, ...]
    include: tuple[str, ...]

    def names(self) -> list[str]:
        """The arrays that an engine returns: one `{kind}_layer{n}` for each kind and layer, then those of the model."""
        by_layer = [f"{kind}_layer{layer}" for layer in self.layers for kind in self.include if kind in PER_LAYER]
        return by_layer + [kind for kind in self.include if kind not in PER_LAYER]


def is_pooled(name: str) -> bool:
    """Whether the array of this name has one row for each sequence, rather than a number that its length decides."""
    return name.partition("_layer")[0] in POOLED


def rows_per_sequence(name: str, lengths: np.ndarray) -> np.ndarray:
    """How many rows each sequence has in the array of this name, from the residue counts `[N]`: int64 `[N]`.

    One for pooled arrays, one for each residue for `per_residue` and `logits`, one for each pair for `contacts`.
    """
    import numpy as np

    if is_pooled(name):
        return np.ones(len(lengths), np.int64)
    counts = np.asarray(lengths, np.int64)
    return counts**2 if name == "contacts" else counts


def row_offsets(name: str, lengths: np.ndarray) -> np.ndarray:
    """Where each sequence's rows begin and end in the array of this name: int64 `[N + 1]`."""
    import numpy as np

    return np.concatenate(([0], np.cumsum(rows_per_sequence(name, lengths))))


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
