"""Matrix products of 8 bits: rows of what goes in and of the weights are turned, then rounded to -127…127.

A row `x` becomes integers and one scale, `max |x H| / 127`, and so does every row of a weight matrix `W`. H is a
Hadamard matrix in blocks of up to 64 coordinates. It is orthogonal, so `(x H) (W H)ᵀ = x Wᵀ`, but it spreads what
stands out in a few coordinates over a whole block, and rounding loses less (Ashkboos et al., 2024, arXiv 2404.00456).
Sums are exact, in 32-bit integers. Attention, norms, GELU and the residual stream stay in 16 bits, or 32 on a CPU.

Before the norms nothing is left to turn: all that writes to the residual stream was turned at load, and a norm does
not notice. Its weight, which would, is part of the matrix that follows; what it takes away, the mean of a token's
coordinates, is the mean of the blocks' first ones, since `1 H` is 0 in all others.

What is the same in every token would be rounded the same way in every token, and a mean over residues does not average
that out. So what goes into a product after a norm has its mean over typical proteins taken away first (it is the
norm's bias), and the mean's own product, exact, is part of the matrix's bias. Any mean gives right results; this one
leaves small numbers to round.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from esmflow.checkpoint.families import EPSILON
from esmflow.engine.attention import Attention, Rotation, flash_available
from esmflow.engine.packing import Pack, pack_sequences
from esmflow.engine.transformer import Encoder, Operations, check, kernels_or_plain
from esmflow.engine.weights import EightBitMatrix, LayerWeights, Matrix, Norm, Weights

_BLOCK = 64
_PERCENT = dict(zip("LAGVESIRDTKPNFQYHMCW", (10, 8, 7, 7, 7, 7, 6, 6, 5, 5, 6, 5, 4, 4, 4, 3, 2, 2, 1, 1), strict=True))
"""Residues of 100 in proteins, rounded."""

Rows = tuple[torch.Tensor, torch.Tensor]
"""int8 `[T, K]` and each row's scale, fp32 `[T]`."""


class Rounding(NamedTuple):
    """What the products are made of, as kernels or in PyTorch.

    quantise_norm: `(x, norm, epsilon, block)`. quantise_rows: `(x, signs)`. multiply: `(rows, matrix, dtype, gelu)`.
    add_product: `(x, rows, matrix)`, in place. attend: `(rows, matrix, rotation, pack, dtype)`, attention from the rows
    that its product takes; None where that is a product and an attention by itself.
    """

    quantise_norm: Callable[[torch.Tensor, Norm, float, int], Rows]
    quantise_rows: Callable[[torch.Tensor, torch.Tensor], Rows]
    multiply: Callable[[Rows, EightBitMatrix, torch.dtype, bool], torch.Tensor]
    add_product: Callable[[torch.Tensor, Rows, EightBitMatrix], torch.Tensor]
    attend: Callable[[Rows, EightBitMatrix, Rotation, Pack, torch.dtype], torch.Tensor] | None = None


@dataclass(frozen=True)
class EightBitOperations(Operations):
    """Attention as it was, products of 8 bits.

    signs: a Hadamard matrix by the width of what it turns, attention's output and GELU's.
    """

    rounding: Rounding
    signs: dict[int, torch.Tensor]

    def straight(self, x: torch.Tensor) -> torch.Tensor:
        return turned(x.float())

    def mix(
        self, x: torch.Tensor, layer: LayerWeights, rotation: Rotation, pack: Pack, attend: Attention
    ) -> torch.Tensor:
        rows = self.rounding.quantise_norm(x, layer.attention_norm, EPSILON, block_of(x.shape[1]))
        if self.rounding.attend and attend is self.attend:
            return self.rounding.attend(rows, layer.qkv, rotation, pack, x.dtype)
        qkv = self.rounding.multiply(rows, layer.qkv, x.dtype, False)
        return attend(unpaired(qkv, rotation.cos.shape[1]), layer.qk, rotation, pack)

    def feed(self, x: torch.Tensor, norm: Norm, fc1: Matrix) -> torch.Tensor:
        rows = self.rounding.quantise_norm(x, norm, EPSILON, block_of(x.shape[1]))
        return self.rounding.multiply(rows, fc1, x.dtype, True)

    def add(self, x: torch.Tensor, hidden: torch.Tensor, matrix: Matrix) -> torch.Tensor:
        return self.rounding.add_product(x, self.rounding.quantise_rows(hidden, self.signs[hidden.shape[1]]), matrix)


