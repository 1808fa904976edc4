"""Predict contacts from attention maps, as fair-esm's contact head does, for every sequence of a pack."""

from __future__ import annotations

import torch

from esmflow.engine.attention import Rotation, rotated
from esmflow.engine.packing import Pack


class ContactAttention:
    """An attention back end with explicit maps, which gathers contact logits layer after layer.

    The head is a logistic regression over all layers' and heads' maps (Rao et al., 2020, "Transformer protein language
    models are unsupervised structure learners"), so each map adds its part as soon as it is known and none is kept.
    One object serves one forward pass.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        """weight: `[layers, H]` fp32, the regression's coefficients. bias: `[1]`."""
        self._remaining = iter(weight)
        self._bias = bias
        self._logits: list[torch.Tensor] = []

    def __call__(self, qkv: torch.Tensor, bias: torch.Tensor, rotation: Rotation, pack: Pack) -> torch.Tensor:
        """Attends `[T, 3, H, hd]` to `[T, H · hd]` in fp32, one sequence at a time."""
        q, k = rotated(qkv, bias, rotation, pack)
        coefficients = next(self._remaining)
        if not self._logits:
            self._logits = [torch.zeros(n, n, device=q.device) for n in pack.residues]
        mixed = torch.empty_like(q)
        start = 0
        for index, length in enumerate(pack.lengths):
            rows = slice(start, start + length)
            # [H, length, hd]
            query, key, value = (x[rows].transpose(0, 1).float() for x in (q, k, qkv[:, 2]))
            maps = (query * query.shape[-1] ** -0.5 @ key.transpose(1, 2)).softmax(dim=-1)
            mixed[rows] = (maps @ value).transpose(0, 1).to(mixed.dtype)
            if index < len(pack.residues):
                features = average_product_correction(maps[:, 1:-1, 1:-1])
                self._logits[index] += torch.einsum("h,hij->ij", coefficients, features)
            start += length
        return mixed.flatten(1)

    def contacts(self) -> torch.Tensor:
        """Contact probabilities: every sequence's `[n, n]` map, flattened, end to end."""
        return torch.cat([(logits + self._bias).sigmoid().flatten() for logits in self._logits])


def average_product_correction(maps: torch.Tensor) -> torch.Tensor:
    """Symmetrises maps `[H, n, n]` and takes away what row and column sums alone explain (Dunn et al., 2008)."""
    maps = maps + maps.transpose(-1, -2)
    rows, columns = maps.sum(-1, keepdim=True), maps.sum(-2, keepdim=True)
    return maps - rows * columns / maps.sum((-1, -2), keepdim=True)
