"""Check the configuration and the sample sheet before anything runs: a complaint names the key and says what to do."""

from __future__ import annotations

import csv
import difflib
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jsonschema
import yaml
from jsonschema.exceptions import ValidationError

from esmflow.checkpoint_sources import OFFICIAL_NAMES, is_path
from esmflow.engine import resolve_layers
from esmflow.engines import ARITHMETIC
from esmflow.errors import EsmflowError
from esmflow.fasta import fasta_stem
from esmflow.files import read_json
from esmflow.fingerprint import METHOD_VERSION
from esmflow.formats import FORMATS, check_formats
from esmflow.inputs import InputError, expand, is_glob
from esmflow.planning import InputFile
from esmflow.sequence_tables import TableError, check_columns, is_table
from esmflow.windows import window_starts


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


def computing_method(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a validated configuration that changes numbers, and the method itself.

    All of it goes into the fingerprint. A rule that has it as a parameter runs again when any of it changes.
    """
    cut = config["long_sequences"] in ("truncate", "window")
    return {
        "layers": config["layers"],
        "include": config["include"],
        "per_residue_precision": config["per_residue_precision"],
        "engine": config["engine"],
        "arithmetic": ARITHMETIC[config["engine"]],
        "precision": config["precision"],
        "long_sequences": config["long_sequences"],
        "max_residues": config["max_residues"] if cut else None,
        "window_overlap": config["window_overlap"] if config["long_sequences"] == "window" else None,
        "invalid_residues": config["invalid_residues"],
        "method_version": METHOD_VERSION,
    }


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
    elif model not in OFFICIAL_NAMES:
        close = difflib.get_close_matches(model, OFFICIAL_NAMES, n=1)
        hint = f"did you mean {close[0]}?" if close else f"the names are {', '.join(OFFICIAL_NAMES)}"
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
        window_starts(1, config["max_residues"], config["window_overlap"])
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


def read_samples(samples: str, formats: Sequence[str] = ()) -> list[InputFile]:
    """The input files: those of a sample sheet (TSV with the columns `sample` and `fasta`), or those a glob matches.

    In a sheet too, `fasta` may be a folder or a glob. Raises ConfigurationError for a sheet that is missing or
    malformed, a file that does not exist, a table without its columns, a sample or a file that is listed twice, and two
    files that would write one output.
    """
    if is_glob(samples):
        files = [InputFile(fasta_stem(path), path) for path in _expand(samples, "samples")]
    else:
        files = _read_sheet(samples)
    paths = [os.path.normpath(file.path) for file in files]
    _refuse_repeats(paths, "{samples}: the file {name} is listed twice; remove one", samples)
    missing = [file.path for file in files if not os.path.isfile(file.path)]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise ConfigurationError(f"{samples}: fasta: {missing[0]} does not exist{more}; correct the path")
    for file in files:
        if is_table(file.path):
            try:
                check_columns(file.path)
            except TableError as error:
                raise ConfigurationError(f"{samples}: fasta: {error}") from error
    named = [name for name in formats if FORMATS[name].named_after_inputs]
    if named:
        _refuse_repeats(
            [fasta_stem(file.path) for file in files],
            "{samples}: two files would both be written under the name {name}; rename one, "
            f"or leave {' and '.join(named)} out of formats",
            samples,
        )
    return files


def _read_sheet(path: str) -> list[InputFile]:
    try:
        with open(path, newline="", encoding="utf-8-sig") as handle:
            rows = csv.DictReader(handle, delimiter="\t")
            columns = rows.fieldnames or []
            if not {"sample", "fasta"} <= set(columns):
                found = ", ".join(columns) or "none"
                raise ConfigurationError(
                    f"{path}: needs the tab-separated columns sample and fasta; its first line has: {found}"
                )
            lines = [(n, (row["sample"] or "").strip(), (row["fasta"] or "").strip()) for n, row in enumerate(rows, 2)]
    except OSError as error:
        raise ConfigurationError(
            f"samples: {path} cannot be read ({error.strerror}); "
            "give a TSV file with the columns sample and fasta, or a glob"
        ) from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise ConfigurationError(
            f"samples: {path} is not a text file in UTF-8 ({error}); save it as tab-separated UTF-8 text"
        ) from error
    lines = [line for line in lines if (line[1] or line[2]) and not line[1].startswith("#")]
    if not lines:
        raise ConfigurationError(f"{path}: lists no sample")
    files = []
    for number, sample, fasta in lines:
        if not sample or not fasta:
            raise ConfigurationError(f"{path}, line {number}: sample and fasta must both be filled in")
        files += [InputFile(sample, file) for file in _expand(fasta, f"{path}, line {number}: fasta")]
    names = [sample for _, sample, _ in lines]
    _refuse_repeats(names, "{samples}: sample {name} is listed twice; give each its own name", path)
    return files


def _expand(place: str, where: str) -> list[str]:
    try:
        return expand(place)
    except InputError as error:
        raise ConfigurationError(f"{where}: {error}") from error


def _refuse_repeats(names: Sequence[str], message: str, samples: str) -> None:
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise ConfigurationError(message.format(samples=samples, name=repeated[0]))
