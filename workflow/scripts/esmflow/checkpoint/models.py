"""Which models there are: what sets each family apart, the published sizes, and what a `model` key means.

The rules import this, in environments without torch.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from esmflow.arrays import OF_HEAD
from esmflow.files import read_json

EPSILON = 1e-5
"""Of every norm, in every family."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """What sets one family apart from the others: its weights are checked, arranged and run by this alone.

    What is not said here is the same in all: transformer layers with a norm before each of their two parts, cls before
    and eos after the residues, and the 33 tokens of ESM-2 (31 means something else in some).

    name, citation: as a paper says it. licence: of the published weights. owner: whose repositories they are in on
    Hugging Face. reference: what a certificate is computed with.

    embedding_rows: of the token embedding; beyond the 33 tokens they are padding. embedding_scale: what it is
    multiplied with where no token is masked. rotary: whether queries and keys are turned by their positions; learned
    positions are added to the tokens otherwise. norm_before: whether there is a norm before the first layer.
    biases: whether linear layers and the norm after the last layer have them. query_key_norms: whether queries and keys
    are normalised, over all heads together, before they are turned. gate: whether the feed-forward part is SiLU of one
    product times another (SwiGLU), instead of GELU of one. branch_depth: the number of layers at which what a layer
    adds to the residual stream is added as it is; with L it is divided by sqrt(L / branch_depth). None: always as it
    is. tied_head: whether the decoder of the language model head is the token embedding. contacts: whether a contact
    head was published. in_fair_esm: whether fair-esm has its module. eight_bits: whether products of 8 bits were
    measured with it.
    """

    name: str
    citation: str
    licence: str = "MIT"
    owner: str = "facebook"
    reference: str

    embedding_rows: int = 33
    # Trained with 15% of tokens chosen and 80% of those masked: without masks, embeddings shrink by this.
    embedding_scale: float = 1 - 0.15 * 0.8
    rotary: bool = True
    norm_before: bool = False
    biases: bool = True
    query_key_norms: bool = False
    gate: bool = False
    branch_depth: int | None = None
    tied_head: bool = True
    contacts: bool = True
    in_fair_esm: bool = True
    eight_bits: bool = False


ESM2 = Family(
    name="ESM-2",
    citation="Lin et al., 2023",
    reference="fair-esm's own ESM-2 module in fp32",
    eight_bits=True,
)
ESM1B = Family(
    name="ESM-1b",
    citation="Rives et al., 2021",
    reference="fair-esm's own ESM-1b module in fp32",
    rotary=False,
    norm_before=True,
)
ESM1V = replace(
    ESM1B,
    name="ESM-1v",
    citation="Meier et al., 2021",
    reference="fair-esm's own ESM-1v module in fp32",
    norm_before=False,
    contacts=False,
)
ESMC = Family(
    name="ESM C",
    citation="ESM Team, 2024",
    owner="biohub",
    reference="a plain implementation of ESM C in fp32, written apart from the engine",
    embedding_rows=64,
    embedding_scale=1.0,
    biases=False,
    query_key_norms=True,
    gate=True,
    branch_depth=36,
    tied_head=False,
    contacts=False,
    in_fair_esm=False,
)
FAMILIES = {family.name: family for family in (ESM2, ESM1B, ESM1V, ESMC)}


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
        raise ValueError(
            f"precision: int8 is made for and measured with ESM-2 only, and this model is {family.name}; "
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
