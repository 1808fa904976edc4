"""A model's weights as the packed engine wants them: in one precision, q, k and v in one matrix, biases gathered."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from safetensors import safe_open

from esmflow.arrays import VOCABULARY_SIZE
from esmflow.checkpoint.families import Family
from esmflow.checkpoint.file import CheckpointError
from esmflow.checkpoint.models import ModelDimensions
from esmflow.inputs.residues import MASK, PAD

_READERS = 4


class Linear(NamedTuple):
    """weight: `[out, in]`; bias: `[out]`, None in families without."""

    weight: torch.Tensor
    bias: torch.Tensor | None


class Norm(NamedTuple):
    """A layer norm of the residual stream, fp32. offset: `[D]`, the biases that the stream still lacks at this point.

    The output projection's and fc2's biases are never added to the stream. Their running sum is added where the stream
    is read, so that the matrix product adds its result to the stream in one pass over memory. The values' bias is in
    that sum too: shares of attention add up to 1, so it reaches the stream unchanged, through the output projection.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    offset: torch.Tensor


class EightBitMatrix(NamedTuple):
    """A matrix rotated and rounded by `engine.eight_bit`. weight: int8 `[out, in]`; scale, bias: fp32 `[out]`."""

    weight: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor


Activation = Literal["none", "gelu", "gate"]
"""What follows a product of 8 bits: nothing; GELU's tanh form; or, of every two neighbouring columns, SiLU of the first
times the second, which leaves half as many."""

Matrix = Any
"""A tensor (fc1: a `Linear`), or an `EightBitMatrix`: what the operations chosen with the weights can multiply."""


@dataclass(frozen=True)
class LayerWeights:
    """One transformer layer.

    qkv: q, k and v above each other, `[3 D, D]`. qk: `[2 D]` fp32, the biases of queries and keys, or the weights of
    their norms. fc1: of a family with a gate, the gate's weights above the others. out, fc2: as `[in, out]`; their
    biases are in the offsets. offset: what the stream lacks after this layer. frequencies: rotary `inv_freq` as
    stored; zeros, which turn nothing, where positions are learned.
    """

    attention_norm: Norm
    qkv: Matrix
    qk: torch.Tensor
    out: Matrix
    ffn_norm: Norm
    fc1: Matrix
    fc2: Matrix
    offset: torch.Tensor
    frequencies: torch.Tensor


@dataclass(frozen=True)
class HeadWeights:
    """The language model head."""

    dense: Linear
    norm: tuple[torch.Tensor, torch.Tensor]
    decoder: Linear


@dataclass(frozen=True)
class Weights:
    """All of a model.

    embedding: scaled, `[33 or more, D]`. token_dropout: whether masks are nothing in it, and the other tokens of a
    sequence with masks grow in turn. positions: learned ones by place, cls at 0, `[P, D]`; first_norm: of the norm
    before the first layer; both None in families without. regression: the contact head's `[layers, H]` and `[1]`, fp32.
    """

    embedding: torch.Tensor
    token_dropout: bool
    positions: torch.Tensor | None
    first_norm: Norm | None
    layers: tuple[LayerWeights, ...]
    last_norm: Norm
    lm_head: HeadWeights | None
    regression: tuple[torch.Tensor, torch.Tensor] | None


def load_weights(
    path: str | os.PathLike[str], dimensions: ModelDimensions, dtype: torch.dtype, device: torch.device
) -> Weights:
    """Reads a converted checkpoint straight to `device`, a few layers at a time: the peak is those above the result.

    Raises CheckpointError when a tensor is missing.
    """
    with safe_open(path, framework="pt") as handle:
        present = set(handle.keys())

        def read(name: str) -> torch.Tensor:
            if name not in present:
                raise CheckpointError(
                    f"{path}: {name} is missing; delete the file and run the workflow's model step again"
                )
            tensor = handle.get_tensor(name)
            # Through page-locked memory, since copies from there are several times as fast.
            return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor

        return arrange_weights(read, dimensions, dtype)


