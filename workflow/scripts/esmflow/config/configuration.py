"""Check the configuration and the sample sheet before anything runs: a complaint names the key and says what to do."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jsonschema
import yaml
from jsonschema.exceptions import ValidationError

from esmflow.arrays import ATTENTION, resolve_layers
from esmflow.checkpoint.models import (
    OFFICIAL_MODELS,
    SIZES,
    base_of,
    check_method,
    guess_model,
    is_path,
    official_name,
)
from esmflow.collect.formats import check_formats
from esmflow.errors import EsmflowError
from esmflow.files import read_json
from esmflow.method import LongSequences

# What other programs call these values.
_SYNONYMS = {
    **dict.fromkeys(("float16", "half", "f16", "16"), "fp16"),
    **dict.fromkeys(("bfloat16", "16-mixed"), "bf16"),
    **dict.fromkeys(("i8", "8bit", "8-bit", "8", "w8a8"), "int8"),
    **dict.fromkeys(("float32", "float", "full", "single", "32", "f32"), "fp32"),
    **dict.fromkeys(("per_tok", "per_token", "per_aa", "residue", "token", "residues"), "per_residue"),
    **dict.fromkeys(("cls", "bos_token", "cls_token"), "bos"),
    **dict.fromkeys(("average", "avg", "pooled", "mean_pooling", "pooler"), "mean"),
    **dict.fromkeys(("maximum", "max_pooling"), "max"),
    **dict.fromkeys(("stdev", "sd", "standard_deviation"), "std"),
    **dict.fromkeys(("perplexity", "ppl", "pppl", "pll"), "pseudo_perplexity"),
    **dict.fromkeys(("hdf5", "hdf"), "h5"),
    **dict.fromkeys(("anndata", "adata"), "h5ad"),
    **dict.fromkeys(("torch", "pth", "tensor", "virnucpro"), "pt"),
    **dict.fromkeys(("fair-esm", "fair_esm", "extract"), "esm"),
    **dict.fromkeys(("numpy", "np"), "npy"),
    **dict.fromkeys(("gpu", "nvidia"), "cuda"),
    **dict.fromkeys(("x", "replace", "mask"), "replace_with_x"),
    **dict.fromkeys(("drop", "skip", "discard"), "reject"),
    **dict.fromkeys(("strip", "ungap", "delete"), "remove"),
    **dict.fromkeys(("windows", "sliding_window", "chunk", "split"), "window"),
    **dict.fromkeys(("cut", "crop"), "truncate"),
}


class ConfigurationError(EsmflowError):
    """Something in the configuration or the sample sheet is wrong. The message names the key or the line."""


def validated(config: Mapping[str, Any], schema_path: str | os.PathLike[str]) -> dict[str, Any]:
    """The configuration with defaults filled in. Raises ConfigurationError for what is wrong with it.

    A value that can mean one thing only is taken for that: `true` as text, as `--config` gives it, or one layer without
    its list.
    """
    schema = yaml.safe_load(Path(schema_path).read_text(encoding="utf-8"))
    complete = with_defaults(_meant(config, schema), schema)
    errors = sorted(jsonschema.Draft202012Validator(schema).iter_errors(complete), key=lambda e: list(map(str, e.path)))
    if errors:
        raise ConfigurationError("; ".join(_sentence(error, schema) for error in errors))
    complete["model"] = official_name(str(complete["model"]))
    _check_model(complete)
    try:
        # From here on it is known where the adapter's own settings name it, too.
        complete["base_model"] = base_of(complete["model"], complete["base_model"])
    except ValueError as error:
        raise ConfigurationError(str(error)) from error
    _check_layers(complete)
    if ATTENTION in complete["include"]:
        _check_attention(complete)
    _check_id(complete["id"])
    _check_variants(complete)
    try:
        check_formats(complete["formats"], complete["include"])
    except ValueError as error:
        raise ConfigurationError(str(error)) from error
    return complete


def _meant(value: Any, rule: Mapping[str, Any]) -> Any:
    """A value as its rule in the schema wants it, where it is not that and can mean one thing only; else itself."""
    kinds = {kind for each in rule.get("anyOf", [rule]) for kind in _listed(each.get("type"))}
    if isinstance(value, str) and value[:1] in ("[", "{") and kinds & {"array", "object"}:
        try:
            value = yaml.safe_load(value)
        except yaml.YAMLError:
            return value
    if "object" in kinds and isinstance(value, Mapping):
        rules = rule.get("properties", {})
        return {key: _meant(each, rules.get(key, {})) for key, each in value.items()}
    if "array" in kinds and value is not None:
        several = value if isinstance(value, list) else value.split(",") if isinstance(value, str) else [value]
        return [_meant(each.strip() if isinstance(each, str) else each, rule["items"]) for each in several]
    if isinstance(value, str):
        if "boolean" in kinds and value.lower() in ("true", "false"):
            return value.lower() == "true"
        if "null" in kinds and value.lower() in ("null", "none"):
            return None
        for kind, convert in (("integer", int), ("number", float)):
            if kind in kinds:
                try:
                    return convert(value)
                except ValueError:
                    pass
    return value


def _listed(kinds: str | list[str] | None) -> list[str]:
    return kinds if isinstance(kinds, list) else [kinds] if kinds else []


def with_defaults(values: Mapping[str, Any], schema: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `values` in which every key that is missing has its schema's default, nested keys too."""
    complete = dict(values)
    for key, rule in schema.get("properties", {}).items():
        if "default" in rule:
            complete.setdefault(key, rule["default"])
        if rule.get("type") == "object" and isinstance(complete.get(key), Mapping):
            complete[key] = with_defaults(complete[key], rule)
    return complete


