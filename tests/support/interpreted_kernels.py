"""Runs the GPU kernels on a CPU, in Triton's interpreter, and prints how far each result is from plain PyTorch's.

TRITON_INTERPRET=1 python interpreted_kernels.py [changed copies: eight_bits_1.py sixteen_bits_2.py …]

Prints one JSON object for all kernels as they are, and one for each copy: by the case's name its largest error.
Triton reads TRITON_INTERPRET when it is imported, hence a process of its own.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

from esmflow.checkpoint.families import EPSILON
from esmflow.engine import eight_bit
from esmflow.engine.attention import Rotation, normed_and_rotated, rotated, sdpa_attention
from esmflow.engine.kernels import eight_bits, plain_eight_bits, sixteen_bits
from esmflow.engine.packing import pack_sequences
from esmflow.engine.transformer import normalise
from esmflow.engine.weights import EightBitMatrix, Norm

WIDTHS = (64, 96, 320)
# Head size and lengths, tokens of cls and eos included. Up to 192 tokens keys are taken 32 at a time, beyond that 64.
SHORT = ((16, (7, 72, 3)), (24, (130, 40)), (32, (64, 3, 33)), (64, (98, 28)))
LONG = ((16, (200, 22)), (24, (193, 64)), (32, (256, 9)), (64, (197, 65)))
# Tokens, width, columns; and head size and lengths.
PRODUCTS = ((131, 96, 168), (9, 320, 136))
# Fewer tokens show a planted fault as well, in a third of the time.
FEW_TOKENS = ((19, 96, 168),)
TURNED = ((32, (70, 20)), (16, (40, 3, 9)), (64, (66, 5)))
NORMED, GATES = (24, 64), (256, 1280)
BEYOND = 128
"""Rows behind a tensor that must stay as they are."""


def error_of_norm(module, width: int, dtype: torch.dtype) -> float:
    """Rows of which epsilon is a good part of the variance, with a mean that is not 0."""
    x = 0.01 * torch.randn(9, width) + 0.1
    weight, bias, offset = torch.randn(width), torch.randn(width), 0.01 * torch.randn(width)
    found = module.normalise(x, weight, bias, offset, EPSILON, dtype)
    assert found.dtype == dtype
    expected = normalise(x, weight, bias, offset, EPSILON, dtype)
    return float((found.float() - expected.float()).abs().max())


def errors_of_attention(module, size: int, lengths: tuple[int, ...], heads: int = 2) -> dict[str, float]:
    """The rotation's error, and that of rotation and attention together."""
    pack = pack_sequences(["M" * (n - 2) for n in lengths], quantum=1 << 12)
    assert sum(pack.lengths) > sum(lengths), "without a tail"
    # The last blocks first: one that writes beyond its sequence writes over what is already right.
    pack = replace(pack, blocks=pack.blocks.flip(0))
    tokens = len(pack.tokens)
    memory = 2 * torch.randn(tokens + BEYOND, 3, heads, size)
    qkv, behind = memory[:tokens], memory[tokens:].clone()
    bias = torch.randn(2 * heads * size)
    rotation = Rotation.of(10000.0 ** -(torch.arange(0, size, 2) / size), pack.longest)
    expected_q, expected_k = rotated(qkv, bias, rotation, pack)
    expected = sdpa_attention(qkv.clone(), bias, rotation, pack)
    values = qkv[:, 2].clone()
    module.rotate_in_place(qkv, qkv, bias, rotation.cos, rotation.sin, pack.positions)
    turned = max(
        float((found - right).abs().max())
        for found, right in ((qkv[:, 0], expected_q), (qkv[:, 1], expected_k), (qkv[:, 2], values))
    )
    if not torch.equal(memory[tokens:], behind):
        turned = float("inf")
    qkv = torch.stack((expected_q, expected_k, values), 1)
    found = module.attend(qkv, qkv, pack)
    return {"rotation": turned, "attention": float((found - expected).abs().max())}


def error_of_normed_rotation(module, size: int, lengths: tuple[int, ...], heads: int = 3) -> float:
    """Queries and keys normalised over all heads, of which the number of pairs is no power of two, and rotated."""
    pack = pack_sequences(["M" * (n - 2) for n in lengths])
    tokens = len(pack.tokens)
    memory = 0.01 * torch.randn(tokens + BEYOND, 3, heads, size) + 0.1
    before, qkv = memory.clone(), memory[:tokens]
    weight = torch.randn(2 * heads * size)
    rotation = Rotation.of(10000.0 ** -(torch.arange(0, size, 2) / size), pack.longest)
    expected = normed_and_rotated(qkv, weight, rotation, pack)
    module.normalise_and_rotate_in_place(qkv, qkv, weight, rotation.cos, rotation.sin, pack.positions)
    if not (torch.equal(memory[tokens:], before[tokens:]) and torch.equal(qkv[:, 2], before[:tokens, 2])):
        return float("inf")
    return max(float((found - right).abs().max()) for found, right in zip(qkv[:, :2].unbind(1), expected, strict=True))


