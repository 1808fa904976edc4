"""Kernels for matrix products of 8 bits: rotation and rounding of what goes in, and the product with what follows it.

See `esmflow.engine.eight_bit` for the arithmetic and for the same in PyTorch.
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
from esmflow.engine.weights import EightBitMatrix, Norm

_TILES_ON_HOPPER = {"ROWS": 128, "COLUMNS": 128, "DEPTH": 128, "num_warps": 4, "num_stages": 3}
_DEEP_ON_HOPPER = {"ROWS": 128, "COLUMNS": 256, "DEPTH": 128, "num_warps": 8, "num_stages": 4}
_TILES = {"ROWS": 128, "COLUMNS": 128, "DEPTH": 64, "num_warps": 4, "num_stages": 3}
"""How a product is cut up, as measured on an H100; on other cards so that it fits the 100 kB of shared memory that all
have."""
_DEEP = 5120
"""From this width of what is multiplied on, a program's start and end no longer count, and large tiles are faster."""

_ROWS_AT_ONCE = 8
"""Rows that one program rounds, one after the other: the norm's vectors and the rotation are read once for them."""

_ROUND = tl.constexpr(12582912.0)
"""1.5 · 2^23: a number of up to 22 bits that is added to it is rounded to an integer."""


@triton.jit
def _quantise(values, hadamard, out, scales, row, place, used, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Rotates one row `[blocks, BLOCK]` and stores it in 8 bits, with its scale."""
    column = tl.arange(0, BLOCK)
    signs = tl.load(hadamard + column[:, None] * BLOCK + column[None, :])
    rotated = tl.dot(values.to(signs.dtype), signs)
    peak = tl.maximum(tl.max(tl.max(tl.abs(rotated), 1), 0), 1e-20)
    rounded = (rotated * (127.0 / peak) + _ROUND) - _ROUND
    tl.store(out + row * WIDTH + place, rounded.to(tl.int8), mask=used)
    # The signs are not divided by the square root of their number: the scale is.
    tl.store(scales + row, peak / (127.0 * tl.sqrt(BLOCK * 1.0)))


@triton.jit(do_not_specialize=["tokens"])
def _quantise_norm(
    x, weight, bias, offset, hadamard, out, scales, tokens,
    WIDTH: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr, EPSILON: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    place = tl.arange(0, BLOCKS)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    used = place < WIDTH
    offsets = tl.load(offset + place, mask=used, other=0.0)
    weights = tl.load(weight + place, mask=used, other=0.0)
    biases = tl.load(bias + place, mask=used, other=0.0)
    first = tl.program_id(0).to(tl.int64) * AT_ONCE
    for row in range(first, min(first + AT_ONCE, tokens)):
        values = tl.load(x + row * WIDTH + place, mask=used, other=0.0).to(tl.float32) + offsets
        mean = tl.sum(tl.sum(values, 1), 0) / WIDTH
        centred = tl.where(used, values - mean, 0.0)
        scale = tl.rsqrt(tl.sum(tl.sum(centred * centred, 1), 0) / WIDTH + EPSILON)
        _quantise(centred * scale * weights + biases, hadamard, out, scales, row, place, used, WIDTH, BLOCK)


@triton.jit(do_not_specialize=["tokens"])
def _quantise_rows(
    x, hadamard, out, scales, tokens,
    WIDTH: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    place = tl.arange(0, BLOCKS)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    used = place < WIDTH
    first = tl.program_id(0).to(tl.int64) * AT_ONCE
    for row in range(first, min(first + AT_ONCE, tokens)):
        values = tl.load(x + row * WIDTH + place, mask=used, other=0.0)
        _quantise(values, hadamard, out, scales, row, place, used, WIDTH, BLOCK)


def quantise_norm(
    x: torch.Tensor, norm: Norm, epsilon: float, hadamard: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Layer norm of `x + offset` `[T, D]`, rotated in blocks: int8 `[T, D]` and each row's scale, fp32 `[T]`."""
    tokens, width = x.shape
    out, scales, blocks, warps = _room(x, hadamard)
    _quantise_norm[(triton.cdiv(tokens, _ROWS_AT_ONCE),)](
        *(x, norm.weight, norm.bias, norm.offset, hadamard, out, scales, tokens),
        WIDTH=width,
        BLOCKS=blocks,
        BLOCK=len(hadamard),
        EPSILON=epsilon,
        AT_ONCE=_ROWS_AT_ONCE,
        num_warps=warps,
    )
    return out, scales


def quantise_rows(x: torch.Tensor, hadamard: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`x` `[T, D]` rotated in blocks: int8 `[T, D]` and each row's scale, fp32 `[T]`."""
    tokens, width = x.shape
    out, scales, blocks, warps = _room(x, hadamard)
    _quantise_rows[(triton.cdiv(tokens, _ROWS_AT_ONCE),)](
        *(x, hadamard, out, scales, tokens),
        WIDTH=width,
        BLOCKS=blocks,
        BLOCK=len(hadamard),
        AT_ONCE=_ROWS_AT_ONCE,
        num_warps=warps,
    )
    return out, scales


def _room(x: torch.Tensor, hadamard: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int, int]:
    """Where a result goes, the blocks of a row (16 at least, as a matrix unit takes them), and the warps for a row."""
    tokens, width = x.shape
    blocks = max(16, triton.next_power_of_2(width // len(hadamard)))
    warps = min(8, max(2, blocks * len(hadamard) // 1024))
    out = torch.empty(tokens, width, dtype=torch.int8, device=x.device)
    return out, torch.empty(tokens, dtype=torch.float32, device=x.device), blocks, warps


@triton.jit
def _multiply(
    left, right, out, left_scales, right_scales, bias, cos, sin, positions, tokens, columns,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    GELU: tl.constexpr, ADD: tl.constexpr, HALF: tl.constexpr,
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
    if GELU:
        # The tanh form: 0.5 + 0.5 tanh(y) is 1 / (1 + exp(-2 y)).
        result = result / (1.0 + tl.exp2(-2.302208198 * (result + 0.044715 * result * result * result)))
    if HALF > 0:
        # Of queries and keys, the first two thirds of all columns, neighbours are turned together.
        turned = tl.cdiv(columns, 3)
        if column < 2 * turned:
            pair = column // 2 + tl.arange(0, COLUMNS // 2)
            place = tl.load(positions + rows, mask=rows < tokens, other=0)[:, None] * HALF + (pair % HALF)[None, :]
            c = tl.load(cos + place, mask=(pair < turned)[None, :], other=1.0)
            s = tl.load(sin + place, mask=(pair < turned)[None, :], other=0.0)
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
    gelu: bool = False,
    add: bool = False,
    turn: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None] = (None, None, None),
) -> torch.Tensor:
    """turn: cosines, sines and positions for queries and keys."""
    values, scales = left
    (tokens, width), columns = values.shape, len(matrix.weight)
    tiles = _tiles(values.device, width)
    rows, wide, depth = tiles["ROWS"], tiles["COLUMNS"], tiles["DEPTH"]
    _multiply[(triton.cdiv(tokens, rows) * triton.cdiv(columns, wide),)](
        TensorDescriptor.from_tensor(values, [rows, depth]),
        TensorDescriptor.from_tensor(matrix.weight, [wide, depth]),
        TensorDescriptor.from_tensor(out, [rows, wide]),
        *(scales, matrix.scale, matrix.bias, *turn, tokens, columns),
        WIDTH=width,
        GELU=gelu,
        ADD=add,
        HALF=0 if turn[0] is None else turn[0].shape[1],
        **tiles,
    )
    return out


def multiply(
    left: tuple[torch.Tensor, torch.Tensor], matrix: EightBitMatrix, dtype: torch.dtype, gelu: bool
) -> torch.Tensor:
    """The product of quantised rows and a matrix, with its bias, and GELU's tanh form if asked for: `[T, N]`."""
    out = torch.empty(len(left[0]), len(matrix.weight), dtype=dtype, device=matrix.weight.device)
    return _launch(left, matrix, out, gelu)


def add_product(x: torch.Tensor, left: tuple[torch.Tensor, torch.Tensor], matrix: EightBitMatrix) -> torch.Tensor:
    """Adds the product, with its bias, to `x` `[T, N]` in place."""
    return _launch(left, matrix, x, add=True)


def attend(
    left: tuple[torch.Tensor, torch.Tensor],
    matrix: EightBitMatrix,
    rotation: tuple[torch.Tensor, torch.Tensor],
    pack: Pack,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Queries, keys and values, the first two rotated as they come out of the product, and attention: `[T, D]`.

    matrix: as `eight_bit.paired` has it. rotation: cosines and sines, `[P, hd / 2]` each.
    """
    cos, sin = rotation
    qkv = torch.empty(len(left[0]), len(matrix.weight), dtype=dtype, device=matrix.weight.device)
    _launch(left, matrix, qkv, turn=(cos, sin, pack.positions))
    heads = qkv.unflatten(1, (3, -1, 2 * cos.shape[1]))
    return attend_to_values(heads, heads, pack)
