"""What an extraction engine is: the interface that every engine shares, and the words for what it computes.

An engine turns batches of sequences into arrays. It works in three steps, so that a caller can overlap them:
`prepare` (tokens, on the host, from any thread), `launch` (start the work on the device) and `fetch` (wait for the
result). `esmflow.extraction` drives them and deals with everything that can go wrong.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from esmflow.checkpoints import ModelDimensions

POOLED = ("mean", "bos")
PER_LAYER = ("mean", "bos", "per_residue")
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
    if is_pooled(name):
        return np.ones(len(lengths), np.int64)
    counts = np.asarray(lengths, np.int64)
    return counts**2 if name == "contacts" else counts


def row_offsets(name: str, lengths: np.ndarray) -> np.ndarray:
    """Where each sequence's rows begin and end in the array of this name: int64 `[N + 1]`."""
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


def check_heads(include: Collection[str], dimensions: ModelDimensions) -> None:
    """Raises ValueError when something is asked for whose head the checkpoint does not hold."""
    if "contacts" in include and not dimensions.has_contact_head:
        raise ValueError(
            "include: contacts are asked for, but the checkpoint has no contact head; put fair-esm's "
            "…-contact-regression.pt beside the .pt file and run again with --forcerun model, or leave contacts out"
        )
    if "logits" in include and not dimensions.has_lm_head:
        raise ValueError(
            "include: logits are asked for, but the checkpoint has no language model head; "
            "use a checkpoint with one, or leave logits out"
        )


class Engine(Protocol):
    """One model on one device, ready to embed."""

    precision: str
    """`bf16`, `fp16` or `fp32`: the precision of the matrix products. Results are fp32 whatever it is."""

    outputs: Outputs

    def default_token_budget(self) -> int:
        """Tokens in one batch where the user leaves the choice to the engine."""
        ...

    def batches(self, lengths: Sequence[int], token_budget: int) -> list[list[int]]:
        """Groups sequences, given by their residue counts, into batches of at most `token_budget` tokens.

        Returns lists of indices into `lengths`. A sequence longer than the budget is a batch of its own.
        """
        ...

    def prepare(self, sequences: Sequence[str]) -> Any:
        """Tokenises one batch of residue strings on the host."""
        ...

    def launch(self, prepared: Any) -> Any:
        """Starts the forward pass of one prepared batch; may return before the device is done.

        Raises torch.OutOfMemoryError when the batch does not fit.
        """
        ...

    def fetch(self, launched: Any) -> dict[str, np.ndarray]:
        """Waits for one launched batch. Returns the arrays named by `Outputs.names`, fp32.

        `mean` and `bos` are `[B, D]` in the order of the batch; `per_residue` is `[sum of residues, D]`: the sequences'
        residues end to end, in the order of the batch, without cls and eos.
        """
        ...

    def with_outputs(self, outputs: Outputs) -> Engine:
        """The same model, in the same precision, computing something else."""
        ...

    def at_full_precision(self) -> Engine:
        """The same model in fp32: what a sequence with a non-finite result is tried again with."""
        ...
