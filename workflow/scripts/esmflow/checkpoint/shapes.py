"""What tensors a model of a family has, and of which shapes: its dimensions are read from them, and none is missing."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esmflow.checkpoint.families import Family
from esmflow.checkpoint.file import AS_STORED, CheckpointError, raw_bytes
from esmflow.checkpoint.models import ModelDimensions

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Stored:
    """What a checkpoint holds, under this project's names.

    heads: as something beside the tensors says; the rotary frequencies say it where there are any. frequencies: where
    these are from.
    """

    tensors: dict[str, torch.Tensor]
    family: Family
    heads: int | None = None
    frequencies: str = AS_STORED


def read_dimensions(stored: Stored, source: Path) -> ModelDimensions:
    """Reads the dimensions and checks that no tensor is missing or misshapen; ties the LM head to the embedding.

    Raises CheckpointError for what is not a whole model of its family.
    """
    tensors, family = stored.tensors, stored.family
    rows = family.embedding_rows
    embedding = tensors.get("embed_tokens.weight")
    kind = "rotary frequencies" if family.rotary else "learned positions"
    places = tensors.get("layers.0.self_attn.rot_emb.inv_freq" if family.rotary else "embed_positions.weight")
    if embedding is None or places is None or embedding.shape[:1] != (rows,):
        raise CheckpointError(f"{source}: not an {family.name} model (no {rows}-token embedding with {kind})")
    if embedding.ndim != 2 or places.ndim != (1 if family.rotary else 2) or not len(places):
        raise CheckpointError(f"{source}: its token embedding or its {kind} are empty or misshapen")
    hidden = embedding.shape[1]
    heads = hidden // (2 * len(places)) if family.rotary else stored.heads
    if not isinstance(heads, int) or heads < 1 or hidden % (2 * heads):
        raise CheckpointError(f"{source}: nothing says how many attention heads it has; put its config.json there")
    numbers = {int(match.group(1)) for key in tensors if (match := re.match(r"layers\.(\d+)\.", key))}
    layers = len(numbers)
    # Before anything is done for each of them: one wrong number may say three million.
    if max(numbers, default=0) != layers - 1:
        last = max(numbers, default=0)
        raise CheckpointError(f"{source}: has a layer {last}, and {layers} layers in all: it is incomplete")
    fc2 = tensors.get("layers.0.fc2.weight")
    decoder = tensors.pop("lm_head.weight", None) if family.tied_head else None
    dimensions = ModelDimensions(
        layers,
        hidden,
        heads,
        any(key.startswith("lm_head.") for key in tensors),
        any(key.startswith("contact_head.") for key in tensors),
        family.name,
        feed_forward_width=fc2.shape[-1] if family.gate and fc2 is not None and fc2.ndim else None,
        # The first rows are for padding.
        positions=None if family.rotary else len(places) - 2,
    )
    _check_shapes(tensors, tensor_shapes(dimensions), source, family)
    if decoder is not None and not _same(decoder, embedding):
        raise CheckpointError(f"{source}: its LM head is not tied to the token embedding, as every {family.name}'s is")
    return dimensions


def tensor_shapes(dimensions: ModelDimensions) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor that a model of these dimensions has."""
    family, hidden, width = dimensions.family, dimensions.hidden, dimensions.feed_forward

    def linear(name: str, *shape: int) -> dict[str, tuple[int, ...]]:
        return _weight_and_bias(name, *shape) if family.biases else {f"{name}.weight": shape}

    expected = {"embed_tokens.weight": (family.embedding_rows, hidden), **linear("emb_layer_norm_after", hidden)}
    if dimensions.positions is not None:
        expected["embed_positions.weight"] = (dimensions.positions + 2, hidden)
    if family.norm_before:
        expected |= _weight_and_bias("emb_layer_norm_before", hidden)
    for n in range(dimensions.layers):
        layer, attention = f"layers.{n}", f"layers.{n}.self_attn"
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            expected |= linear(f"{attention}.{projection}", hidden, hidden)
        if family.rotary:
            expected[f"{attention}.rot_emb.inv_freq"] = (dimensions.head_dim // 2,)
        if family.query_key_norms:
            expected |= {f"{attention}.{part}_norm.weight": (hidden,) for part in "qk"}
        expected |= _weight_and_bias(f"{attention}_layer_norm", hidden)
        expected |= _weight_and_bias(f"{layer}.final_layer_norm", hidden)
        if family.gate:
            expected |= linear(f"{layer}.gate", width, hidden)
        expected |= linear(f"{layer}.fc1", width, hidden)
        expected |= linear(f"{layer}.fc2", hidden, width)
    if dimensions.has_lm_head:
        expected |= _weight_and_bias("lm_head.dense", hidden, hidden) | _weight_and_bias("lm_head.layer_norm", hidden)
        expected["lm_head.bias"] = (family.embedding_rows,)
        if not family.tied_head:
            expected["lm_head.weight"] = (family.embedding_rows, hidden)
    if dimensions.has_contact_head:
        expected |= _weight_and_bias("contact_head.regression", 1, dimensions.layers * dimensions.heads)
    return expected


def _check_shapes(
    tensors: dict[str, torch.Tensor], expected: dict[str, tuple[int, ...]], source: Path, family: Family
) -> None:
    for key, shape in expected.items():
        found = tuple(tensors[key].shape) if key in tensors else None
        if found != shape:
            raise CheckpointError(f"{source}: {key} should have shape {shape} and has {found}: the file is incomplete")
    unexpected = sorted(set(tensors) - set(expected))
    if unexpected:
        raise CheckpointError(f"{source}: holds {unexpected[0]}, which no {family.name} has: it is another model")


def _weight_and_bias(name: str, *shape: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    # By their bytes: NaN is not equal to itself.
    return a.dtype == b.dtype and raw_bytes(a) == raw_bytes(b)


def check_tensors(tensors: dict[str, Any], source: Path) -> None:
    """Raises CheckpointError for what is no dense tensor, before anything looks at its shape."""
    import torch

    for key, value in tensors.items():
        if not isinstance(value, torch.Tensor):
            raise CheckpointError(f"{source}: {key} is a {type(value).__name__} and no tensor: the file is damaged")
        if value.layout is not torch.strided:
            raise CheckpointError(f"{source}: {key} is a sparse tensor, which no model has: it is damaged")