def arrange_weights(read: Callable[[str], torch.Tensor], dimensions: ModelDimensions, dtype: torch.dtype) -> Weights:
    """Arranges the tensors that `read` gives by fair-esm's names. `read` is called from several threads."""
    family = dimensions.family
    with ThreadPoolExecutor(_READERS) as readers:
        layers = list(readers.map(lambda n: _read_layer(read, n, dimensions, dtype), range(dimensions.layers)))
    embedding = read("embed_tokens.weight")
    scaled = embedding.float() * family.embedding_scale
    # Trained with token dropout: a mask is nothing, and what is left of a sequence grows by as much.
    if token_dropout := family.embedding_scale != 1:
        scaled[MASK] = 0
    offset = torch.zeros_like(scaled[0])
    with_offsets = []
    for layer, after_attention, after_ffn in layers:
        attention_norm = layer.attention_norm._replace(offset=offset)
        offset = offset + after_attention
        ffn_norm = layer.ffn_norm._replace(offset=offset)
        offset = offset + after_ffn
        with_offsets.append(replace(layer, attention_norm=attention_norm, ffn_norm=ffn_norm, offset=offset))
    return Weights(
        embedding=scaled.to(dtype),
        token_dropout=token_dropout,
        # fair-esm counts places from the padding token's on, which comes first.
        positions=None if family.rotary else read("embed_positions.weight")[PAD + 1 :].to(dtype),
        first_norm=_norm(read, "emb_layer_norm_before") if family.norm_before else None,
        layers=tuple(with_offsets),
        last_norm=_norm(read, "emb_layer_norm_after", family.biases)._replace(offset=offset),
        lm_head=_read_lm_head(read, family, embedding, dtype) if dimensions.has_lm_head else None,
        regression=(
            read("contact_head.regression.weight").float().view(dimensions.layers, dimensions.heads),
            read("contact_head.regression.bias").float(),
        )
        if dimensions.has_contact_head
        else None,
    )


def _read_layer(
    read: Callable[[str], torch.Tensor], n: int, dimensions: ModelDimensions, dtype: torch.dtype
) -> tuple[LayerWeights, torch.Tensor, torch.Tensor]:
    """One layer, its offsets still 0, and what its attention and its feed-forward part add to them, `[D]` each."""
    family, attention, layer = dimensions.family, f"layers.{n}.self_attn", f"layers.{n}"
    out = _of_branch(read(f"{attention}.out_proj.weight"), dimensions)
    fc1 = read(f"{layer}.fc1.weight").to(dtype)
    none = out.new_zeros(dimensions.hidden, dtype=torch.float32)

    def bias(name: str) -> torch.Tensor:
        return read(f"{name}.bias").float() if family.biases else none

    of_queries_and_keys = "norm.weight" if family.query_key_norms else "proj.bias"
    weights = LayerWeights(
        attention_norm=_norm(read, f"{attention}_layer_norm"),
        qkv=torch.cat([read(f"{attention}.{part}_proj.weight").to(dtype) for part in "qkv"]),
        qk=torch.cat([read(f"{attention}.{part}_{of_queries_and_keys}").float() for part in "qk"]),
        out=out.to(dtype).t(),
        ffn_norm=_norm(read, f"{layer}.final_layer_norm"),
        fc1=Linear(
            torch.cat((read(f"{layer}.gate.weight").to(dtype), fc1)) if family.gate else fc1,
            read(f"{layer}.fc1.bias").to(dtype) if family.biases else None,
        ),
        fc2=_of_branch(read(f"{layer}.fc2.weight"), dimensions).to(dtype).t(),
        offset=torch.zeros(()),
        frequencies=read(f"{attention}.rot_emb.inv_freq").float()
        if family.rotary
        else none[: dimensions.head_dim // 2],
    )
    after_attention = bias(f"{attention}.out_proj") + out.float() @ bias(f"{attention}.v_proj")
    return weights, after_attention, bias(f"{layer}.fc2")


def _of_branch(weight: torch.Tensor, dimensions: ModelDimensions) -> torch.Tensor:
    """The matrix that ends a branch of the residual stream, shrunk as the family shrinks what branches add."""
    depth = dimensions.family.branch_depth
    return weight if depth is None else weight.float() / (dimensions.layers / depth) ** 0.5


def _read_lm_head(
    read: Callable[[str], torch.Tensor], family: Family, embedding: torch.Tensor, dtype: torch.dtype
) -> HeadWeights:
    decoder = embedding if family.tied_head else read("lm_head.weight")
    return HeadWeights(
        dense=Linear(read("lm_head.dense.weight").to(dtype), read("lm_head.dense.bias").to(dtype)),
        norm=(read("lm_head.layer_norm.weight").to(dtype), read("lm_head.layer_norm.bias").to(dtype)),
        # Beyond the tokens that there are, published models may have rows that stand for none.
        decoder=Linear(decoder[:VOCABULARY_SIZE].to(dtype), read("lm_head.bias")[:VOCABULARY_SIZE].to(dtype)),
    )


def _norm(read: Callable[[str], torch.Tensor], name: str, has_bias: bool = True) -> Norm:
    weight = read(f"{name}.weight").float()
    none = torch.zeros_like(weight)
    return Norm(weight, read(f"{name}.bias").float() if has_bias else none, none)
