"""Kernels for what lies between matrix products of 16 bits: layer norm, rotation, attention.

Each touches memory once, takes any pack size without being compiled again, and compiles in about a second.
"""

# Triton kernels take pointers and compile-time constants, for which Python has no types.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# ruff: noqa: ANN202

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from esmflow.checkpoint.families import EPSILON as _EPSILON
from esmflow.engine.packing import QUERY_BLOCK, Pack
from esmflow.engine.weights import Linear

# Keys taken at a time and loads in flight, as measured on an H100: short sequences leave less of a small block empty.
_SHORT, _LONG = {"KEYS": 32, "num_stages": 4}, {"KEYS": 64, "num_stages": 3}
_SHORT_TOKENS = 192
_ROTATED = 2048
"""Pairs of coordinates that one group of threads rotates."""
_GATED = 1024
"""Columns that one group of threads gates."""


@triton.jit
def _normalise(x, weight, bias, offset, out, WIDTH: tl.constexpr, PADDED: tl.constexpr, EPSILON: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, PADDED)
    used = column < WIDTH
    values = tl.load(x + row * WIDTH + column, mask=used, other=0.0).to(tl.float32)
    values += tl.load(offset + column, mask=used, other=0.0)
    mean = tl.sum(values, 0) / WIDTH
    centred = tl.where(used, values - mean, 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, 0) / WIDTH + EPSILON)
    scaled = centred * scale * tl.load(weight + column, mask=used) + tl.load(bias + column, mask=used)
    tl.store(out + row * WIDTH + column, scaled.to(out.dtype.element_ty), mask=used)


