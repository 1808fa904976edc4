"""Kernels for matrix products of 8 bits: rotation and rounding of what goes in, and the product with what follows it.

See `esmflow.engine.eight_bit` for the arithmetic, `plain_eight_bits` for the same in PyTorch.
"""

# Triton kernels take pointers and compile-time constants, for which Python has no types.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# ruff: noqa: ANN202

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from esmflow.engine.kernels.sixteen_bits import attend as attend_to_values
from esmflow.engine.packing import Pack
from esmflow.engine.weights import Activation, EightBitMatrix, Norm

_TILES_ON_HOPPER = {"ROWS": 128, "COLUMNS": 128, "DEPTH": 128, "num_warps": 4, "num_stages": 3}
_DEEP_ON_HOPPER = {"ROWS": 128, "COLUMNS": 256, "DEPTH": 128, "num_warps": 8, "num_stages": 4}
_TILES = {"ROWS": 128, "COLUMNS": 128, "DEPTH": 64, "num_warps": 4, "num_stages": 3}
"""How a product is cut up, as measured on an H100; on other cards so that it fits the 100 kB of shared memory that all
have."""
_DEEP = 5120
"""From this width of what is multiplied on, a program's start and end no longer count, and large tiles are faster."""

_ROWS_AT_ONCE = 16
"""Rows that one program turns and rounds, one after the other: the Hadamard matrix is read once for them."""

_ROUND = tl.constexpr(12582912.0)
"""1.5 · 2^23: a number of up to 22 bits that is added to it is rounded to an integer."""


@triton.jit
def _store_rounded(values, peak, out, scales, row, place, used, WIDTH: tl.constexpr, TURNED: tl.constexpr):
    """TURNED: the coordinates that were turned together, by signs that are not divided by the root of their number."""
    peak = tl.maximum(peak, 1e-20)
    rounded = (values * (127.0 / peak) + _ROUND) - _ROUND
    tl.store(out + row * WIDTH + place, rounded.to(tl.int8), mask=used)
    tl.store(scales + row, peak / (127.0 * tl.sqrt(TURNED * 1.0)))


