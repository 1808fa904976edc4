"""Self-attention over a pack: every sequence attends to itself alone. And what is read off its maps.

A back end is a callable `attend(qkv, qk, rotation, pack) -> [T, H · hd]`, chosen once when the engine is built.
`qkv` is the projection `[T, 3, H, hd]`, not yet rotated and without its bias; a back end may overwrite it. `qk`
`[2 D]` fp32 belongs to queries and keys: their biases, or the weights of their norms, whichever the family has. The
bias of the values is among the residual stream's (see `weights.Norm`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from itertools import groupby
from typing import NamedTuple

import torch
import torch.nn.functional as F

from esmflow.checkpoint.families import EPSILON, Family
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
Rotate = Callable[[torch.Tensor, torch.Tensor, Rotation, Pack], tuple[torch.Tensor, torch.Tensor]]
"""`(qkv, qk, rotation, pack)` to queries and keys ready for attention, each `[T, H, hd]` of `rotated_type`."""


def rotated_type(dtype: torch.dtype) -> torch.dtype:
    """The type of rotated queries and keys, `dtype` being that of the products.

    bf16 gives way to fp16, which has three bits more in as many bytes: of all steps it is the scores that rounding to
    bf16 harms most, and queries and keys keep to its range: ESM-2's were trained in fp16, ESM C's are normalised.
    """
    return torch.float16 if dtype == torch.bfloat16 else dtype


def rotated(qkv: torch.Tensor, bias: torch.Tensor, rotation: Rotation, pack: Pack) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys with their bias, rotated by their positions in fp32. See `Rotate`."""
    biased = qkv[:, :2].float() + bias.view(2, *qkv.shape[2:])
    return _turned(biased, rotation, pack, rotated_type(qkv.dtype))


