"""Matrix products of 8 bits: rows of what goes in and of the weights are turned, then rounded to -127…127.

A row `x` becomes integers and one scale, `max |x H| / 127`, and so does every row of a weight matrix `W`. H is a
Hadamard matrix in blocks of up to 64 coordinates. It is orthogonal, so `(x H) (W H)ᵀ = x Wᵀ`, but it spreads what
stands out in a few coordinates over a whole block, and rounding loses less (Ashkboos et al., 2024, arXiv 2404.00456).
Sums are exact, in 32-bit integers. Attention, norms, GELU or gate and the residual stream stay in 16 bits, or 32 on a
CPU.

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

from esmflow.checkpoint.families import EPSILON, Family
from esmflow.engine.attention import Attention, Rotation, flash_available
from esmflow.engine.kernels.plain_eight_bits import (
    Rows,
    add_product,
    block_of,
    hadamard,
    multiply,
    quantise_norm,
    quantise_rows,
    turned,
)
from esmflow.engine.packing import Pack, pack_sequences
from esmflow.engine.transformer import Encoder, Operations, check, kernels_or_plain
from esmflow.engine.weights import Activation, EightBitMatrix, LayerWeights, Matrix, Norm, Weights

_PERCENT = dict(zip("LAGVESIRDTKPNFQYHMCW", (10, 8, 7, 7, 7, 7, 6, 6, 5, 5, 6, 5, 4, 4, 4, 3, 2, 2, 1, 1), strict=True))
"""Residues of 100 in proteins, rounded."""


class Rounding(NamedTuple):
    """What the products are made of, as kernels or in PyTorch.

    quantise_norm: `(x, norm, epsilon, block)`. quantise_rows: `(x, signs)`. multiply: `(rows, matrix, dtype,
    activation)`. add_product: `(x, rows, matrix)`, in place. attend: `(rows, matrix, rotation, pack, dtype)`, attention
    from the rows that its product takes; None where that is a product and an attention by itself.
    """

    quantise_norm: Callable[[torch.Tensor, Norm, float, int], Rows]
    quantise_rows: Callable[[torch.Tensor, torch.Tensor], Rows]
    multiply: Callable[[Rows, EightBitMatrix, torch.dtype, Activation], torch.Tensor]
    add_product: Callable[[torch.Tensor, Rows, EightBitMatrix], torch.Tensor]
    attend: Callable[[Rows, EightBitMatrix, Rotation, Pack, torch.dtype], torch.Tensor] | None = None


_PLAIN = Rounding(quantise_norm, quantise_rows, multiply, add_product)


@dataclass(frozen=True)
class EightBitOperations(Operations):
    """Attention as it was, products of 8 bits.

    signs: a Hadamard matrix by the width of what it turns, attention's output and the activation's. by_heads: `(qkv,
    half)`, the product of all three as attention wants it, `[T, 3, H, hd]`.
    """

    rounding: Rounding
    signs: dict[int, torch.Tensor]
    activation: Activation
    by_heads: Callable[[torch.Tensor, int], torch.Tensor]

    def straight(self, x: torch.Tensor) -> torch.Tensor:
        return turned(x.float())

    def mix(
        self, x: torch.Tensor, layer: LayerWeights, rotation: Rotation, pack: Pack, attend: Attention
    ) -> torch.Tensor:
        rows = self.rounding.quantise_norm(x, layer.attention_norm, EPSILON, block_of(x.shape[1]))
        if self.rounding.attend and attend is self.attend:
            return self.rounding.attend(rows, layer.qkv, rotation, pack, x.dtype)
        qkv = self.rounding.multiply(rows, layer.qkv, x.dtype, "none")
        return attend(self.by_heads(qkv, rotation.cos.shape[1]), layer.qk, rotation, pack)

    def feed(self, x: torch.Tensor, norm: Norm, fc1: Matrix) -> torch.Tensor:
        rows = self.rounding.quantise_norm(x, norm, EPSILON, block_of(x.shape[1]))
        return self.rounding.multiply(rows, fc1, x.dtype, self.activation)

    def add(self, x: torch.Tensor, hidden: torch.Tensor, matrix: Matrix) -> torch.Tensor:
        return self.rounding.add_product(x, self.rounding.quantise_rows(hidden, self.signs[hidden.shape[1]]), matrix)


def _operations(sixteen_bits: Operations, weights: Weights, family: Family) -> EightBitOperations:
    """Products of 8 bits between the other operations: the kernels where they run and agree with PyTorch's."""
    device, dtype, layer = weights.embedding.device, weights.embedding.dtype, weights.layers[0]
    widths = (matrix.weight.shape[1] for matrix in (layer.out, layer.fc2))
    plain = EightBitOperations(
        **_values(sixteen_bits),
        rounding=_PLAIN,
        signs={width: hadamard(block_of(width)).to(device, dtype) for width in widths},
        activation="gate" if family.gate else "gelu",
        by_heads=in_order if family.query_key_norms else unpaired,
    )
    if not flash_available(device, dtype):
        return plain

    def compiled() -> EightBitOperations:
        from esmflow.engine.kernels import eight_bits

        kernels = Rounding(*(getattr(eight_bits, name) for name in Rounding._fields))
        if family.query_key_norms or not eight_bits.turns(len(layer.frequencies)):
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
    check("8-bit product with activation", fast.feed(x, layer.ffn_norm, layer.fc1), hidden)
    check("8-bit sum", *(f.add(x.clone(), hidden, layer.fc2) for f in (fast, plain)))