def normalise(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    offset: torch.Tensor,
    epsilon: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Layer norm of `x + offset`, `[T, D]`, computed in fp32, in one pass; the result is of type `dtype`."""
    tokens, width = x.shape
    out = torch.empty(tokens, width, dtype=dtype, device=x.device)
    padded = triton.next_power_of_2(width)
    _normalise[(tokens,)](
        x,
        weight,
        bias,
        offset,
        out,
        WIDTH=width,
        PADDED=padded,
        EPSILON=epsilon,
        num_warps=min(8, max(1, padded // 512)),
    )
    return out


@triton.jit(do_not_specialize=["tokens"])
def _rotate(
    qkv, rotated, bias, cos, sin, positions, tokens,
    WIDTH: tl.constexpr, HALF: tl.constexpr, TOKENS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    # A token's queries and keys are WIDTH pairs: coordinate j of a head and coordinate j + HALF.
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    pair = tl.program_id(1) * PAIRS + tl.arange(0, PAIRS)
    coordinate = pair % HALF
    column = pair // HALF * (2 * HALF) + coordinate
    used = (token < tokens)[:, None]
    angle = tl.load(positions + token, mask=token < tokens, other=0)[:, None] * HALF + coordinate[None, :]
    place = token[:, None].to(tl.int64) * (3 * WIDTH) + column[None, :]
    first = tl.load(qkv + place, mask=used).to(tl.float32) + tl.load(bias + column)[None, :]
    second = tl.load(qkv + place + HALF, mask=used).to(tl.float32) + tl.load(bias + column + HALF)[None, :]
    c, s = tl.load(cos + angle), tl.load(sin + angle)
    tl.store(rotated + place, (first * c - second * s).to(rotated.dtype.element_ty), mask=used)
    tl.store(rotated + place + HALF, (second * c + first * s).to(rotated.dtype.element_ty), mask=used)


def rotate_in_place(
    qkv: torch.Tensor,
    rotated: torch.Tensor,
    bias: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
) -> None:
    """Adds `bias` `[2 D]` to queries and keys of `qkv` `[T, 3, H, hd]` and rotates them, in fp32, where they lie.

    rotated: the same memory, as of the type that rotated queries and keys are to have.
    """
    tokens, _, heads, size = qkv.shape
    width = heads * size
    # The largest power of two that divides the width: every program has whole rows of work.
    pairs = min(width & -width, _ROTATED)
    rows = _ROTATED // pairs
    _rotate[(triton.cdiv(tokens, rows), width // pairs)](
        *(qkv, rotated, bias, cos, sin, positions, tokens),
        WIDTH=width,
        HALF=size // 2,
        TOKENS=rows,
        PAIRS=pairs,
        num_warps=4,
    )


@triton.jit
def _normalise_and_rotate(
    qkv, rotated, weight, cos, sin, positions,
    WIDTH: tl.constexpr, HALF: tl.constexpr, PADDED: tl.constexpr, EPSILON: tl.constexpr,
):  # fmt: skip
    # One token's queries, or its keys: WIDTH pairs, coordinate j of a head and coordinate j + HALF.
    token, part = tl.program_id(0), tl.program_id(1)
    pair = tl.arange(0, PADDED)
    used = pair < WIDTH
    coordinate = pair % HALF
    column = part * 2 * WIDTH + pair // HALF * (2 * HALF) + coordinate
    place = token.to(tl.int64) * (6 * WIDTH) + column
    left = tl.load(qkv + place, mask=used, other=0.0).to(tl.float32)
    right = tl.load(qkv + place + HALF, mask=used, other=0.0).to(tl.float32)
    mean = tl.sum(left + right, 0) / (2 * WIDTH)
    left = tl.where(used, left - mean, 0.0)
    right = tl.where(used, right - mean, 0.0)
    scale = tl.rsqrt(tl.sum(left * left + right * right, 0) / (2 * WIDTH) + EPSILON)
    left *= scale * tl.load(weight + column, mask=used, other=0.0)
    right *= scale * tl.load(weight + column + HALF, mask=used, other=0.0)
    angle = tl.load(positions + token) * HALF + coordinate
    c, s = tl.load(cos + angle, mask=used, other=0.0), tl.load(sin + angle, mask=used, other=0.0)
    tl.store(rotated + place, (left * c - right * s).to(rotated.dtype.element_ty), mask=used)
    tl.store(rotated + place + HALF, (right * c + left * s).to(rotated.dtype.element_ty), mask=used)


def normalise_and_rotate_in_place(
    qkv: torch.Tensor,
    rotated: torch.Tensor,
    weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
) -> None:
    """Normalises queries and keys of `qkv` `[T, 3, H, hd]`, over all heads together, and rotates them, in fp32.

    weight: `[2 D]`, of the two norms, which have no biases. Otherwise as `rotate_in_place`.
    """
    tokens, _, heads, size = qkv.shape
    pairs = heads * size // 2
    padded = triton.next_power_of_2(pairs)
    _normalise_and_rotate[(tokens, 2)](
        *(qkv, rotated, weight, cos, sin, positions),
        WIDTH=pairs,
        HALF=size // 2,
        PADDED=padded,
        EPSILON=_EPSILON,
        num_warps=min(8, max(1, padded // 256)),
    )


@triton.jit
def _gate(product, out, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    used = column < WIDTH
    gate = tl.load(product + row * (2 * WIDTH) + column, mask=used, other=0.0).to(tl.float32)
    up = tl.load(product + row * (2 * WIDTH) + WIDTH + column, mask=used, other=0.0).to(tl.float32)
    tl.store(out + row * WIDTH + column, (gate / (1 + tl.exp(-gate)) * up).to(out.dtype.element_ty), mask=used)


def gate(product: torch.Tensor) -> torch.Tensor:
    """SiLU of the first half of the columns times the second half, in fp32, in one pass: `[T, 2 F]` to `[T, F]`."""
    tokens, columns = product.shape
    out = torch.empty(tokens, columns // 2, dtype=product.dtype, device=product.device)
    _gate[(tokens, triton.cdiv(columns // 2, _GATED))](product, out, WIDTH=columns // 2, COLUMNS=_GATED, num_warps=4)
    return out


def gated(x: torch.Tensor, fc1: Linear) -> torch.Tensor:
    """As `transformer.gated`."""
    return gate(F.linear(x, *fc1))


@triton.jit
def _absorb(
    query, keys, values, stride, scale, keys_left, peak, total, mixed,
    SIZE: tl.constexpr, PADDED: tl.constexpr, KEYS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Takes one block of keys and values into the running softmax and weighted sum."""
    row = tl.arange(0, KEYS)
    column = tl.arange(0, PADDED)
    places = row[:, None] * stride + column[None, :]
    if MASKED or SIZE != PADDED:
        used = (row < keys_left)[:, None] & (column < SIZE)[None, :]
        key = tl.load(keys + places, mask=used, other=0.0)
        value = tl.load(values + places, mask=used, other=0.0)
    else:
        key = tl.load(keys + places)
        value = tl.load(values + places)
    scores = tl.dot(query, tl.trans(key))
    if MASKED:
        scores = tl.where((row < keys_left)[None, :], scores, -float("inf"))
    # Scaled in fp32, with log2(e) so that the softmax needs no more than powers of two.
    new_peak = tl.maximum(peak, tl.max(scores, 1) * scale)
    shares = tl.exp2(scores * scale - new_peak[:, None])
    shrink = tl.exp2(peak - new_peak)
    total = total * shrink + tl.sum(shares, 1)
    mixed = tl.dot(shares.to(value.dtype), value, mixed * shrink[:, None])
    return new_peak, total, mixed


@triton.jit
def _attend(
    rotated, qkv, out, blocks, scale, heads,
    SIZE: tl.constexpr, PADDED: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    block = tl.program_id(1)
    start = tl.load(blocks + 3 * block).to(tl.int64)
    length = tl.load(blocks + 3 * block + 1)
    first = tl.load(blocks + 3 * block + 2)
    width = heads * SIZE
    stride = 3 * width
    row = first + tl.arange(0, QUERIES)
    column = tl.arange(0, PADDED)
    used = (row < length)[:, None] & (column < SIZE)[None, :]
    queries = rotated + start * stride + head * SIZE
    query = tl.load(queries + row[:, None] * stride + column[None, :], mask=used, other=0.0)
    keys = queries + width
    values = qkv + start * stride + head * SIZE + 2 * width

    peak = tl.full([QUERIES], -float("inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    mixed = tl.zeros([QUERIES, PADDED], tl.float32)
    whole = length // KEYS * KEYS
    for key in range(0, whole, KEYS):
        peak, total, mixed = _absorb(
            query, keys + key * stride, values + key * stride, stride, scale, KEYS, peak, total, mixed,
            SIZE, PADDED, KEYS, False,
        )  # fmt: skip
    if whole < length:
        peak, total, mixed = _absorb(
            query, keys + whole * stride, values + whole * stride, stride, scale, length - whole, peak, total, mixed,
            SIZE, PADDED, KEYS, True,
        )  # fmt: skip
    places = out + (start + row)[:, None] * width + head * SIZE + column[None, :]
    tl.store(places, (mixed / total[:, None]).to(out.dtype.element_ty), mask=used)


def attend(rotated: torch.Tensor, qkv: torch.Tensor, pack: Pack) -> torch.Tensor:
    """Softmax attention of every sequence of a pack with itself: `[T, 3, H, hd]` to `[T, H · hd]`.

    rotated: has the queries and keys; qkv: has the values.
    The tiled online softmax of FlashAttention-2 (Dao, 2023). The grid holds exactly the pack's blocks of queries, and
    heads narrower than 32 are not widened to 32, which is what it gains on the general kernel.
    """
    tokens, _, heads, size = qkv.shape
    out = torch.empty(tokens, heads * size, dtype=qkv.dtype, device=qkv.device)
    _attend[(heads, len(pack.blocks))](
        rotated,
        qkv,
        out,
        pack.blocks,
        size**-0.5 * math.log2(math.e),
        heads,
        SIZE=size,
        PADDED=max(16, triton.next_power_of_2(size)),
        QUERIES=QUERY_BLOCK,
        num_warps=4,
        **(_SHORT if pack.longest <= _SHORT_TOKENS else _LONG),
    )
    return out