def error_of_gate(module, tokens: int, width: int) -> float:
    """Of a width that leaves a tail, with numbers of which SiLU is anything from nothing to all."""
    product = 5 * torch.randn(tokens, 2 * width)
    gate, up = product.chunk(2, dim=1)
    return float((module.gate(product) - torch.nn.functional.silu(gate) * up).abs().max())


def errors(module, packs) -> dict[str, float]:
    """By case, the largest difference from plain PyTorch."""
    torch.manual_seed(0)
    found = {f"norm of {width}": error_of_norm(module, width, torch.float32) for width in WIDTHS}
    found["norm in fp16"] = error_of_norm(module, WIDTHS[0], torch.float16)
    for size, lengths in packs:
        for what, error in errors_of_attention(module, size, lengths).items():
            found[f"{what}, head size {size}, {lengths}"] = error
    for size in NORMED:
        found[f"normed rotation, head size {size}"] = error_of_normed_rotation(module, size, (6, 3))
    for width in GATES:
        found[f"gate of {width}"] = error_of_gate(module, 3, width)
    return found


def errors_of_eight_bits(module, shapes, packs) -> dict[str, float]:
    """Each kernel for products of 8 bits against the same in PyTorch, with tails in every direction."""
    torch.manual_seed(0)
    found = {}
    for tokens, width, columns in shapes:
        case = f"of {tokens} x {width}"
        memory = torch.randn(tokens + BEYOND, columns)
        x, norm = torch.randn(tokens, width), Norm(*torch.randn(3, width).unbind())
        signs = plain_eight_bits.hadamard(min(width & -width, 64))
        rows = plain_eight_bits.quantise_rows(x, signs)
        for what, pair in {
            "rounded norm": (
                f(x, norm, EPSILON, len(signs)) for f in (module.quantise_norm, plain_eight_bits.quantise_norm)
            ),
            "rounded rows": (module.quantise_rows(x, signs), rows),
        }.items():
            (values, scales), (right, right_scales) = pair
            # A number halfway between two steps may go either way.
            off = (values.int() - right.int()).abs()
            wrong = float(off.max() > 1 or (off > 0).float().mean() > 0.001)
            found[f"{what} {case}"] = wrong + float((scales / right_scales - 1).abs().max())
        matrix = eight_bit._rounded(torch.randn(columns, width), torch.randn(columns))
        for activation in ("none", "gelu"):
            found[f"product with {activation} {case}"] = error_of_product(module, rows, matrix, activation)
        # Of which SiLU is anything from nothing to all, and an error in fp32 stays small.
        gated = matrix._replace(scale=matrix.scale * width**-0.5)
        found[f"product with gate {case}"] = error_of_product(module, rows, gated, "gate")
        tiles, module._tiles = module._tiles, lambda *_: module._DEEP_ON_HOPPER
        found[f"product with gate {case}, large tiles"] = error_of_product(module, rows, gated, "gate")
        module._tiles = tiles
        expected = plain_eight_bits.add_product(memory[:tokens].clone(), rows, matrix)
        behind = memory[tokens:].clone()
        found[f"sum {case}"] = largest_difference(module.add_product(memory[:tokens], rows, matrix), expected)
        if not torch.equal(memory[tokens:], behind):
            found[f"sum {case}"] = float("inf")
    for size, lengths in packs:
        found[f"attention of 8 bits, head size {size}"] = error_of_rotating_product(module, size, lengths)
    return found


def error_of_product(module, rows, matrix: EightBitMatrix, activation: str) -> float:
    return largest_difference(
        *(f(rows, matrix, torch.float32, activation) for f in (module.multiply, plain_eight_bits.multiply))
    )


def error_of_rotating_product(module, size: int, lengths: tuple[int, ...], heads: int = 2) -> float:
    """Queries and keys turned as they come out of the product, against product, rotation and attention one by one."""
    pack = pack_sequences(["M" * (n - 2) for n in lengths])
    width = heads * size
    signs = plain_eight_bits.hadamard(min(width & -width, 64))
    rows = plain_eight_bits.quantise_rows(torch.randn(len(pack.tokens), width), signs)
    matrix = eight_bit._rounded(torch.randn(3 * width, width) * width**-0.5, torch.randn(3 * width))
    rotation = Rotation.of(10000.0 ** -(torch.arange(0, size, 2) / size), pack.longest)
    found = module.attend(rows, matrix, rotation, pack, torch.float32)
    qkv = eight_bit.unpaired(plain_eight_bits.multiply(rows, matrix, torch.float32, "none"), size // 2)
    return largest_difference(found, sdpa_attention(qkv, torch.zeros(2 * width), rotation, pack))


def largest_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max())


def changed(path: str):
    """A changed copy of the kernels as a module."""
    spec = importlib.util.spec_from_file_location("changed_kernels", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(
        json.dumps({**errors(sixteen_bits, (*SHORT, *LONG)), **errors_of_eight_bits(eight_bits, PRODUCTS, TURNED)}),
        flush=True,
    )
    for copy in sys.argv[1:]:
        module = changed(copy)
        of_eight_bits = Path(copy).name.startswith("eight_bits")
        if of_eight_bits:
            found = errors_of_eight_bits(module, FEW_TOKENS, TURNED[1:2])
        else:
            found = errors(module, (SHORT[1], LONG[2]))
        print(json.dumps(found), flush=True)
