"""Self-attention over a pack: every sequence attends to itself alone.

A back end is a callable `attend(qkv, bias, rotation, pack) -> [T, H · hd]`, chosen once when the engine is built.
`qkv` is the projection `[T, 3, H, hd]`, not yet rotated and without its bias; a back end may overwrite it. `bias`
`[2 D]` fp32 belongs to queries and keys; that of the values is among the residual stream's (see `weights.Norm`).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from typing import NamedTuple

import torch
import torch.nn.functional as F

from esmflow.engine.packing import Pack


class Rotation(NamedTuple):
    """Rotary angles' cosine and sine for positions 0…P-1, each `[P, hd / 2]` fp32."""

    cos: torch.Tensor
    sin: torch.Tensor

    @staticmethod
    def of(frequencies: torch.Tensor, positions: int) -> Rotation:
        """Angles of the first `positions` places, from a checkpoint's `inv_freq` `[hd / 2]` (Su et al., 2021)."""
        places = torch.arange(positions, dtype=torch.float32, device=frequencies.device)
        angles = torch.outer(places, frequencies.float())
        return Rotation(angles.cos(), angles.sin())


Attention = Callable[[torch.Tensor, torch.Tensor, Rotation, Pack], torch.Tensor]


def rotated(qkv: torch.Tensor, bias: torch.Tensor, rotation: Rotation, pack: Pack) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys with their bias, rotated by their positions in fp32, each `[T, H, hd]`.

    A head's first and second halves are the two coordinates that are turned.
    """
    biased = qkv[:, :2].float() + bias.view(2, *qkv.shape[2:])
    first, second = biased.chunk(2, dim=-1)
    cos, sin = (table[pack.positions][:, None, None] for table in rotation)
    q, k = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(qkv.dtype).unbind(1)
    return q, k


def choose_attention(device: torch.device, dtype: torch.dtype) -> Attention:
    """The faster of PyTorch's own attentions that is right for this device and precision."""
    return varlen_attention() if flash_available(device, dtype) else sdpa_attention


def flash_available(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether flash attention runs here: 16-bit numbers on a GPU of compute capability 8.0 or above."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def triton_attention() -> Attention:
    """This project's kernels. Raises ImportError without Triton."""
    from esmflow.engine import kernels

    def attend(qkv: torch.Tensor, bias: torch.Tensor, rotation: Rotation, pack: Pack) -> torch.Tensor:
        kernels.rotate_in_place(qkv, bias, rotation.cos, rotation.sin, pack.positions)
        return kernels.attend(qkv, pack)

    return attend


def varlen_attention() -> Attention:
    """PyTorch's variable-length flash attention (torch ≥ 2.10), whose import alone takes seconds."""
    from torch.nn.attention.varlen import varlen_attn

    def attend(qkv: torch.Tensor, bias: torch.Tensor, rotation: Rotation, pack: Pack) -> torch.Tensor:
        q, k = rotated(qkv, bias, rotation, pack)
        # The list of boundaries is exact: the kernel spends time on every sequence listed, empty or not.
        longest = pack.longest
        mixed = varlen_attn(q, k, qkv[:, 2], pack.boundaries, pack.boundaries, longest, longest)
        assert isinstance(mixed, torch.Tensor)  # a pair only where auxiliary outputs are asked for
        return mixed.flatten(1)

    return attend


def sdpa_attention(qkv: torch.Tensor, bias: torch.Tensor, rotation: Rotation, pack: Pack) -> torch.Tensor:
    """Scaled dot product attention over runs of sequences of one length: no padding, any precision and device."""
    q, k = rotated(qkv, bias, rotation, pack)
    mixed = torch.empty_like(q)
    start = 0
    for length, group in groupby(pack.lengths):
        stop = start + length * len(list(group))
        # [n, H, length, hd]
        run = (x[start:stop].unflatten(0, (-1, length)).transpose(1, 2) for x in (q, k, qkv[:, 2]))
        mixed[start:stop] = F.scaled_dot_product_attention(*run).transpose(1, 2).flatten(0, 1)
        start = stop
    return mixed.flatten(1)