def paired(rows: torch.Tensor, blocks: int) -> torch.Tensor:
    """Rows `[N, …]` of which each block has two halves: what has the same place in both, as neighbours."""
    return rows.unflatten(0, (blocks, 2, -1)).transpose(1, 2).flatten(0, 2)


def in_order(qkv: torch.Tensor, half: int) -> torch.Tensor:
    """`[T, 3 D]` of a product with a matrix as it was, as attention wants it, `[T, 3, H, hd]`."""
    return qkv.unflatten(1, (3, -1, 2 * half))


def unpaired(qkv: torch.Tensor, half: int) -> torch.Tensor:
    """As `in_order`, of a matrix in which the halves of queries' and keys' heads are `paired`."""
    heads = in_order(qkv, half)
    turned = heads[:, :2].unflatten(3, (half, 2)).transpose(3, 4).flatten(3)
    return torch.cat((turned, heads[:, 2:]), 1)


def beside(device: torch.device) -> torch.dtype:
    """The type of everything else: fp16, the most exact of 16 bits, on a GPU that is fast in it, else fp32."""
    return torch.float16 if flash_available(device, torch.float16) else torch.float32


def rounded(model: Encoder, family: Family) -> Encoder:
    """The same model with every layer's matrices in 8 bits; they need room beside those of `model` until it is gone."""

    def round_anew() -> Weights:
        weights = _rounded_weights(model.weights, model.operations, family)
        model.unload()
        return weights

    weights = round_anew()
    return Encoder(weights, _operations(model.operations, weights, family), round_anew)


@torch.inference_mode()
def _rounded_weights(weights: Weights, operations: Operations, family: Family) -> Weights:
    means = iter(_typical_means(weights, operations))
    return replace(
        weights,
        embedding=turned(weights.embedding.float()).to(weights.embedding.dtype),
        layers=tuple(_rounded_layer(layer, next(means), next(means), family) for layer in weights.layers),
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


def _rounded_layer(
    layer: LayerWeights, before_qkv: torch.Tensor, before_fc1: torch.Tensor, family: Family
) -> LayerWeights:
    """before_qkv, before_fc1: see `_typical_means`."""
    none, of_qk = torch.zeros_like(before_qkv), torch.zeros_like(layer.qk)
    # Biases are part of the matrix; norms of queries and keys, and with them the rotation, come after its product.
    biases, qk = (of_qk, layer.qk) if family.query_key_norms else (layer.qk, of_qk)
    qkv = _rounded(*_after_norm(layer.qkv, torch.cat((biases, none)), layer.attention_norm, before_qkv))
    fc1 = _rounded(*_after_norm(layer.fc1.weight, layer.fc1.bias, layer.ffn_norm, before_fc1))

    def in_pairs(rows: torch.Tensor) -> torch.Tensor:
        queries_and_keys, values = rows.split((len(of_qk), len(none)))
        return torch.cat((paired(queries_and_keys, len(of_qk) // (2 * len(layer.frequencies))), values))

    if not family.query_key_norms:
        qkv = EightBitMatrix(*map(in_pairs, qkv))
    if family.gate:
        fc1 = EightBitMatrix(*(paired(rows, 1) for rows in fc1))
    return replace(
        layer,
        attention_norm=_before_product(layer.attention_norm, before_qkv),
        qkv=qkv,
        qk=qk,
        out=_rounded(turned(layer.out.float()).t(), none),
        ffn_norm=_before_product(layer.ffn_norm, before_fc1),
        fc1=fc1,
        fc2=_rounded(turned(layer.fc2.float()).t(), none),
    )


def _before_product(norm: Norm, mean: torch.Tensor) -> Norm:
    """A norm in turned coordinates, its weight in the matrix that follows, its result less the mean."""
    return Norm(torch.ones_like(norm.weight), -turned(mean), turned(norm.offset))


def _after_norm(
    weight: torch.Tensor, bias: torch.Tensor | None, norm: Norm, mean: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix `[N, K]` and its bias, if it has one, with what `_before_product` leaves to them."""
    exact = weight.float()
    left = exact @ (norm.weight * mean + norm.bias)
    return exact * norm.weight, left if bias is None else bias.float() + left


def _rounded(weight: torch.Tensor, bias: torch.Tensor) -> EightBitMatrix:
    """weight: `[N, K]`, of what comes turned."""
    return EightBitMatrix(*quantise_rows(weight, hadamard(block_of(weight.shape[1])).to(weight.device)), bias)
