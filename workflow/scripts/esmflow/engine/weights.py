"""ESM-2's weights as the packed engine wants them: in one precision, q, k and v in one matrix, biases gathered."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from safetensors import safe_open

from esmflow.checkpoint.file import CheckpointError, ModelDimensions

_READERS = 4
TOKEN_DROPOUT_SCALE = 1 - 0.15 * 0.8
"""ESM-2 was trained with 15% of tokens chosen and 80% of those masked; without masks, embeddings shrink by this."""


class Linear(NamedTuple):
    """weight: `[out, in]`; bias: `[out]`."""

    weight: torch.Tensor
    bias: torch.Tensor


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


Matrix = Any
"""A tensor (fc1: a `Linear`), or an `EightBitMatrix`: what the operations chosen with the weights can multiply."""


@dataclass(frozen=True)
class LayerWeights:
    """One transformer layer.

    qkv: q, k and v above each other, `[3 D, D]`. qk_bias: `[2 D]` fp32. out, fc2: as `[in, out]`; their biases are in
    the offsets. offset: what the stream lacks after this layer. frequencies: rotary `inv_freq` as stored.
    """

    attention_norm: Norm
    qkv: Matrix
    qk_bias: torch.Tensor
    out: Matrix
    ffn_norm: Norm
    fc1: Matrix
    fc2: Matrix
    offset: torch.Tensor
    frequencies: torch.Tensor


@dataclass(frozen=True)
class HeadWeights:
    """The language model head; its decoder is the token embedding."""

    dense: Linear
    norm: tuple[torch.Tensor, torch.Tensor]
    decoder: Linear


@dataclass(frozen=True)
class Weights:
    """All of a model. embedding: scaled, `[33, D]`. regression: the contact head's `[layers, H]` and `[1]`, fp32."""

    embedding: torch.Tensor
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
    with ThreadPoolExecutor(_READERS) as readers:
        layers = list(readers.map(lambda n: _read_layer(read, n, dtype), range(dimensions.layers)))
    embedding = read("embed_tokens.weight")
    scaled = embedding.float() * TOKEN_DROPOUT_SCALE
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
        layers=tuple(with_offsets),
        last_norm=_norm(read, "emb_layer_norm_after")._replace(offset=offset),
        lm_head=_read_lm_head(read, embedding, dtype) if dimensions.has_lm_head else None,
        regression=(
            read("contact_head.regression.weight").float().view(dimensions.layers, dimensions.heads),
            read("contact_head.regression.bias").float(),
        )
        if dimensions.has_contact_head
        else None,
    )


def _read_layer(
    read: Callable[[str], torch.Tensor], n: int, dtype: torch.dtype
) -> tuple[LayerWeights, torch.Tensor, torch.Tensor]:
    """One layer, its offsets still 0, and what its attention and its feed-forward part add to them, `[D]` each."""
    attention, layer = f"layers.{n}.self_attn", f"layers.{n}"
    out = read(f"{attention}.out_proj.weight")
    weights = LayerWeights(
        attention_norm=_norm(read, f"{attention}_layer_norm"),
        qkv=torch.cat([read(f"{attention}.{part}_proj.weight").to(dtype) for part in "qkv"]),
        qk_bias=torch.cat([read(f"{attention}.{part}_proj.bias").float() for part in "qk"]),
        out=out.to(dtype).t(),
        ffn_norm=_norm(read, f"{layer}.final_layer_norm"),
        fc1=_linear(read, f"{layer}.fc1", dtype),
        fc2=read(f"{layer}.fc2.weight").to(dtype).t(),
        offset=torch.zeros(()),
        frequencies=read(f"{attention}.rot_emb.inv_freq").float(),
    )
    value_bias = read(f"{attention}.v_proj.bias").float()
    after_attention = read(f"{attention}.out_proj.bias").float() + out.float() @ value_bias
    return weights, after_attention, read(f"{layer}.fc2.bias").float()


def _read_lm_head(read: Callable[[str], torch.Tensor], embedding: torch.Tensor, dtype: torch.dtype) -> HeadWeights:
    return HeadWeights(
        dense=_linear(read, "lm_head.dense", dtype),
        norm=(read("lm_head.layer_norm.weight").to(dtype), read("lm_head.layer_norm.bias").to(dtype)),
        decoder=Linear(embedding.to(dtype), read("lm_head.bias").to(dtype)),
    )


def _linear(read: Callable[[str], torch.Tensor], name: str, dtype: torch.dtype) -> Linear:
    return Linear(read(f"{name}.weight").to(dtype), read(f"{name}.bias").to(dtype))


def _norm(read: Callable[[str], torch.Tensor], name: str) -> Norm:
    return Norm(read(f"{name}.weight").float(), read(f"{name}.bias").float(), torch.zeros(()))