def _operations(sixteen_bits: Operations, weights: Weights) -> EightBitOperations:
    """Products of 8 bits between the other operations: the kernels where they run and agree with PyTorch's."""
    device, dtype, width = weights.embedding.device, weights.embedding.dtype, weights.embedding.shape[1]
    signs = {w: hadamard(block_of(w)).to(device, dtype) for w in (width, 4 * width)}
    plain = EightBitOperations(**_values(sixteen_bits), rounding=_PLAIN, signs=signs)
    if not flash_available(device, dtype):
        return plain

    def compiled() -> EightBitOperations:
        from esmflow.engine.kernels import eight_bits

        kernels = Rounding(*(getattr(eight_bits, name) for name in Rounding._fields))
        if not eight_bits.turns(len(weights.layers[0].frequencies)):
            kernels = kernels._replace(attend=None)
        fast = replace(plain, rounding=kernels)
        _check_kernels(fast, plain, weights)
        return fast

    return kernels_or_plain(compiled, plain)


def _values(operations: Operations) -> dict[str, Any]:
    return {field.name: getattr(operations, field.name) for field in fields(Operations)}


@torch.inference_mode()
def _check_kernels(fast: EightBitOperations, plain: EightBitOperations, weights: Weights) -> None:
    """Compiles the kernels and holds them against PyTorch's own with the first layer's weights."""
    layer, embedding = weights.layers[0], weights.embedding
    pack = pack_sequences(["M" * 198, "M" * 98]).to(embedding.device)
    x = torch.randn(len(pack.tokens), embedding.shape[1], device=embedding.device).to(embedding.dtype)
    rotation = Rotation.of(layer.frequencies, pack.longest)
    hidden = plain.feed(x, layer.ffn_norm, layer.fc1)
    check("8-bit attention", *(f.mix(x, layer, rotation, pack, f.attend) for f in (fast, plain)))
    check("8-bit product with GELU", fast.feed(x, layer.ffn_norm, layer.fc1), hidden)
    check("8-bit sum", *(f.add(x.clone(), hidden, layer.fc2) for f in (fast, plain)))