def _sentence(error: ValidationError, schema: Mapping[str, Any]) -> str:
    key = ".".join(str(part) for part in error.absolute_path)
    if error.validator == "additionalProperties":
        known = sorted(error.schema["properties"])
        unknown = sorted(set(error.instance) - set(known))
        close = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"the keys are {', '.join(known)}"
        where = f"{key}." if key else ""
        return f"{where}{unknown[0]}: there is no such key in the configuration; {hint}"
    if error.validator == "enum":
        meant = _SYNONYMS.get(str(error.instance).lower())
        close = (
            [meant] if meant else difflib.get_close_matches(str(error.instance), map(str, error.validator_value), n=1)
        )
        hint = f"; did you mean {close[0]}?" if close and close[0] in error.validator_value else ""
        return f"{key}: {error.instance!r} is not one of {', '.join(map(str, error.validator_value))}{hint}"
    if error.validator == "type" and error.validator_value == "object":
        rules = error.schema.get("properties", {})
        fits = [name for name, rule in rules.items() if error.instance in rule.get("enum", [])]
        form = f"{{{fits[0]}: {error.instance}}}" if fits else f"a mapping with the keys {', '.join(rules)}"
        return f"{key}: {error.instance!r} is no mapping; write {key}: {form}"
    if error.validator == "anyOf":
        return f"{key}: {error.instance!r} is not possible. {error.schema['description']}"
    return f"{key or 'config'}: {error.message}"


def _check_model(config: Mapping[str, Any]) -> None:
    """What the schema cannot say: the model is known, and has the layers asked for (as far as can be told by now)."""
    model = str(config["model"])
    if is_path(model):
        if not Path(model).expanduser().exists():
            stem = Path(model).name.removesuffix(".pt")
            hint = (
                f"did you mean the name {stem}, which is looked for and downloaded?"
                if stem in OFFICIAL_MODELS
                else ("give a .pt file, a Hugging Face folder or a name")
            )
            raise ConfigurationError(f"model: {model} does not exist; {hint}")
    elif model not in OFFICIAL_MODELS:
        close = difflib.get_close_matches(model, [*SIZES, *OFFICIAL_MODELS], n=1)
        hint = f"did you mean {close[0]}?" if close else f"the names are {', '.join([*SIZES, *OFFICIAL_MODELS])}"
        raise ConfigurationError(f"model: {model} is no known model and not a path; {hint}")
    else:
        try:
            check_method(config, OFFICIAL_MODELS[model])
        except ValueError as error:
            raise ConfigurationError(str(error)) from error
    if (config["engine"], config["precision"]) == ("reference", "int8"):
        raise ConfigurationError("precision: int8 is for engine: packed; for engine: reference take bf16, fp16 or fp32")
    if config["long_sequences"] == "window":
        _check_windows(config)


def _check_layers(config: Mapping[str, Any]) -> None:
    layers = number_of_layers(config["base_model"] or config["model"])
    if layers is not None:
        try:
            resolve_layers(config["layers"], layers)
        except ValueError as error:
            raise ConfigurationError(str(error)) from error


def _check_attention(config: Mapping[str, Any]) -> None:
    """Attention maps are for short sequences: the others must not come so far."""
    most, longest = config["attention"]["max_residues"], config["max_residues"]
    if config["long_sequences"] == "whole" or longest > most:
        # Few runs need it, and a dry run should load little.
        from esmflow.text import bytes_in_words

        model = guess_model(config["base_model"] or config["model"])
        size = 4 * model.heads * (longest + 2) ** 2
        raise ConfigurationError(
            f"include: attention is for sequences of up to {most} residues (attention.max_residues): the maps of one "
            f"layer of a sequence of {longest} residues take {bytes_in_words(size)}. Set max_residues: {most} and "
            "long_sequences: reject, which leaves longer ones out, or truncate; or raise attention.max_residues"
        )


def _check_id(rule: str) -> None:
    if rule == "first_word":
        return
    # Few runs need it, and a dry run should load little.
    from esmflow.inputs.ids import ACCESSION, FIRST_WORD, IdError, id_pattern

    try:
        id_pattern(rule)
    except IdError as error:
        close = difflib.get_close_matches(rule, (FIRST_WORD, ACCESSION), n=1)
        raise ConfigurationError(f"id: {error}" + (f"; did you mean {close[0]}?" if close else "")) from error


def _check_variants(config: dict[str, Any]) -> None:
    if not config["variants"]:
        return
    from esmflow.inputs.sheet import WILDCARD
    from esmflow.variants.head import VariantTableError, head_of

    if WILDCARD.search(config["variants"]):
        raise ConfigurationError(
            f"variants: the name {config['variants']} has braces or angle brackets around a word, which Snakemake "
            "takes for a wildcard; rename it"
        )
    config["variants"] = os.path.expanduser(config["variants"])
    try:
        head_of(config["variants"])
    except VariantTableError as error:
        raise ConfigurationError(str(error)) from error


def _check_windows(config: Mapping[str, Any]) -> None:
    whole = sorted({"contacts", "logits", ATTENTION} & set(config["include"]))
    if whole:
        raise ConfigurationError(
            f"long_sequences: {' and '.join(whole)} cannot be put together from windows; "
            "set long_sequences to truncate or whole, or leave them out of include"
        )
    try:
        LongSequences.configured(config)
    except ValueError as error:
        raise ConfigurationError(str(error)) from error


def number_of_layers(model: str) -> int | None:
    """How many layers a model has, if that can be told without opening its weights."""
    if not is_path(model):
        return OFFICIAL_MODELS[model].layers if model in OFFICIAL_MODELS else None
    description = Path(model).expanduser() / "config.json"
    try:
        layers = read_json(description).get("num_hidden_layers")
    except (OSError, ValueError, AttributeError):
        return None
    return layers if isinstance(layers, int) else None
