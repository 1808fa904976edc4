"""Which models there are: what sets each family apart, the published sizes, and what a `model` key means.

The rules import this, in environments without torch.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from esmflow.arrays import OF_HEAD
from esmflow.files import read_json

EPSILON = 1e-5
"""Of every norm, in every family."""


@dataclass(frozen=True)
class Family:
    """What sets one family apart from the others: its weights are checked, arranged and run by this alone.

    What is not said here is the same in all: transformer layers with a norm before each of their two parts, cls before
    and eos after the residues, and the 33 tokens of ESM-2 (31 means something else in some).

    embedding_rows: of the token embedding; beyond the 33 tokens they are padding. embedding_scale: what it is
    multiplied with where no token is masked. rotary: whether queries and keys are turned by their positions; learned
    positions are added to the tokens otherwise. norm_before: whether there is a norm before the first layer.
    biases: whether linear layers and the norm after the last layer have them. query_key_norms: whether queries and keys
    are normalised, over all heads together, before they are turned. gate: whether the feed-forward part is SiLU of one
    product times another (SwiGLU), instead of GELU of one. branch_depth: the number of layers at which what a layer
    adds to the residual stream is added as it is; with L it is divided by sqrt(L / branch_depth). None: always as it
    is. tied_head: whether the decoder of the language model head is the token embedding. eight_bits: whether products
    of 8 bits were measured with it.
    """

    name: str
    embedding_rows: int
    embedding_scale: float
    rotary: bool
    norm_before: bool
    biases: bool
    query_key_norms: bool
    gate: bool
    branch_depth: int | None
    tied_head: bool
    eight_bits: bool


ESM2 = Family(
    name="ESM-2",
    embedding_rows=33,
    # Trained with 15% of tokens chosen and 80% of those masked: without masks, embeddings shrink by this.
    embedding_scale=1 - 0.15 * 0.8,
    rotary=True,
    norm_before=False,
    biases=True,
    query_key_norms=False,
    gate=False,
    branch_depth=None,
    tied_head=True,
    eight_bits=True,
)
FAMILIES = {family.name: family for family in (ESM2,)}


@dataclass(frozen=True)
class ModelDimensions:
    """The family and the shape of a model, read from its tensors and never from its name."""

    layers: int
    hidden: int
    heads: int
    has_lm_head: bool
    has_contact_head: bool
    family_name: str = ESM2.name

    @property
    def family(self) -> Family:
        """What sets its arithmetic apart."""
        return FAMILIES[self.family_name]

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden // self.heads

    @property
    def feed_forward(self) -> int:
        """Width of a layer's feed-forward part."""
        return 4 * self.hidden

    @property
    def layer_parameters(self) -> int:
        """Weights of one layer's matrices: those of q, k, v and output, and the feed-forward part's."""
        return 4 * self.hidden**2 + 2 * self.hidden * self.feed_forward

    @property
    def parameters(self) -> int:
        """Weights of the model: its layers' matrices, and the token embedding."""
        return self.layers * self.layer_parameters + self.family.embedding_rows * self.hidden


def check_heads(include: Collection[str], dimensions: ModelDimensions) -> None:
    """Raises ValueError when something is asked for whose head the checkpoint does not hold."""
    if "contacts" in include and not dimensions.has_contact_head:
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


OFFICIAL_MODELS = {
    "esm2_t6_8M_UR50D": ModelDimensions(6, 320, 20, True, True),
    "esm2_t12_35M_UR50D": ModelDimensions(12, 480, 20, True, True),
    "esm2_t30_150M_UR50D": ModelDimensions(30, 640, 20, True, True),
    "esm2_t33_650M_UR50D": ModelDimensions(33, 1280, 20, True, True),
    "esm2_t36_3B_UR50D": ModelDimensions(36, 2560, 40, True, True),
    "esm2_t48_15B_UR50D": ModelDimensions(48, 5120, 40, True, True),
}
"""The published checkpoints, from the smallest to the largest."""

SIZES = {name.split("_")[2]: name for name in OFFICIAL_MODELS}
"""The same by their size alone, `8M` to `15B`."""


# The files, or their index, by which a folder is that of a whole model.
_WHOLE = [f"{name}{index}" for name in ("model.safetensors", "pytorch_model.bin") for index in ("", ".index.json")]


def official_name(model: str) -> str:
    """The published models by fair-esm's name: `650M`, and `facebook/esm2_…` as on Hugging Face; others as they are."""
    name = SIZES.get(model.upper(), model.removeprefix("facebook/"))
    return name if name in OFFICIAL_MODELS and not Path(model).exists() else model


def is_path(model: str) -> bool:
    """Whether the `model` key names a path rather than an official checkpoint."""
    return "/" in model or model.endswith(".pt") or Path(model).exists()


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
        named = given or read_json(description).get("base_model_name_or_path")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{description}: not the settings of an adapter ({error}); fetch it again") from error
    if not isinstance(named, str) or not named:
        raise ValueError(f"{description}: does not say which model was adapted; name it as base_model")
    base = official_name(named)
    if base in OFFICIAL_MODELS:
        return base
    for path in (Path(base).expanduser(), folder / base):
        if path.exists():
            return str(path)
    said = f"base_model: {named}" if given else f"{description}: base_model_name_or_path {named}"
    raise ValueError(f"{said} is neither an official name nor on this machine; name its path as base_model")


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
        found = read_json(path / "config.json")
        return ModelDimensions(
            found["num_hidden_layers"], found["hidden_size"], found["num_attention_heads"], True, True
        )
    except (OSError, ValueError, KeyError):
        # A folder may have its weights in both forms, of which one is read.
        forms = [[path]] if path.is_file() else [path.glob("*.safetensors"), path.glob("*.bin")]
        size = max(sum(file.stat().st_size for file in files) for files in forms)
    # In fp32, as all but the largest are stored; of those half the size says enough to tell them from the others.
    fitting = [dimensions for dimensions in OFFICIAL_MODELS.values() if dimensions.parameters >= 0.9 * size / 4]
    return fitting[0] if fitting else OFFICIAL_MODELS["esm2_t48_15B_UR50D"]
