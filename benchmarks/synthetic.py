"""Made-up inputs for the benchmarks: checkpoints with random weights (speed does not depend on them) and sequences."""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from esmflow.checkpoint.families import ESMC
from esmflow.checkpoint.file import write_checkpoint
from esmflow.checkpoint.models import OFFICIAL_MODELS, ModelDimensions
from esmflow.checkpoint.shapes import tensor_shapes

SIZES = {
    "8M": ModelDimensions(6, 320, 20, True, True),
    "35M": ModelDimensions(12, 480, 20, True, True),
    "150M": ModelDimensions(30, 640, 20, True, True),
    "650M": ModelDimensions(33, 1280, 20, True, True),
    "3B": ModelDimensions(36, 2560, 40, True, True),
    "15B": ModelDimensions(48, 5120, 40, True, True),
    **{name: model for name, model in OFFICIAL_MODELS.items() if model.family is ESMC},
    "smoke": ModelDimensions(2, 64, 4, True, True),
    "smoke-ESMC": ModelDimensions(2, 64, 4, True, False, ESMC.name, feed_forward_width=256),
}
# The published 3B and 15B checkpoints hold fp16.
STORED_AS = {"3B": torch.float16, "15B": torch.float16, "ESMC-6B": torch.bfloat16}


def random_tensors(size: str, device: str) -> dict[str, torch.Tensor]:
    """Every tensor of a model of this size by its name in a converted checkpoint, random, as published."""
    dimensions = SIZES[size]
    head_dim = dimensions.head_dim
    frequencies = 10000.0 ** -(torch.arange(0, head_dim, 2) / head_dim)
    tensors = {}
    for name, shape in tensor_shapes(dimensions).items():
        scale = shape[1] ** -0.5 if len(shape) == 2 else 0.05
        centre = 1.0 if name.endswith(("norm.weight", "norm_after.weight")) else 0.0
        drawn = frequencies if name.endswith("inv_freq") else centre + scale * torch.randn(shape, device=device)
        tensors[name] = drawn.to(STORED_AS.get(size, torch.float32), copy=True)
    return tensors


def write_converted(path: Path, size: str, tensors: dict[str, torch.Tensor]) -> Path:
    """A converted checkpoint, as the workflow's model step would leave it."""
    on_host = {name: tensor.cpu() for name, tensor in tensors.items()}
    write_checkpoint(path, on_host, name=f"random {size}", dimensions=SIZES[size])
    return path


def write_fair_esm(path: Path, size: str, tensors: dict[str, torch.Tensor]) -> Path:
    """The same as a fair-esm `.pt` with its `-contact-regression.pt` beside it."""
    dimensions = SIZES[size]
    on_host = {name: tensor.cpu() for name, tensor in tensors.items()}
    regression = {name: on_host.pop(name) for name in list(on_host) if name.startswith("contact_head")}
    on_host["lm_head.weight"] = on_host["embed_tokens.weight"]
    settings = argparse.Namespace(
        encoder_layers=dimensions.layers,
        encoder_embed_dim=dimensions.hidden,
        encoder_attention_heads=dimensions.heads,
        token_dropout=True,
    )
    state = {f"encoder.sentence_encoder.{name}": tensor for name, tensor in on_host.items()}
    torch.save({"cfg": {"model": settings}, "model": state}, path)
    torch.save({"model": regression}, path.with_name(f"{path.stem}-contact-regression.pt"))
    return path


def write_apart(write: Callable[..., None], *arguments: Any) -> None:
    """Writes an input in a process of its own, which leaves nothing on the card."""
    writer = multiprocessing.get_context("spawn").Process(target=write, args=arguments)
    writer.start()
    writer.join()
    if writer.exitcode != 0:
        raise SystemExit("the input could not be written")


def sequences(kind: str, residues: int, seed: int = 0) -> list[str]:
    """Random sequences of about `residues` residues in all.

    `proteome`: lognormal lengths of mean 342 and at most 1022. `viral`: uniform lengths of 60 to 166.
    """
    rng = np.random.default_rng(seed)
    count = max(8, residues // (342 if kind == "proteome" else 113))
    if kind == "proteome":
        sigma = 0.7
        lengths = rng.lognormal(np.log(342) - sigma**2 / 2, sigma, count).clip(20, 1022).astype(int)
    else:
        lengths = rng.integers(60, 167, count)
    letters = np.frombuffer(b"LAGVSERTIDPKQNFYMHWC", dtype=np.uint8)
    return [letters[rng.integers(0, 20, n)].tobytes().decode() for n in lengths]


def model_flops(size: str, lengths: list[int]) -> float:
    """Floating-point operations of one forward pass: matrix products and attention, cls and eos included.

    Two for each weight of a layer's products and token (Kaplan et al., 2020, table 1), 4 n D for attention in a
    sequence of n.
    """
    dimensions = SIZES[size]
    tokens = np.array(lengths, dtype=np.float64) + 2
    of_layer = 2 * dimensions.layer_parameters * tokens + 4 * dimensions.hidden * tokens**2
    return float(dimensions.layers * of_layer.sum())
