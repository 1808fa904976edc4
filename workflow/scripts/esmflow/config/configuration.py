"""Check the configuration and the sample sheet before anything runs: a complaint names the key and says what to do."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jsonschema
import yaml
from jsonschema.exceptions import ValidationError

from esmflow.arrays import resolve_layers
from esmflow.checkpoint.sources import OFFICIAL_MODELS, is_path
from esmflow.collect.formats import check_formats
from esmflow.errors import EsmflowError
from esmflow.files import read_json
from esmflow.method import LongSequences


class ConfigurationError(EsmflowError):
    """Something in the configuration or the sample sheet is wrong. The message names the key or the line."""


def validated(config: Mapping[str, Any], schema_path: str | os.PathLike[str]) -> dict[str, Any]:
    """The configuration with defaults filled in. Raises ConfigurationError for the first thing that is wrong."""
    schema = yaml.safe_load(Path(schema_path).read_text(encoding="utf-8"))
    complete = with_defaults(config, schema)
    errors = sorted(jsonschema.Draft202012Validator(schema).iter_errors(complete), key=lambda e: list(map(str, e.path)))
    if errors:
        raise ConfigurationError("; ".join(_sentence(error, schema) for error in errors))
    _check_model(complete)
    try:
        check_formats(complete["formats"], complete["include"])
    except ValueError as error:
        raise ConfigurationError(str(error)) from error
    return complete


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
    if error.validator == "anyOf":
        return f"{key}: {error.instance!r} is not possible. {error.schema['description']}"
    return f"{key or 'config'}: {error.message}"


def _check_model(config: Mapping[str, Any]) -> None:
    """What the schema cannot say: the model is known, and has the layers asked for (as far as can be told by now)."""
    model = str(config["model"])
    if is_path(model):
        if not Path(model).expanduser().exists():
            raise ConfigurationError(f"model: {model} does not exist; give a .pt file, a Hugging Face folder or a name")
    elif model not in OFFICIAL_MODELS:
        close = difflib.get_close_matches(model, OFFICIAL_MODELS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"the names are {', '.join(OFFICIAL_MODELS)}"
        raise ConfigurationError(f"model: {model} is not an ESM-2 model and not a path; {hint}")
    if config["long_sequences"] == "window":
        _check_windows(config)
    layers = number_of_layers(model)
    if layers is not None:
        try:
            resolve_layers(config["layers"], layers)
        except ValueError as error:
            raise ConfigurationError(str(error)) from error


def _check_windows(config: Mapping[str, Any]) -> None:
    whole = sorted({"contacts", "logits"} & set(config["include"]))
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
        named = re.match(r"esm2_t(\d+)_", model)
        return int(named.group(1)) if named else None
    description = Path(model).expanduser() / "config.json"
    try:
        layers = read_json(description).get("num_hidden_layers")
    except (OSError, ValueError, AttributeError):
        return None
    return layers if isinstance(layers, int) else None