def paired(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of queries and keys, `[2 D, …]`, of one head each in halves that are turned together, as neighbours."""
    return rows.unflatten(0, (2 * heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def unpaired(qkv: torch.Tensor, half: int) -> torch.Tensor:
    """`[T, 3 D]` of a product with a paired matrix as attention wants it, `[T, 3, H, hd]`."""
    heads = qkv.unflatten(1, (3, -1, 2 * half))
    turned = heads[:, :2].unflatten(3, (half, 2)).transpose(3, 4).flatten(3)
    return torch.cat((turned, heads[:, 2:]), 1)


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
    """`x` `[T, K]` turned in blocks: int8 `[T, K]` and each row's scale, fp32 `[T]`. See the module."""
    whole = (x.float().unflatten(1, (-1, len(signs))) @ signs.float()).flatten(1)
    peak = whole.abs().amax(1).clamp_min(1e-20)
    return (whole * (127 / peak)[:, None]).round().to(torch.int8), peak / (127 * len(signs) ** 0.5)


def _quantise_norm(x: torch.Tensor, norm: Norm, epsilon: float, block: int) -> Rows:
    centred = (x.float() + norm.offset).unflatten(1, (-1, block))
    centred[..., 0] -= centred[..., 0].mean(1, keepdim=True)
    normed = F.rms_norm(centred.flatten(1), x.shape[-1:], eps=epsilon) + norm.bias
    return quantise_rows(normed, torch.ones(1, 1, device=x.device))


def _product(rows: Rows, matrix: EightBitMatrix) -> torch.Tensor:
    values, scales = rows
    # On a GPU, PyTorch's product of integers takes no fewer than 17 rows.
    enough = F.pad(values, (0, 0, 0, max(0, 17 - len(values))))
    sums = torch._int_mm(enough, matrix.weight.t())[: len(values)]
    return sums.float() * scales[:, None] * matrix.scale + matrix.bias


def _multiply(rows: Rows, matrix: EightBitMatrix, dtype: torch.dtype, gelu: bool) -> torch.Tensor:
    product = _product(rows, matrix)
    return (F.gelu(product, approximate="tanh") if gelu else product).to(dtype)


def _add_product(x: torch.Tensor, rows: Rows, matrix: EightBitMatrix) -> torch.Tensor:
    return x.copy_(x.float() + _product(rows, matrix))


_PLAIN = Rounding(_quantise_norm, quantise_rows, _multiply, _add_product)


def beside(device: torch.device) -> torch.dtype:
    """The type of everything else: fp16, the most exact of 16 bits, on a GPU that is fast in it, else fp32."""
    return torch.float16 if flash_available(device, torch.float16) else torch.float32


def rounded(model: Encoder) -> Encoder:
    """The same model with every layer's matrices in 8 bits; they need room beside those of `model` until it is gone."""

    def round_anew() -> Weights:
        weights = _rounded_weights(model.weights, model.operations)
        model.unload()
        return weights

    weights = round_anew()
    return Encoder(weights, _operations(model.operations, weights), round_anew)


@torch.inference_mode()
def _rounded_weights(weights: Weights, operations: Operations) -> Weights:
    means = iter(_typical_means(weights, operations))
    return replace(
        weights,
        embedding=turned(weights.embedding.float()).to(weights.embedding.dtype),
        layers=tuple(_rounded_layer(layer, next(means), next(means)) for layer in weights.layers),
    )


def _typical_means(weights: Weights, operations: Operations) -> list[torch.Tensor]:
    """What comes out of each layer's two norms before their weights, in the order of computation: its mean over
    typical proteins."""
    means = []
    ones, zeros = torch.ones_like(weights.last_norm.weight), torch.zeros_like(weights.last_norm.weight)

    @dataclass(frozen=True)
    class Watched(Operations):
        def mix(self, x: torch.Tensor, layer: LayerWeights, *rest: Any) -> torch.Tensor:
            means.append(self._mean(x, layer.attention_norm))
            return super().mix(x, layer, *rest)

        def feed(self, x: torch.Tensor, norm: Norm, fc1: Matrix) -> torch.Tensor:
            means.append(self._mean(x, norm))
            return super().feed(x, norm, fc1)

        def _mean(self, x: torch.Tensor, norm: Norm) -> torch.Tensor:
            return self.normalise(x, ones, zeros, norm.offset, EPSILON, torch.float32).mean(0)

    letters = [letter for letter, percent in _PERCENT.items() for _ in range(percent)]
    draw = random.Random(0)
    pack = pack_sequences(["M" + "".join(draw.choices(letters, k=n)) for n in (60, 120, 200, 300, 400, 512)])
    watched = Watched(**_values(operations))
    model = Encoder(weights, watched, lambda: weights)
    for _ in model.representations(pack.to(weights.embedding.device), watched.attend, (len(weights.layers),)):
        pass
    return means


def _rounded_layer(layer: LayerWeights, before_qkv: torch.Tensor, before_fc1: torch.Tensor) -> LayerWeights:
    """before_qkv, before_fc1: see `_typical_means`."""
    heads = len(before_qkv) // (2 * len(layer.frequencies))
    none = torch.zeros_like(before_qkv)
    qkv, qkv_bias = _after_norm(layer.qkv, torch.cat((layer.qk, none)), layer.attention_norm, before_qkv)
    fc1, fc1_bias = _after_norm(layer.fc1.weight, layer.fc1.bias, layer.ffn_norm, before_fc1)

    def in_pairs(rows: torch.Tensor) -> torch.Tensor:
        queries_and_keys, values = rows.split((len(layer.qk), len(none)))
        return torch.cat((paired(queries_and_keys, heads), values))

    return replace(
        layer,
        attention_norm=_before_product(layer.attention_norm, before_qkv),
        qkv=_rounded(in_pairs(qkv), in_pairs(qkv_bias)),
        qk=torch.zeros_like(layer.qk),
        out=_rounded(turned(layer.out.float()).t(), none),
        ffn_norm=_before_product(layer.ffn_norm, before_fc1),
        fc1=_rounded(fc1, fc1_bias),
        fc2=_rounded(turned(layer.fc2.float()).t(), none),
    )


def _before_product(norm: Norm, mean: torch.Tensor) -> Norm:
    """A norm in turned coordinates, its weight in the matrix that follows, its result less the mean."""
    return Norm(torch.ones_like(norm.weight), -turned(mean), turned(norm.offset))


def _after_norm(
    weight: torch.Tensor, bias: torch.Tensor, norm: Norm, mean: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix `[N, K]` and its bias with what `_before_product` leaves to them."""
    exact = weight.float()
    return exact * norm.weight, bias.float() + exact @ (norm.weight * mean + norm.bias)


def _rounded(weight: torch.Tensor, bias: torch.Tensor) -> EightBitMatrix:
    """weight: `[N, K]`, of what comes turned."""
    return EightBitMatrix(*quantise_rows(weight, hadamard(block_of(weight.shape[1])).to(weight.device)), bias)