@triton.jit
def _quantise_norm(
    x, bias, offset, out, scales,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, EPSILON: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, PADDED)
    used = column < WIDTH
    values = tl.load(x + row * WIDTH + column, mask=used, other=0.0).to(tl.float32)
    values += tl.load(offset + column, mask=used, other=0.0)
    firsts = column % BLOCK == 0
    mean = tl.sum(tl.where(firsts, values, 0.0), 0) / (WIDTH // BLOCK)
    values = tl.where(firsts & used, values - mean, values)
    normed = values * tl.rsqrt(tl.sum(values * values, 0) / WIDTH + EPSILON)
    normed += tl.load(bias + column, mask=used, other=0.0)
    _store_rounded(normed, tl.max(tl.abs(normed), 0), out, scales, row, column, used, WIDTH, 1)


@triton.jit(do_not_specialize=["tokens"])
def _quantise_rows(
    x, hadamard, out, scales, tokens,
    WIDTH: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    place = tl.arange(0, BLOCKS)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    used = place < WIDTH
    column = tl.arange(0, BLOCK)
    signs = tl.load(hadamard + column[:, None] * BLOCK + column[None, :])
    first = tl.program_id(0).to(tl.int64) * AT_ONCE
    for row in range(first, min(first + AT_ONCE, tokens)):
        turned = tl.dot(tl.load(x + row * WIDTH + place, mask=used, other=0.0), signs)
        _store_rounded(turned, tl.max(tl.max(tl.abs(turned), 1), 0), out, scales, row, place, used, WIDTH, BLOCK)


def quantise_norm(x: torch.Tensor, norm: Norm, epsilon: float, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Layer norm of `x + offset` `[T, D]`, turned in blocks: int8 `[T, D]` and each row's scale, fp32 `[T]`."""
    tokens, width = x.shape
    out, scales = _room(x)
    padded = triton.next_power_of_2(width)
    _quantise_norm[(tokens,)](
        *(x, norm.bias, norm.offset, out, scales),
        WIDTH=width,
        PADDED=padded,
        BLOCK=block,
        EPSILON=epsilon,
        # One warp: what adds up over several waits for them three times.
        num_warps=1,
    )
    return out, scales


def quantise_rows(x: torch.Tensor, hadamard: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Turns `x` `[T, D]` in blocks: int8 `[T, D]` and each row's scale, fp32 `[T]`."""
    tokens, width = x.shape
    out, scales = _room(x)
    # A matrix unit takes 16 rows at least, here blocks.
    blocks = max(16, triton.next_power_of_2(width // len(hadamard)))
    _quantise_rows[(triton.cdiv(tokens, _ROWS_AT_ONCE),)](
        *(x, hadamard, out, scales, tokens),
        WIDTH=width,
        BLOCKS=blocks,
        BLOCK=len(hadamard),
        AT_ONCE=_ROWS_AT_ONCE,
        num_warps=min(8, max(2, blocks // 16)),
    )
    return out, scales


def _room(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where integers and scales of `x` go."""
    return torch.empty(x.shape, dtype=torch.int8, device=x.device), torch.empty(len(x), device=x.device)


@triton.jit
def _tanh(x, COMPILED: tl.constexpr):
    """The hyperbolic tangent, from the GPU's own unit to 11 bits, which is more than is kept of it."""
    if COMPILED:
        return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    return 1.0 - 2.0 / (1.0 + tl.exp(2.0 * x))


@triton.jit
def _for_all_heads(angles, PAIRS: tl.constexpr):
    """`[rows, HALF]` again and again, `[rows, PAIRS]`."""
    ROWS: tl.constexpr = angles.shape[0]
    HALF: tl.constexpr = angles.shape[1]
    return tl.reshape(tl.broadcast_to(angles[:, None, :], [ROWS, PAIRS // HALF, HALF]), [ROWS, PAIRS])


@triton.jit
def _multiply(
    left, right, out, left_scales, right_scales, bias, cos, sin, positions, tokens, columns,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    ACTIVATION: tl.constexpr, ADD: tl.constexpr, HALF: tl.constexpr, COMPILED: tl.constexpr,
):  # fmt: skip
    # Neighbouring programs share rows and columns, which are still in the cache then.
    program = tl.program_id(0)
    down, across = tl.cdiv(tokens, ROWS), tl.cdiv(columns, COLUMNS)
    band = program // (8 * across)
    height = min(down - band * 8, 8)
    row = (band * 8 + program % (8 * across) % height) * ROWS
    column = (program % (8 * across) // height) * COLUMNS
    total = tl.zeros([ROWS, COLUMNS], tl.int32)
    for depth in range(0, WIDTH, DEPTH):
        total = tl.dot(left.load([row, depth]), right.load([column, depth]).T, total, out_dtype=tl.int32)
    rows, places = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
    result = total.to(tl.float32) * tl.load(left_scales + rows, mask=rows < tokens, other=0.0)[:, None]
    result *= tl.load(right_scales + places, mask=places < columns, other=0.0)[None, :]
    result += tl.load(bias + places, mask=places < columns, other=0.0)[None, :]
    if ACTIVATION == "gelu":
        result *= 0.5 + 0.5 * _tanh(result * (0.7978845608 + 0.0356774081 * result * result), COMPILED)
    if ACTIVATION == "gate":
        gate, up = tl.split(tl.reshape(result, [ROWS, COLUMNS // 2, 2]))
        result = gate * (0.5 + 0.5 * _tanh(0.5 * gate, COMPILED)) * up
        column = column // 2
    if HALF > 0:  # noqa: SIM102 - known when it is compiled
        # Of queries and keys, the first two thirds of all columns, neighbours are turned together. A tile has whole
        # heads, whose angles are the same.
        if column < columns // 3 * 2:
            turns = (column // 2 + tl.arange(0, COLUMNS // 2) < columns // 3)[None, :]
            place = tl.load(positions + rows, mask=rows < tokens, other=0)[:, None] * HALF + tl.arange(0, HALF)[None, :]
            c = tl.where(turns, _for_all_heads(tl.load(cos + place), COLUMNS // 2), 1.0)
            s = tl.where(turns, _for_all_heads(tl.load(sin + place), COLUMNS // 2), 0.0)
            first, second = tl.split(tl.reshape(result, [ROWS, COLUMNS // 2, 2]))
            result = tl.reshape(tl.join(first * c - second * s, second * c + first * s), [ROWS, COLUMNS])
    if ADD:
        result += out.load([row, column]).to(tl.float32)
    out.store([row, column], result.to(out.dtype))


@functools.cache
def _tiles(device: torch.device, width: int) -> dict[str, int]:
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9:
        return _DEEP_ON_HOPPER if width >= _DEEP else _TILES_ON_HOPPER
    return _TILES


def _launch(
    left: tuple[torch.Tensor, torch.Tensor],
    matrix: EightBitMatrix,
    out: torch.Tensor,
    activation: Activation = "none",
    add: bool = False,
    turn: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None] = (None, None, None),
) -> torch.Tensor:
    """turn: cosines, sines and positions for queries and keys."""
    values, scales = left
    (tokens, width), columns = values.shape, len(matrix.weight)
    tiles = _tiles(values.device, width)
    rows, wide, depth = tiles["ROWS"], tiles["COLUMNS"], tiles["DEPTH"]
    # A gate leaves half of a tile's columns.
    stored = wide * out.shape[1] // columns
    _multiply[(triton.cdiv(tokens, rows) * triton.cdiv(columns, wide),)](
        TensorDescriptor.from_tensor(values, [rows, depth]),
        TensorDescriptor.from_tensor(matrix.weight, [wide, depth]),
        TensorDescriptor.from_tensor(out, [rows, stored]),
        *(scales, matrix.scale, matrix.bias, *turn, tokens, columns),
        WIDTH=width,
        ACTIVATION=activation,
        ADD=add,
        HALF=0 if turn[0] is None else turn[0].shape[1],
        COMPILED=out.is_cuda,
        **tiles,
    )
    return out


def multiply(
    left: tuple[torch.Tensor, torch.Tensor], matrix: EightBitMatrix, dtype: torch.dtype, activation: Activation
) -> torch.Tensor:
    """The product of quantised rows and a matrix, with its bias, and what follows: `[T, N]`, of a gate `[T, N / 2]`."""
    columns = len(matrix.weight) // (2 if activation == "gate" else 1)
    out = torch.empty(len(left[0]), columns, dtype=dtype, device=matrix.weight.device)
    return _launch(left, matrix, out, activation)


def add_product(x: torch.Tensor, left: tuple[torch.Tensor, torch.Tensor], matrix: EightBitMatrix) -> torch.Tensor:
    """Adds the product, with its bias, to `x` `[T, N]` in place."""
    return _launch(left, matrix, x, add=True)


def turns(half: int) -> bool:
    """Whether the product turns queries and keys of heads of this half a size: whole heads fill its tiles."""
    return half & (half - 1) == 0 and half <= _TILES["COLUMNS"] // 2


def attend(
    left: tuple[torch.Tensor, torch.Tensor],
    matrix: EightBitMatrix,
    rotation: tuple[torch.Tensor, torch.Tensor],
    pack: Pack,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Queries, keys and values, the first two rotated as they come out of the product, and attention: `[T, D]`.

    matrix: as `eight_bit.paired` has it, of heads that the product `turns`. rotation: cosines and sines, `[P, hd / 2]`
    each.
    """
    cos, sin = rotation
    qkv = torch.empty(len(left[0]), len(matrix.weight), dtype=dtype, device=matrix.weight.device)
    _launch(left, matrix, qkv, turn=(cos, sin, pack.positions))
    heads = qkv.unflatten(1, (3, -1, 2 * cos.shape[1]))
    return attend_to_values(heads, heads, pack)
