"""ESM C's tensors under this project's names, whichever of three kinds of files they were stored in.

transformers' (`biohub/ESMC-…-hf`), those of the first repositories (`biohub/ESMC-…`), and those of the package `esm`
(`esmc_…_v0.pth`). Their names have nothing in common, so one table serves all. The last two keep queries, keys and
values in one matrix, and the gate above the rest of the feed-forward part's first one.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esmflow.checkpoint.families import ESMC
from esmflow.checkpoint.file import COMPUTED, CheckpointError
from esmflow.checkpoint.shapes import Stored, check_tensors

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

_OURS = "layers.{n}."
_QKV = tuple(f"{_OURS}self_attn.{part}_proj.weight" for part in "qkv")
_GATED = (f"{_OURS}gate.weight", f"{_OURS}fc1.weight")
_THEIRS = "transformer.blocks.{n}."
# Ours, with {n} for the layer and {p} for weight and bias, by theirs without the "esmc." prefix.
_NAMES: dict[str, tuple[str, ...]] = {
    "embed_tokens.weight": ("embed_tokens.weight",),
    **{f"layers.{{n}}.self_attn.{part}_proj.weight": (f"{_OURS}self_attn.{part}_proj.weight",) for part in "qkv"},
    **{f"layers.{{n}}.self_attn.{part}_norm.weight": (f"{_OURS}self_attn.{part}_norm.weight",) for part in "qk"},
    "layers.{n}.self_attn.o_proj.weight": (f"{_OURS}self_attn.out_proj.weight",),
    "layers.{n}.input_layernorm.{p}": (f"{_OURS}self_attn_layer_norm.{{p}}",),
    "layers.{n}.post_attention_layernorm.{p}": (f"{_OURS}final_layer_norm.{{p}}",),
    "layers.{n}.mlp.gate_proj.weight": _GATED[:1],
    "layers.{n}.mlp.up_proj.weight": _GATED[1:],
    "layers.{n}.mlp.down_proj.weight": (f"{_OURS}fc2.weight",),
    "norm.weight": ("emb_layer_norm_after.weight",),
    "lm_head.dense.{p}": ("lm_head.dense.{p}",),
    "lm_head.layer_norm.{p}": ("lm_head.layer_norm.{p}",),
    "lm_head.decoder.{p}": ("lm_head.{p}",),
    "embed.weight": ("embed_tokens.weight",),
    f"{_THEIRS}attn.layernorm_qkv.layer_norm_{{p}}": (f"{_OURS}self_attn_layer_norm.{{p}}",),
    f"{_THEIRS}attn.layernorm_qkv.0.{{p}}": (f"{_OURS}self_attn_layer_norm.{{p}}",),
    f"{_THEIRS}attn.layernorm_qkv.weight": _QKV,
    f"{_THEIRS}attn.layernorm_qkv.1.weight": _QKV,
    **{f"{_THEIRS}attn.{part}_ln.weight": (f"{_OURS}self_attn.{part}_norm.weight",) for part in "qk"},
    f"{_THEIRS}attn.out_proj.weight": (f"{_OURS}self_attn.out_proj.weight",),
    f"{_THEIRS}ffn.layer_norm_{{p}}": (f"{_OURS}final_layer_norm.{{p}}",),
    f"{_THEIRS}ffn.0.{{p}}": (f"{_OURS}final_layer_norm.{{p}}",),
    f"{_THEIRS}ffn.fc1_weight": _GATED,
    f"{_THEIRS}ffn.1.weight": _GATED,
    f"{_THEIRS}ffn.fc2_weight": (f"{_OURS}fc2.weight",),
    f"{_THEIRS}ffn.3.weight": (f"{_OURS}fc2.weight",),
    "transformer.norm.weight": ("emb_layer_norm_after.weight",),
    **{
        f"{head}.{number}.{{p}}": (f"lm_head.{part}{{p}}",)
        for head in ("lm_head", "sequence_head")
        for number, part in ((0, "dense."), (2, "layer_norm."), (3, ""))
    },
}
_ENCODER = ("embed", "layers.", "norm.", "transformer.")
# State of quantised products that transformer_engine stores, and frequencies that nobody reads.
_NOT_READ = re.compile(r".*(_extra_state|inv_freq)")
# What the configuration must say, where it says anything.
_SAID = {
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_act": "silu",
    "vocab_size": 64,
    "rope_theta": 10000.0,
    "rope_type": "default",
}
_HEAD_DIM = 64


def is_esm_c(names: Iterable[str]) -> bool:
    """Whether tensors of these names are ESM C's: it alone has norms of queries and keys."""
    return any(re.search(r"\.q_(norm|ln)\.weight$", name) for name in names)


