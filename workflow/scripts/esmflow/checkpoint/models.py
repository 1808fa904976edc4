"""Which models there are: their dimensions, the published ones, what each can do, and what a `model` key means.

The rules import this, in environments without torch.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from esmflow.arrays import OF_HEAD
from esmflow.checkpoint.families import ESM1B, ESM1V, ESM2, ESMC, FAMILIES, Family
from esmflow.files import read_json

FORMAT = "esmflow-checkpoint-1"
"""Of converted checkpoints."""


@dataclass(frozen=True)
class ModelDimensions:
    """The family and the shape of a model, read from its tensors and never from its name.

    feed_forward_width: None where it is four times the width. positions: tokens that there are learned positions for.
    """

    layers: int
    hidden: int
    heads: int
    has_lm_head: bool
    has_contact_head: bool
    family_name: str = ESM2.name
    feed_forward_width: int | None = None
    positions: int | None = None

    @property
    def family(self) -> Family:
        """What sets its arithmetic apart."""
        return FAMILIES[self.family_name]

    @property
    def longest(self) -> int | None:
        """Residues that a sequence may have, beside cls and eos; None where any number can be embedded."""
        return None if self.positions is None else self.positions - 2

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden // self.heads

    @property
    def feed_forward(self) -> int:
        """Width of a layer's feed-forward part."""
        return self.feed_forward_width or 4 * self.hidden

    @property
    def activations(self) -> int:
        """Values for each token that a layer's feed-forward part holds at its peak."""
        return (3 if self.family.gate else 1) * self.feed_forward

    @property
    def layer_parameters(self) -> int:
        """Weights of one layer's matrices: those of q, k, v and output, and the feed-forward part's."""
        return 4 * self.hidden**2 + (3 if self.family.gate else 2) * self.hidden * self.feed_forward

    @property
    def parameters(self) -> int:
        """Weights of the model: its layers' matrices, and the embeddings of tokens and positions."""
        embeddings = self.family.embedding_rows + (self.positions or 0)
        return self.layers * self.layer_parameters + embeddings * self.hidden


def check_heads(include: Collection[str], dimensions: ModelDimensions) -> None:
    """Raises ValueError when something is asked for whose head the checkpoint does not hold."""
    if "contacts" in include and not dimensions.has_contact_head:
        if not dimensions.family.contacts:
            raise ValueError(
                f"include: contacts are asked for, and no contact head was published for {dimensions.family.name}; "
                "leave contacts out"
            )
        raise ValueError(
            "include: contacts are asked for, but the checkpoint has no contact head; put fair-esm's "
            "…-contact-regression.pt beside the .pt file and run again with --forcerun model, or leave contacts out"
        )
    of_head = " and ".join(kind for kind in OF_HEAD if kind in include)
    if of_head and not dimensions.has_lm_head:
        raise ValueError(
            f"include: {of_head} cannot be had: the checkpoint has no language model head; use one that has, or leave "
            f"{of_head} out"
        )


def check_method(method: Mapping[str, Any], dimensions: ModelDimensions) -> None:
    """Raises ValueError when this model cannot do what is configured. method: keys of the configuration."""
    family, longest = dimensions.family, dimensions.longest
    check_heads(method["include"], dimensions)
    if method["engine"] == "reference" and not family.in_fair_esm:
        raise ValueError(f"engine: reference is fair-esm's own model, which has no {family.name}; take engine: packed")
    if method["precision"] == "int8" and not family.eight_bits:
        made_for = " and ".join(other.name for other in FAMILIES.values() if other.eight_bits)
        raise ValueError(
            f"precision: int8 is made for {made_for} only, and this model is {family.name}; "
            "take auto, bf16, fp16 or fp32"
        )
    if longest is not None and method["long_sequences"] != "whole" and (method["max_residues"] or 0) > longest:
        raise ValueError(
            f"max_residues: {method['max_residues']} is more than this model, {family.name}, has positions for; "
            f"give {longest} or less"
        )


OFFICIAL_MODELS = {
    "esm2_t6_8M_UR50D": ModelDimensions(6, 320, 20, True, True),
    "esm2_t12_35M_UR50D": ModelDimensions(12, 480, 20, True, True),
    "esm2_t30_150M_UR50D": ModelDimensions(30, 640, 20, True, True),
    "esm2_t33_650M_UR50D": ModelDimensions(33, 1280, 20, True, True),
    "esm2_t36_3B_UR50D": ModelDimensions(36, 2560, 40, True, True),
    "esm2_t48_15B_UR50D": ModelDimensions(48, 5120, 40, True, True),
    "ESMC-300M": ModelDimensions(30, 960, 15, True, False, ESMC.name, feed_forward_width=2560),
    "ESMC-600M": ModelDimensions(36, 1152, 18, True, False, ESMC.name, feed_forward_width=3072),
    "ESMC-6B": ModelDimensions(80, 2560, 40, True, False, ESMC.name, feed_forward_width=6912),
    "esm1b_t33_650M_UR50S": ModelDimensions(33, 1280, 20, True, True, ESM1B.name, positions=1024),
    **{
        f"esm1v_t33_650M_UR90S_{n}": ModelDimensions(33, 1280, 20, True, False, ESM1V.name, positions=1024)
        for n in range(1, 6)
    },
}
"""The published checkpoints, family by family."""