def normed_and_rotated(
    qkv: torch.Tensor, weight: torch.Tensor, rotation: Rotation, pack: Pack
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys normalised over all heads together, then rotated, all in fp32. See `Rotate`."""
    whole = qkv[:, :2].float().flatten(2)
    normed = F.layer_norm(whole, whole.shape[-1:], eps=EPSILON) * weight.view(2, -1)
    return _turned(normed.unflatten(2, qkv.shape[2:]), rotation, pack, rotated_type(qkv.dtype))


def _turned(
    pairs: torch.Tensor, rotation: Rotation, pack: Pack, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """`[T, 2, H, hd]` fp32; a head's first and second halves are the two coordinates that are turned."""
    first, second = pairs.chunk(2, dim=-1)
    cos, sin = (table[pack.positions][:, None, None] for table in rotation)
    q, k = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(dtype).unbind(1)
    return q, k


def rotate_of(family: Family) -> Rotate:
    """What this family does to queries and keys, in PyTorch."""
    return normed_and_rotated if family.query_key_norms else rotated


def choose_attention(device: torch.device, dtype: torch.dtype, rotate: Rotate) -> Attention:
    """The faster of PyTorch's own attentions that is right for this device and precision."""
    return varlen_attention(rotate) if flash_available(device, dtype) else partial(sdpa_attention, rotate=rotate)


def flash_available(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether flash attention runs here: 16-bit numbers on a GPU of compute capability 8.0 or above."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def triton_attention(rotate: Rotate = rotated) -> Attention:
    """This project's kernels, with the one that does as `rotate`. Raises ImportError without Triton."""
    from esmflow.engine.kernels.sixteen_bits import attend as attend_to_values
    from esmflow.engine.kernels.sixteen_bits import normalise_and_rotate_in_place, rotate_in_place

    in_place = rotate_in_place if rotate is rotated else normalise_and_rotate_in_place

    def attend(qkv: torch.Tensor, qk: torch.Tensor, rotation: Rotation, pack: Pack) -> torch.Tensor:
        turned = qkv.view(rotated_type(qkv.dtype))
        in_place(qkv, turned, qk, rotation.cos, rotation.sin, pack.positions)
        return attend_to_values(turned, qkv, pack)

    return attend


def varlen_attention(rotate: Rotate = rotated) -> Attention:
    """PyTorch's variable-length flash attention (torch ≥ 2.10), whose import alone takes seconds."""
    from torch.nn.attention.varlen import varlen_attn

    def attend(qkv: torch.Tensor, qk: torch.Tensor, rotation: Rotation, pack: Pack) -> torch.Tensor:
        q, k = rotate(qkv, qk, rotation, pack)
        # The list of boundaries is exact: the kernel spends time on every sequence listed, empty or not.
        longest = pack.longest
        mixed = varlen_attn(q, k, qkv[:, 2].to(q.dtype), pack.boundaries, pack.boundaries, longest, longest)
        assert isinstance(mixed, torch.Tensor)  # a pair only where auxiliary outputs are asked for
        return mixed.flatten(1).to(qkv.dtype)

    return attend


def sdpa_attention(
    qkv: torch.Tensor, qk: torch.Tensor, rotation: Rotation, pack: Pack, rotate: Rotate = rotated
) -> torch.Tensor:
    """Scaled dot product attention over runs of sequences of one length: no padding, any precision and device."""
    q, k = rotate(qkv, qk, rotation, pack)
    values = qkv[:, 2].to(q.dtype)
    mixed = torch.empty_like(q)
    start = 0
    for length, group in groupby(pack.lengths):
        stop = start + length * len(list(group))
        # [n, H, length, hd]
        run = (x[start:stop].unflatten(0, (-1, length)).transpose(1, 2) for x in (q, k, values))
        mixed[start:stop] = F.scaled_dot_product_attention(*run).transpose(1, 2).flatten(0, 1)
        start = stop
    return mixed.flatten(1).to(qkv.dtype)


ReadMaps = Callable[[int, int, torch.Tensor], None]
"""`(layer, sequence, maps)`: takes what it wants of the maps `[H, n, n]`, cls and eos among them; layers begin at 1."""


class AttentionWithMaps:
    """An attention back end with explicit maps, which hands those of each layer and sequence to whoever reads them.

    One object serves one forward pass.
    """

    def __init__(self, rotate: Rotate, readers: Sequence[ReadMaps]) -> None:
        self._rotate = rotate
        self._readers = readers
        self._layer = 0

    def __call__(self, qkv: torch.Tensor, qk: torch.Tensor, rotation: Rotation, pack: Pack) -> torch.Tensor:
        """Attends `[T, 3, H, hd]` to `[T, H · hd]` in fp32, one sequence at a time."""
        q, k = self._rotate(qkv, qk, rotation, pack)
        self._layer += 1
        mixed = torch.empty_like(qkv[:, 2])
        start = 0
        for index, length in enumerate(pack.lengths):
            rows = slice(start, start + length)
            # [H, length, hd]
            query, key, value = (x[rows].transpose(0, 1).float() for x in (q, k, qkv[:, 2]))
            maps = (query * query.shape[-1] ** -0.5 @ key.transpose(1, 2)).softmax(dim=-1)
            mixed[rows] = (maps @ value).transpose(0, 1).to(mixed.dtype)
            if index < len(pack.residues):
                for read in self._readers:
                    read(self._layer, index, maps)
            start += length
        return mixed.flatten(1)


class Contacts:
    """Gathers contact logits layer after layer.

    The head is a logistic regression over all layers' and heads' maps (Rao et al., 2020, "Transformer protein language
    models are unsupervised structure learners"), so each map adds its part as soon as it is known and none is kept.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        """weight: `[layers, H]` fp32, the regression's coefficients. bias: `[1]`."""
        self._weight = weight
        self._bias = bias
        self._logits: dict[int, torch.Tensor] = {}

    def read(self, layer: int, sequence: int, maps: torch.Tensor) -> None:
        """Adds a layer's part. See `ReadMaps`."""
        features = average_product_correction(maps[:, 1:-1, 1:-1])
        part = torch.einsum("h,hij->ij", self._weight[layer - 1], features)
        self._logits[sequence] = self._logits[sequence] + part if layer > 1 else part

    def contacts(self) -> torch.Tensor:
        """Contact probabilities: every sequence's `[n, n]` map, flattened, end to end."""
        return torch.cat([(logits + self._bias).sigmoid().flatten() for logits in self._logits.values()])


class KeptMaps:
    """Keeps the maps of some layers."""

    def __init__(self, layers: Collection[int]) -> None:
        self._kept: dict[int, list[torch.Tensor]] = {layer: [] for layer in layers}

    def read(self, layer: int, sequence: int, maps: torch.Tensor) -> None:
        """Keeps a layer's maps, if it is one of those wanted. See `ReadMaps`."""
        if layer in self._kept:
            self._kept[layer].append(maps.permute(1, 2, 0).flatten(0, 1))

    def of_layer(self, layer: int) -> torch.Tensor:
        """One row for each pair of tokens, with a value for each head, of all sequences end to end: `[rows, H]`."""
        return torch.cat(self._kept[layer])


def average_product_correction(maps: torch.Tensor) -> torch.Tensor:
    """Symmetrises maps `[H, n, n]` and takes away what row and column sums alone explain (Dunn et al., 2008)."""
    maps = maps + maps.transpose(-1, -2)
    rows, columns = maps.sum(-1, keepdim=True), maps.sum(-2, keepdim=True)
    return maps - rows * columns / maps.sum((-1, -2), keepdim=True)
