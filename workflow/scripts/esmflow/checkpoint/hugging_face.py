"""A Hugging Face folder as fair-esm's tensors, whichever version of transformers wrote it.

Rotary frequencies have been stored in three ways: one for each layer, one for the whole model, not at all.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esmflow.checkpoint.esm_c import check_esm_c, esm_c_tensors, is_esm_c, left_out
from esmflow.checkpoint.families import ESM1B, ESM1V, ESM2
from esmflow.checkpoint.file import COMPUTED, NO_FREQUENCIES, CheckpointError
from esmflow.checkpoint.shapes import Stored
from esmflow.files import read_json

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

# fair-esm's names, with {n} for the layer, from transformers' names without the "esm." prefix.
_NAMES = {
    "embeddings.word_embeddings.weight": "embed_tokens.weight",
    "embeddings.position_embeddings.weight": "embed_positions.weight",
    "embeddings.layer_norm.{p}": "emb_layer_norm_before.{p}",
    "encoder.layer.{n}.attention.self.query.{p}": "layers.{n}.self_attn.q_proj.{p}",
    "encoder.layer.{n}.attention.self.key.{p}": "layers.{n}.self_attn.k_proj.{p}",
    "encoder.layer.{n}.attention.self.value.{p}": "layers.{n}.self_attn.v_proj.{p}",
    "encoder.layer.{n}.attention.self.rotary_embeddings.inv_freq": "layers.{n}.self_attn.rot_emb.inv_freq",
    "encoder.layer.{n}.attention.output.dense.{p}": "layers.{n}.self_attn.out_proj.{p}",
    "encoder.layer.{n}.attention.LayerNorm.{p}": "layers.{n}.self_attn_layer_norm.{p}",
    "encoder.layer.{n}.intermediate.dense.{p}": "layers.{n}.fc1.{p}",
    "encoder.layer.{n}.output.dense.{p}": "layers.{n}.fc2.{p}",
    "encoder.layer.{n}.LayerNorm.{p}": "layers.{n}.final_layer_norm.{p}",
    "encoder.emb_layer_norm_after.{p}": "emb_layer_norm_after.{p}",
    "contact_head.regression.{p}": "contact_head.regression.{p}",
    "lm_head.dense.{p}": "lm_head.dense.{p}",
    "lm_head.layer_norm.{p}": "lm_head.layer_norm.{p}",
    "lm_head.decoder.weight": "lm_head.weight",
    "lm_head.bias": "lm_head.bias",
}
# transformers 5 stores one tensor for all layers, under a name of its own, with an asterisk in 5.24.
_SHARED_FREQUENCIES = ("encoder.layer.*.attention.self.rotary_embeddings.inv_freq", "rotary_embeddings.inv_freq")
# A base model's norms have TensorFlow's names for their parameters, as transformers 5.24 stores it.
_PARAMETERS = {"gamma": "weight", "beta": "bias"}
# What transformers stores besides, and nobody reads: the numbers of positions, a bias that is stored twice.
_NOT_READ = re.compile(r"embeddings\.position_ids|lm_head\.decoder\.bias")
# What the configuration must say of a model with ESM-2's arithmetic, where it says anything; of positions see below.
_ESM2 = {
    "model_type": "esm",
    "token_dropout": True,
    "layer_norm_eps": 1e-5,
    "vocab_size": 33,
    "is_folding_model": False,
}


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's `config.json`; empty if it has none.

    Raises CheckpointError if it is no JSON object, or describes a model whose arithmetic is of no family known here.
    """
    path = folder / "config.json"
    if not path.exists():
        return {}
    try:
        config = read_json(path)
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON ({error}); fetch it again") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: holds no settings; fetch it again")
    if str(config.get("model_type")).lower() == "esmc":
        check_esm_c(config, path)
        return config
    rotary = {} if _learned_positions(config) else {"position_embedding_type": "rotary", "emb_layer_norm_before": False}
    for key, value in (_ESM2 | rotary).items():
        # Null stands for the default, which is ESM-2's.
        if config.get(key, value) not in (value, None):
            raise CheckpointError(
                f"{path}: has {key}: {config[key]!r}, where every ESM-2 has {value!r}: it is a model of another kind, "
                "whose embeddings would be wrong"
            )
    return config


