"""Runs the GPU kernels on a CPU, in Triton's interpreter, and prints how far each result is from plain PyTorch's.

TRITON_INTERPRET=1 python interpreted_kernels.py [changed copies of kernels.py …]

Prints one JSON object for each file, the kernels themselves first: by the case's name its largest error. Triton reads
TRITON_INTERPRET when it is imported, hence a process of its own.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace

import torch

from esmflow.engine.attention import Rotation, rotated, sdpa_attention
from esmflow.engine.kernels import sixteen_bits
from esmflow.engine.packing import pack_sequences
from esmflow.engine.transformer import EPSILON, normalise

WIDTHS = (64, 96, 320)
# Head size and lengths, tokens of cls and eos included. Up to 192 tokens keys are taken 32 at a time, beyond that 64.
SHORT = ((16, (7, 72, 3)), (24, (130, 40)), (32, (64, 3, 33)), (64, (98, 28)))
LONG = ((16, (200, 22)), (24, (193, 64)), (32, (256, 9)), (64, (197, 65)))
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
    module.rotate_in_place(qkv, bias, rotation.cos, rotation.sin, pack.positions)
    turned = max(
        float((found - right).abs().max())
        for found, right in ((qkv[:, 0], expected_q), (qkv[:, 1], expected_k), (qkv[:, 2], values))
    )
    if not torch.equal(memory[tokens:], behind):
        turned = float("inf")
    qkv = torch.stack((expected_q, expected_k, values), 1)
    found = module.attend(qkv, qkv, pack)
    return {"rotation": turned, "attention": float((found - expected).abs().max())}


def errors(module, packs) -> dict[str, float]:
    """By case, the largest difference from plain PyTorch."""
    torch.manual_seed(0)
    found = {f"norm of {width}": error_of_norm(module, width, torch.float32) for width in WIDTHS}
    found["norm in fp16"] = error_of_norm(module, WIDTHS[0], torch.float16)
    for size, lengths in packs:
        for what, error in errors_of_attention(module, size, lengths).items():
            found[f"{what}, head size {size}, {lengths}"] = error
    return found


def changed(path: str):
    """A changed copy of the kernels as a module."""
    spec = importlib.util.spec_from_file_location("changed_kernels", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(errors(sixteen_bits, (*SHORT, *LONG))), flush=True)
    for copy in sys.argv[1:]:
        print(json.dumps(errors(changed(copy), (SHORT[1], LONG[2]))), flush=True)
