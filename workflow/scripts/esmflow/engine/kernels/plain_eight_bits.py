"""What `eight_bits` does, in PyTorch: right on every device. See `esmflow.engine.eight_bit` for the arithmetic."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from esmflow.engine.weights import Activation, EightBitMatrix, Norm

_BLOCK = 64

Rows = tuple[torch.Tensor, torch.Tensor]
"""int8 `[T, K]` and each row's scale, fp32 `[T]`."""


def hadamard(size: int) -> torch.Tensor:
    """Sylvester's Hadamard matrix, `[size, size]` of 1 and -1; size: a power of two."""
    signs = torch.ones(1, 1)
    while len(signs) < size:
        signs = torch.cat((torch.cat((signs, signs), 1), torch.cat((signs, -signs), 1)))
    return signs


def block_of(width: int) -> int:
    """How many coordinates are turned together: the largest power of two, up to 64, that divides a width."""
    return min(width & -width, _BLOCK)


def turned(x: torch.Tensor) -> torch.Tensor:
    """`[…, K]`, blocks of the last axis turned by an orthogonal matrix that is its own inverse."""
    block = block_of(x.shape[-1])
    signs = hadamard(block).to(x.device, x.dtype)
    return (x.unflatten(-1, (-1, block)) @ signs).flatten(-2) / block**0.5


def quantise_rows(x: torch.Tensor, signs: torch.Tensor) -> Rows:
    """`x` `[T, K]` turned in blocks: int8 `[T, K]` and each row's scale, fp32 `[T]`."""
    whole = (x.float().unflatten(1, (-1, len(signs))) @ signs.float()).flatten(1)
    peak = whole.abs().amax(1).clamp_min(1e-20)
    return (whole * (127 / peak)[:, None]).round().to(torch.int8), peak / (127 * len(signs) ** 0.5)


def quantise_norm(x: torch.Tensor, norm: Norm, epsilon: float, block: int) -> Rows:
    """Layer norm of `x + offset` `[T, D]`, turned in blocks."""
    centred = (x.float() + norm.offset).unflatten(1, (-1, block))
    centred[..., 0] -= centred[..., 0].mean(1, keepdim=True)
    normed = F.rms_norm(centred.flatten(1), x.shape[-1:], eps=epsilon) + norm.bias
    return quantise_rows(normed, torch.ones(1, 1, device=x.device))


def product(rows: Rows, matrix: EightBitMatrix) -> torch.Tensor:
    """Quantised rows times a matrix, with its bias: fp32 `[T, N]`."""
    values, scales = rows
    # On a GPU, PyTorch's product of integers takes no fewer than 17 rows.
    enough = F.pad(values, (0, 0, 0, max(0, 17 - len(values))))
    sums = torch._int_mm(enough, matrix.weight.t())[: len(values)]
    return sums.float() * scales[:, None] * matrix.scale + matrix.bias


def multiply(rows: Rows, matrix: EightBitMatrix, dtype: torch.dtype, activation: Activation) -> torch.Tensor:
    """The product and what follows: `[T, N]`, of a gate `[T, N / 2]`."""
    result = product(rows, matrix)
    if activation == "gelu":
        result = F.gelu(result, approximate="tanh")
    elif activation == "gate":
        gate, up = result.unflatten(1, (-1, 2)).unbind(2)
        result = F.silu(gate) * up
    return result.to(dtype)


def add_product(x: torch.Tensor, rows: Rows, matrix: EightBitMatrix) -> torch.Tensor:
    """Adds the product to `x` `[T, N]` in place."""
    return x.copy_(x.float() + product(rows, matrix))