SIZES = {name.split("_")[2]: name for name, model in OFFICIAL_MODELS.items() if model.family is ESM2}
"""Those of ESM-2 by their size alone, `8M` to `15B`."""

_OWNERS = re.compile(r"^(facebook|biohub|evolutionaryscale)/", re.IGNORECASE)
_NAMES = {name.lower(): name for name in OFFICIAL_MODELS}


# The files, or their index, by which a folder is that of a whole model.
_WHOLE = [f"{name}{index}" for name in ("model.safetensors", "pytorch_model.bin") for index in ("", ".index.json")]


def official_name(model: str) -> str:
    """The published models by their name here, others as they are.

    They are known by a size alone (`650M`), as on Hugging Face (`facebook/esm2_…`, `biohub/ESMC-600M`, the same with
    `-hf`), and as the package esm calls them (`esmc_600m`, `esmc-600m-2024-12`).
    """
    if Path(model).exists():
        return model
    name = _OWNERS.sub("", model).lower()
    of_esm_c = name.replace("_", "-").removesuffix("-hf").removesuffix("-2024-12")
    return SIZES.get(model.upper()) or _NAMES.get(name) or _NAMES.get(of_esm_c, model)


def is_path(model: str) -> bool:
    """Whether the `model` key names a path rather than an official checkpoint."""
    return "/" in model or model.endswith((".pt", ".pth")) or Path(model).exists()


def base_of(model: str, given: str | None = None) -> str | None:
    """What the adapter in a folder is to be merged into: `given`, or what its `adapter_config.json` names.

    An official name or a path; None if `model` is a whole one. Raises ValueError for a base that cannot be told, or is
    not on this machine.
    """
    folder = Path(model).expanduser()
    description = folder / "adapter_config.json"
    if not description.is_file() or any((folder / name).exists() for name in _WHOLE):
        if given:
            raise ValueError(f"base_model: {given} is given, but {model} is no adapter; leave base_model out")
        return None
    try:
        said = read_json(description).get("base_model_name_or_path")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{description}: not the settings of an adapter ({error}); fetch it again") from error
    named = given or said
    if not isinstance(named, str) or not named:
        raise ValueError(f"{description}: does not say which model was adapted; name it as base_model")
    base = official_name(named)
    if base in OFFICIAL_MODELS:
        return base
    for path in (Path(base).expanduser(), folder / base):
        if path.exists():
            return str(path)
    where = f"base_model: {named}" if given else f"{description}: base_model_name_or_path {named}"
    raise ValueError(f"{where} is neither an official name nor on this machine; name its path as base_model")


def files_of_checkpoint(model: str) -> list[str]:
    """The files that a checkpoint named by its path consists of; none for an official name.

    A folder's own time does not change when a file in it is overwritten.
    """
    if not is_path(model):
        return []
    path = Path(model).expanduser()
    if path.is_dir():
        return sorted(str(file) for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
    regression = path.with_name(f"{path.stem}-contact-regression.pt")
    return [str(path), *([str(regression)] if regression.exists() else [])]


def guess_model(model: str, model_info: str | os.PathLike[str] | None = None) -> ModelDimensions:
    """The model's dimensions: from `model.json` where it is there, else from the name, or the path."""
    if model_info is not None and Path(model_info).exists():
        return ModelDimensions(**read_json(Path(model_info))["dimensions"])
    if not is_path(model):
        return OFFICIAL_MODELS[model]
    path = Path(model).expanduser()
    if path.stem in OFFICIAL_MODELS:
        return OFFICIAL_MODELS[path.stem]
    try:
        return _described(read_json(path / "config.json"))
    except (OSError, ValueError, KeyError):
        # A folder may have its weights in both forms, of which one is read.
        forms = [[path]] if path.is_file() else [path.glob("*.safetensors"), path.glob("*.bin")]
        size = max(sum(file.stat().st_size for file in files) for files in forms)
    # In fp32, as all but the largest are stored; of those half the size says enough to tell them from the others.
    of_esm2 = [OFFICIAL_MODELS[name] for name in SIZES.values()]
    return next((dimensions for dimensions in of_esm2 if dimensions.parameters >= 0.9 * size / 4), of_esm2[-1])


def _described(config: Mapping[str, Any]) -> ModelDimensions:
    """As a Hugging Face folder's `config.json` says. Raises KeyError for one that says too little."""
    if str(config.get("model_type", "")).lower() == "esmc":
        # Named as in the first repositories, or as transformers names them.
        names = ("n_layers", "num_hidden_layers"), ("d_model", "hidden_size"), ("n_heads", "num_attention_heads")
        layers, hidden, heads = (config[old] if old in config else config[new] for old, new in names)
        width = config.get("intermediate_size") or swiglu_width(hidden)
        return ModelDimensions(layers, hidden, heads, True, False, ESMC.name, width)
    shape = config["num_hidden_layers"], config["hidden_size"], config["num_attention_heads"]
    if config.get("position_embedding_type") != "absolute":
        return ModelDimensions(*shape, True, True)
    family = ESM1B if config.get("emb_layer_norm_before") else ESM1V
    return ModelDimensions(*shape, True, family.contacts, family.name, positions=1024)


def swiglu_width(hidden: int) -> int:
    """The feed-forward width of ESM C where no configuration says it: 8/3 of the width, up to a multiple of 256."""
    return -(-8 * hidden // (3 * 256)) * 256
