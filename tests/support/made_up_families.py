"""Checkpoints of other families with random weights: ESM-1b and ESM-1v as fair-esm has them, ESM C in three layouts.

Names are written out by hand: the library's own tables are what they test. Nothing is left at its neutral start.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import esm
import numpy as np
import torch
from safetensors.torch import save_file

ESM_C_SHAPES = {"head 16": (3, 64, 4, 256), "head 24": (2, 96, 4, 256), "head 64": (2, 128, 2, 512)}
"""Layers, width, heads, feed-forward width."""


def random_esm1(norm_before: bool, layers: int = 2, hidden: int = 32, heads: int = 2) -> esm.ProteinBertModel:
    """fair-esm's module: of ESM-1b with a norm before the first layer, of ESM-1v without."""
    torch.manual_seed(layers)
    arguments = argparse.Namespace(
        arch="roberta_large", layers=layers, embed_dim=hidden, ffn_embed_dim=4 * hidden, attention_heads=heads,
        max_positions=1024, token_dropout=True, emb_layer_norm_before=norm_before,
    )  # fmt: skip
    model = esm.ProteinBertModel(arguments, esm.Alphabet.from_architecture("ESM-1b")).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_((1.0 if "regression" in name else 0.1) * torch.randn_like(parameter))
    return model


def write_esm1(path: Path, model: esm.ProteinBertModel, contact_regression: bool = True) -> Path:
    """A `.pt` as fair-esm published them: names and arguments with the encoder before them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    weights, regression = {}, {}
    for name, tensor in model.state_dict().items():
        prefix = "encoder." if name.startswith("lm_head.") else "encoder.sentence_encoder."
        if name.startswith("contact_head."):
            regression[name] = tensor
        else:
            weights[prefix + name] = tensor
    said = {"arch", "max_positions", "token_dropout"}
    arguments = {name if name in said else f"encoder_{name}": value for name, value in vars(model.args).items()}
    torch.save({"args": argparse.Namespace(**arguments), "model": weights}, path)
    if contact_regression:
        torch.save({"model": regression}, path.with_name(f"{path.stem}-contact-regression.pt"))
    return path


def random_esm_c(layers: int, hidden: int, heads: int, width: int) -> dict[str, torch.Tensor]:
    """Tensors under transformers' names, the same on every machine."""
    draw = np.random.default_rng(layers * hidden)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.from_numpy((draw.standard_normal((rows, columns)) * columns**-0.5).astype(np.float32))

    def vector(size: int, around: float) -> torch.Tensor:
        return torch.from_numpy((around + 0.2 * draw.standard_normal(size)).astype(np.float32))

    tensors = {"esmc.embed_tokens.weight": matrix(64, hidden), "esmc.norm.weight": vector(hidden, 1)}
    for n in range(layers):
        layer = f"esmc.layers.{n}"
        for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
            tensors[f"{layer}.self_attn.{part}.weight"] = matrix(hidden, hidden)
        for part in ("q_norm", "k_norm"):
            tensors[f"{layer}.self_attn.{part}.weight"] = vector(hidden, 1)
        for part in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{layer}.{part}.weight"], tensors[f"{layer}.{part}.bias"] = vector(hidden, 1), vector(hidden, 0)
        tensors[f"{layer}.mlp.gate_proj.weight"] = matrix(width, hidden)
        tensors[f"{layer}.mlp.up_proj.weight"] = matrix(width, hidden)
        tensors[f"{layer}.mlp.down_proj.weight"] = matrix(hidden, width)
    tensors["lm_head.dense.weight"], tensors["lm_head.dense.bias"] = matrix(hidden, hidden), vector(hidden, 0)
    tensors["lm_head.layer_norm.weight"], tensors["lm_head.layer_norm.bias"] = vector(hidden, 1), vector(hidden, 0)
    tensors["lm_head.decoder.weight"], tensors["lm_head.decoder.bias"] = matrix(64, hidden), vector(64, 0)
    return tensors


def write_esm_c(folder: Path, tensors: dict[str, torch.Tensor], heads: int) -> Path:
    """A folder as transformers saves it."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    gate = tensors["esmc.layers.0.mlp.gate_proj.weight"]
    shape = {"hidden_size": gate.shape[1], "intermediate_size": gate.shape[0], "num_attention_heads": heads}
    layers = sum(name.endswith("q_norm.weight") for name in tensors)
    rotary = {"rope_theta": 10000.0, "rope_type": "default"}
    config = {"model_type": "esmc", "vocab_size": 64, "num_hidden_layers": layers, "rope_parameters": rotary, **shape}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _first_names(tensors: dict[str, torch.Tensor], norm: str, linear: str, second: str) -> dict[str, torch.Tensor]:
    """q, k and v, and gate and up, in one matrix each."""
    found = {"embed.weight": tensors["esmc.embed_tokens.weight"]}
    found["transformer.norm.weight"] = tensors["esmc.norm.weight"]
    for n in range(sum(name.endswith("q_norm.weight") for name in tensors)):
        old, new = f"esmc.layers.{n}", f"transformer.blocks.{n}"
        attention = f"{old}.self_attn"
        for parameter in ("weight", "bias"):
            found[f"{new}.attn.layernorm_qkv.{norm}{parameter}"] = tensors[f"{old}.input_layernorm.{parameter}"]
            found[f"{new}.ffn.{norm}{parameter}"] = tensors[f"{old}.post_attention_layernorm.{parameter}"]
        qkv = [tensors[f"{attention}.{part}_proj.weight"] for part in "qkv"]
        found[f"{new}.attn.layernorm_qkv.{linear}weight"] = torch.cat(qkv)
        for part in "qk":
            found[f"{new}.attn.{part}_ln.weight"] = tensors[f"{attention}.{part}_norm.weight"]
        found[f"{new}.attn.out_proj.weight"] = tensors[f"{attention}.o_proj.weight"]
        both = [tensors[f"{old}.mlp.{part}_proj.weight"] for part in ("gate", "up")]
        found[f"{new}.ffn.{'1.weight' if linear else 'fc1_weight'}"] = torch.cat(both)
        found[f"{new}.ffn.{second}"] = tensors[f"{old}.mlp.down_proj.weight"]
    return found


def write_first_esm_c(folder: Path, tensors: dict[str, torch.Tensor], heads: int) -> Path:
    """A folder as the first repositories have it."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {f"esmc.{name}": t for name, t in _first_names(tensors, "layer_norm_", "", "fc2_weight").items()}
    found["esmc.transformer.blocks.0.ffn._extra_state"] = torch.zeros(3)
    found |= {_numbered(name, "lm_head"): t for name, t in tensors.items() if name.startswith("lm_head.")}
    save_file(found, folder / "model.safetensors", {"format": "pt"})
    layers, hidden = sum(name.endswith("q_norm.weight") for name in tensors), tensors["esmc.norm.weight"].shape[0]
    shape = {"d_model": hidden, "n_heads": heads, "n_layers": layers}
    (folder / "config.json").write_text(json.dumps({"model_type": "ESMC", "vocab_size": 64, **shape}))
    return folder


def write_esm_c_of_the_package(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """A `.pth` as the package esm has them: it says nothing of heads, which are 64 wide."""
    found = _first_names(tensors, "0.", "1.", "3.weight")
    found |= {_numbered(name, "sequence_head"): t for name, t in tensors.items() if name.startswith("lm_head.")}
    torch.save(found, path)
    return path


def _numbered(name: str, head: str) -> str:
    _, part, parameter = name.split(".")
    return f"{head}.{dict(dense=0, layer_norm=2, decoder=3)[part]}.{parameter}"