def _learned_positions(config: dict[str, Any]) -> bool:
    """Whether this is ESM-1b or ESM-1v."""
    return config.get("position_embedding_type") == "absolute"


def fair_esm_tensors(stored: dict[str, torch.Tensor], config: dict[str, Any], folder: Path) -> Stored:
    """The tensors under fair-esm's names, and what their configuration says of them.

    What is beside the encoder (the head of a classifier, a pooler) is left out with a warning. Raises CheckpointError
    for a tensor inside of it that the family does not have.
    """
    if is_esm_c(stored):
        return esm_c_tensors(stored, config, folder)
    tensors: dict[str, torch.Tensor] = {}
    shared: torch.Tensor | None = None
    beside: list[str] = []
    for key, value in stored.items():
        name = key.removeprefix("esm.")
        if name in _SHARED_FREQUENCIES:
            shared = value
        elif ours := fair_esm_name(name):
            tensors[ours] = value
        elif name.startswith("encoder."):
            raise CheckpointError(f"{folder}: holds {key}, which no ESM-2 has: it is another model, or was changed")
        elif not _NOT_READ.fullmatch(name):
            beside.append(key)
    left_out(beside, folder)
    if _learned_positions(config):
        family = ESM1B if config.get("emb_layer_norm_before") else ESM1V
        return Stored(tensors, family, config.get("num_attention_heads"), NO_FREQUENCIES)
    # As old versions of transformers store it: rotation replaces it.
    tensors.pop("embed_positions.weight", None)
    layers = {int(match.group(1)) for key in tensors if (match := re.match(r"layers\.(\d+)\.", key))}
    names = [f"layers.{n}.self_attn.rot_emb.inv_freq" for n in sorted(layers)]
    if any(name in tensors for name in names) or not layers:
        return Stored(tensors, ESM2)
    if shared is not None:
        # A copy for each layer: files of tensors may not share memory.
        frequencies = "as stored, one for all layers"
        return Stored(tensors | {name: shared.clone() for name in names}, ESM2, frequencies=frequencies)
    heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    if not (isinstance(heads, int) and isinstance(hidden, int) and 0 < 2 * heads <= hidden):
        raise CheckpointError(
            f"{folder}: holds no rotary frequencies, and no config.json that says how many heads the model has; "
            "put its config.json there"
        )
    log.warning("%s: holds no rotary frequencies; they are computed as the published models have them", folder)
    computed = {name: published_frequencies(hidden // heads) for name in names}
    return Stored(tensors | computed, ESM2, frequencies=COMPUTED)


def published_frequencies(head_dim: int) -> torch.Tensor:
    """Rotary frequencies of the published checkpoints: 10000^(-2i/d), rounded to fp16, as fp32 `[d / 2]`."""
    import torch

    return (1.0 / (10000 ** (torch.arange(0, head_dim, 2).float() / head_dim))).half().float()


def fair_esm_name(key: str) -> str | None:
    """fair-esm's name of a tensor, from transformers' without the `esm.` before it; None for one of no ESM-2."""
    layer = re.search(r"\.layer\.(\d+)\.", key)
    general = key.replace(layer.group(), ".layer.{n}.", 1) if layer else key
    stem, _, parameter = general.rpartition(".")
    parameter = _PARAMETERS.get(parameter, parameter)
    ours = _NAMES.get(general)
    if ours is None and parameter in ("weight", "bias"):
        ours = _NAMES.get(f"{stem}.{{p}}")
    return ours and ours.format(n=layer and layer.group(1), p=parameter)
