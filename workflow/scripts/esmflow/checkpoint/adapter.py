"""Merge a LoRA adapter, as peft saves it, into the model that it was trained on: W + B·A · alpha / r."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esmflow.checkpoint.esm_c import esm_c_name, left_out
from esmflow.checkpoint.file import CheckpointError
from esmflow.checkpoint.hugging_face import fair_esm_name
from esmflow.checkpoint.shapes import Stored
from esmflow.files import read_json

if TYPE_CHECKING:
    import torch

_FILES = ("adapter_model.safetensors", "adapter_model.bin")
# Of peft's adapters, the kinds that change more than W + B·A, or read B·A in another way.
_VARIANTS = (
    "use_dora", "use_qalora", "use_bdlora", "layer_replication", "target_parameters", "trainable_token_indices",
    "alora_invocation_tokens", "arrow_config", "kasa_config", "velora_config", "monteclora_config",
)  # fmt: skip
# Other ways of starting (PiSSA, OLoRA, CorDA, LoftQ, …) change the base model's own weights before the training.
_PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")
WITH_PEFT = "merge it with peft (merge_and_unload, then save_pretrained) and give the folder of the result"
_UPDATE = re.compile(r"(.+)\.lora_(embedding_)?([AB])(?:\.(weight|bias))?")


def adapter_file(folder: Path) -> Path:
    """The file that holds the adapter's tensors. Raises CheckpointError if there is none."""
    for name in _FILES:
        if (folder / name).exists():
            return folder / name
    raise CheckpointError(f"{folder}: an adapter's folder holds {' or '.join(_FILES)}; this one has neither")


def merge_adapter(model: Stored, adapter: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Puts an adapter's updates into a model's tensors, which keep their precision.

    The formula is that of LoRA (Hu et al. 2021), with rank stabilisation (Kalajdzievski 2023) where the adapter's
    configuration says so. Tensors that were trained whole (`modules_to_save`, biases) take their places. What is beside
    the encoder is left out with a warning. Raises CheckpointError for an adapter of another kind or base model.
    """
    config, tensors = _read_config(folder), model.tensors
    updates: dict[str, dict[str, torch.Tensor]] = {}
    whole: dict[str, torch.Tensor] = {}
    for key, value in adapter.items():
        name = key.removeprefix("base_model.model.").replace(".modules_to_save", "").replace(".base_layer", "")
        if found := _UPDATE.fullmatch(name):
            module, of_embedding, letter, parameter = found.groups()
            kind = "bias" if parameter == "bias" else "embedding" if of_embedding else "linear"
            updates.setdefault(module, {})[f"{kind} {letter}"] = value
        else:
            whole[name] = value

    changed, beside = set(), []
    for name, value in whole.items():
        if (ours := _inside(name, tensors, folder)) is None:
            beside.append(name)
            continue
        _check_shape(tuple(value.shape), ours, tensors, folder)
        tensors[ours] = value.to(tensors[ours].dtype)
        changed.add(ours)
    for module, parts in updates.items():
        if (ours := _inside(f"{module}.weight", tensors, folder)) is None:
            beside.append(module)
            continue
        scale = _scale(module, parts, config, folder)
        kind = "embedding" if "embedding A" in parts else "linear"
        product = parts[f"{kind} B"].float() @ parts[f"{kind} A"].float()
        _add(scale * (product.T if kind == "embedding" else product), ours, tensors, folder)
        if "bias B" in parts:
            _add(scale * parts["bias B"].float(), ours.removesuffix("weight") + "bias", tensors, folder)
        changed.add(ours)
    left_out(beside, folder)
    if not changed:
        raise CheckpointError(f"{folder}: this adapter changes nothing that embeddings depend on; give its base model")
    if "embed_tokens.weight" in changed and model.family.tied_head:
        # The same tensor in the model that was trained, whose decoder is tied to it.
        tensors.pop("lm_head.weight", None)


def _read_config(folder: Path) -> dict[str, Any]:
    config = read_json(folder / "adapter_config.json")
    kind = config.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(f"{folder}: an adapter of the kind {kind}, where LORA is known; {WITH_PEFT}")
    if variants := [name for name in _VARIANTS if config.get(name)]:
        raise CheckpointError(f"{folder}: an adapter with {variants[0]}, which is more than plain LoRA; {WITH_PEFT}")
    if (start := config.get("init_lora_weights")) not in _PLAIN_STARTS:
        raise CheckpointError(
            f"{folder}: training began with init_lora_weights: {start}, which changes the base model; {WITH_PEFT}"
        )
    return config


def _inside(name: str, tensors: Mapping[str, torch.Tensor], folder: Path) -> str | None:
    """Our name of a tensor that peft knows as transformers calls it; None for what is beside the encoder."""
    bare = name.removeprefix("esm.").removeprefix("esmc.")
    # ESM C's names are no other family's.
    ours = fair_esm_name(bare) or esm_c_name(bare)
    if ours in tensors:
        return ours
    # transformers has embeddings of positions in every model, which those that rotate do not read.
    if bare.startswith(("encoder.", "embeddings.word", "layers.", "embed_tokens.")):
        raise CheckpointError(f"{folder}: changes {name}, which the base model does not have: it belongs to another")
    return None


def _scale(module: str, parts: Mapping[str, torch.Tensor], config: Mapping[str, Any], folder: Path) -> float:
    found = {kind: axis for kind, axis in _RANK_AXES.items() if kind in parts and parts[kind].ndim == 2}
    ranks = {kind: parts[kind].shape[axis] for kind, axis in found.items()}
    if len(ranks) != 2 or len(set(ranks.values())) != 1:
        raise CheckpointError(f"{folder}: the update of {module} is not whole; fetch the adapter again")
    (rank,) = set(ranks.values())
    # As peft looks it up: the first pattern that the end of the name has.
    patterns = config.get("alpha_pattern") or {}
    fitting = [alpha for pattern, alpha in patterns.items() if re.match(rf"(.*\.)?({pattern})$", module)]
    alpha = fitting[0] if fitting else config.get("lora_alpha")
    if not isinstance(alpha, int | float):
        raise CheckpointError(f"{folder}: adapter_config.json does not say lora_alpha; fetch it again")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


_RANK_AXES = {"linear A": 0, "linear B": 1, "embedding A": 0, "embedding B": 1}


def _check_shape(shape: tuple[int, ...], name: str, tensors: Mapping[str, torch.Tensor], folder: Path) -> None:
    if name not in tensors or tuple(tensors[name].shape) != shape:
        has = tuple(tensors[name].shape) if name in tensors else None
        raise CheckpointError(
            f"{folder}: its {name} has the shape {shape}, and that of the base model {has}: it was trained on another"
        )


def _add(update: torch.Tensor, name: str, tensors: dict[str, torch.Tensor], folder: Path) -> None:
    _check_shape(tuple(update.shape), name, tensors, folder)
    if not update.isfinite().all():
        raise CheckpointError(f"{folder}: its update of {name} has values that are no numbers; train it anew")
    tensors[name] = (tensors[name].float() + update).to(tensors[name].dtype)