def check_esm_c(config: Mapping[str, Any], path: Path) -> None:
    """Raises CheckpointError if a `config.json` describes a model whose arithmetic is not ESM C's."""
    said = {**config, **(config.get("rope_parameters") or {})}
    for key, value in _SAID.items():
        if said.get(key, value) not in (value, None):
            raise CheckpointError(
                f"{path}: has {key}: {said[key]!r}, where every ESM C has {value!r}: it is a model of another kind, "
                "whose embeddings would be wrong"
            )


def esm_c_tensors(stored: Mapping[str, torch.Tensor], config: Mapping[str, Any], source: Path) -> Stored:
    """The tensors under this project's names, rotary frequencies with them.

    What is beside the encoder is left out with a warning. Raises CheckpointError for a tensor inside of it that ESM C
    does not have.
    """
    tensors: dict[str, torch.Tensor] = {}
    beside = []
    for key, value in stored.items():
        name = key.removeprefix("esmc.")
        if ours := _our_names(name):
            check_tensors({key: value}, source)
            # Copies of the parts: files of tensors may not share memory.
            several = len(ours) > 1 and value.ndim
            parts = [part.clone() for part in value.chunk(len(ours))] if several else [value]
            tensors.update(zip(ours, parts, strict=False))
        elif _NOT_READ.fullmatch(name):
            continue
        elif name.startswith(_ENCODER):
            raise CheckpointError(f"{source}: holds {key}, which no ESM C has: it is another model, or was changed")
        else:
            beside.append(key)
    left_out(beside, source)
    layers = {int(match.group(1)) for name in tensors if (match := re.match(r"layers\.(\d+)\.", name))}
    frequencies = _frequencies(_head_dim(tensors, config, source))
    computed = {f"layers.{n}.self_attn.rot_emb.inv_freq": frequencies.clone() for n in layers}
    return Stored(tensors | computed, ESMC, frequencies=COMPUTED)


def left_out(beside: Sequence[str], source: Path) -> None:
    """Says which tensors are none of the encoder's, if any."""
    if beside:
        log.warning("%s: %s left out, which makes no difference to embeddings", source, ", ".join(sorted(beside)))


def esm_c_name(key: str) -> str | None:
    """Our name of a tensor, from transformers' without the `esmc.` before it; None for one of no ESM C."""
    names = _our_names(key)
    return names[0] if len(names) == 1 else None


def _our_names(key: str) -> tuple[str, ...]:
    layer = re.match(r"(?:transformer\.blocks|layers)\.(\d+)\.", key)
    general = key.replace(f".{layer.group(1)}.", ".{n}.", 1) if layer else key
    kind = re.search(r"(weight|bias)$", general)
    parameter = kind.group() if kind else ""
    ours = _NAMES.get(general) or _NAMES.get(general.removesuffix(parameter) + "{p}") or ()
    return tuple(name.format(n=layer and layer.group(1), p=parameter) for name in ours)


def _head_dim(tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any], source: Path) -> int:
    """As the configuration says, else that of every published ESM C: no tensor tells it."""
    embedding = tensors.get("embed_tokens.weight")
    if not config or embedding is None or embedding.ndim != 2:
        return _HEAD_DIM
    heads, width = config.get("num_attention_heads", config.get("n_heads")), embedding.shape[1]
    if not isinstance(heads, int) or heads < 1 or width % (2 * heads):
        raise CheckpointError(f"{source}: its config.json has {heads!r} attention heads, and its width is {width}")
    return width // heads


def _frequencies(head_dim: int) -> torch.Tensor:
    """10000^(-2i/d) in fp32, `[d / 2]`: no file has them, and unlike ESM-2's they were never rounded."""
    import torch

    return 1.0 / (10000.0 ** (torch.arange(0, head_dim, 2).float() / head_dim))
