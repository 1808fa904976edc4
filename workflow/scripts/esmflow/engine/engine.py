"""What an extraction engine is: the interface that every engine shares, and loading one by its name.

An engine turns batches of sequences into arrays. It works in three steps, so that a caller can overlap them:
`prepare` (tokens, on the host, from any thread), `launch` (start the work on the device) and `fetch` (wait for the
result). `esmflow.engine.extraction` drives them and deals with everything that can go wrong.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

from esmflow.arrays import Outputs

if TYPE_CHECKING:
    import numpy as np
    import torch

log = logging.getLogger(__name__)


class Engine(Protocol):
    """One model on one device, ready to embed."""

    precision: str
    """`bf16`, `fp16`, `fp32` or `int8`: the precision of the matrix products. Results are fp32 whatever it is."""

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

        Pooled vectors are `[B, D]` in the order of the batch; `per_residue` is `[sum of residues, D]`: the sequences'
        residues end to end, in the order of the batch, without cls and eos. `entropy` and `pseudo_perplexity` are
        numbers, `[sum of residues]` and `[B]`.
        """
        ...

    def with_outputs(self, outputs: Outputs) -> Engine:
        """The same model, in the same precision, computing something else."""
        ...

    def at_full_precision(self) -> AbstractContextManager[Engine]:
        """The same model in fp32, on a device that holds no other weights until the context is left.

        It is what a sequence with a non-finite result is tried again with. Nothing may be in flight meanwhile.
        """
        ...


def resolve_precision(precision: str, device: torch.device) -> str:
    """`auto` is bf16 on a GPU of compute capability 8.0 or more, else fp32; says why. Others stay."""
    import torch

    if precision != "auto":
        return precision
    if device.type != "cuda":
        log.info("precision auto: fp32, because this runs on a CPU")
        return "fp32"
    major, minor = torch.cuda.get_device_capability(device)
    name = torch.cuda.get_device_name(device)
    if (major, minor) >= (8, 0):
        log.info("precision auto: bf16, because %s has compute capability %d.%d", name, major, minor)
        return "bf16"
    log.info("precision auto: fp32, because %s has compute capability %d.%d, below 8.0", name, major, minor)
    return "fp32"
