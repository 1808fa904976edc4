"""The vectors of a few sequences in a notebook: the engine of the workflow, without a run."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload
from warnings import warn

import numpy as np
import pyarrow as pa

from esmflow.arrays import ATTENTION, Array, Outputs, resolve_layers
from esmflow.checkpoint.file import CheckpointError, read_checkpoint_info
from esmflow.checkpoint.models import ModelDimensions, check_method, files_of_checkpoint
from esmflow.checkpoint.sources import find_checkpoint
from esmflow.config.configuration import validated
from esmflow.errors import EsmflowError
from esmflow.failures import REMEDY, Reason
from esmflow.files import LEFT_OVER_SECONDS, PROJECT, file_stamp, remove_left_overs, safe_name
from esmflow.inputs.columns import ID, SEQUENCE
from esmflow.inputs.records import RecordBlock
from esmflow.inputs.residues import ResiduePolicy
from esmflow.inputs.tables import read_batch
from esmflow.method import LongSequences
from esmflow.text import plural

if TYPE_CHECKING:
    from esmflow.engine.engine import Engine

# Keys of the configuration that are about numbers and about finding the model; the others are about runs.
SETTINGS = (
    *("base_model", "model_folder", "download", "device", "batch_tokens", "engine", "precision"),
    *("per_residue_precision", "long_sequences", "max_residues", "window_overlap"),
    *("invalid_residues", "nucleotide_sequences", "gaps", "attention"),
)
_NAMED = 5
Kind = Literal[
    "mean", "bos", "max", "std", "pseudo_perplexity", "per_residue", "contacts", "logits", "entropy", "attention"
]


class SequencesError(EsmflowError):
    """Sequences that cannot be embedded. The message names them, says why, and what to do."""


@overload
def embed(
    sequences: Mapping[str, str],
    model: str | os.PathLike[str] = ...,
    *,
    kind: Kind = ...,
    layer: int = ...,
    **settings: Any,
) -> dict[str, np.ndarray]: ...


@overload
def embed(
    sequences: Iterable[str],
    model: str | os.PathLike[str] = ...,
    *,
    kind: Literal["mean", "bos", "max", "std", "pseudo_perplexity"] = ...,
    layer: int = ...,
    **settings: Any,
) -> np.ndarray: ...


@overload
def embed(
    sequences: Iterable[str],
    model: str | os.PathLike[str] = ...,
    *,
    kind: Literal["per_residue", "contacts", "logits", "entropy", "attention"],
    layer: int = ...,
    **settings: Any,
) -> list[np.ndarray]: ...


def embed(
    sequences: Mapping[str, str] | Iterable[str],
    model: str | os.PathLike[str] = "650M",
    *,
    kind: str = "mean",
    layer: int = -1,
    **settings: Any,
) -> dict[str, np.ndarray] | np.ndarray | list[np.ndarray]:
    """Embeds sequences with the workflow's engine: the same numbers as a run, on a GPU if there is one, else the CPU.

    sequences: a list of residue strings, or a dict of them by id. model: `8M` to `15B`, another official name, or a
    path. kind: `mean`, `bos`, `max` or `std`, one vector `[D]` for each sequence; `pseudo_perplexity`, one number;
    `per_residue` `[residues, D]`; `logits` `[residues, 33]`; `entropy` `[residues]`; `contacts` `[residues, residues]`;
    `attention` `[heads, residues + 2, residues + 2]`, with `max_residues=256` or less.
    layer: 0 is the token embedding, -1 the last.
    settings: keys of the configuration that change numbers or say where the model is, such as `precision="fp32"`,
    `long_sequences="window"` or `download=False`. Sequences are normalised, and cut at 1,022 residues with a warning,
    as in a run.

    Returns a dict by id for a dict; for a list a matrix `[N, D]`, numbers `[N]`, or a list of arrays of several lengths. The
    model stays loaded for the next call. Raises SequencesError that names every sequence that the model cannot take.

    >>> esmflow.embed(["MKVLAAGIC", "GIVEQ"], model=model).shape
    (2, 320)
    >>> esmflow.embed({"insulin": "GIVEQ"}, model=model, kind="per_residue")["insulin"].shape
    (5, 320)
    >>> esmflow.embed(["MKV*LA"], model=model)
    Traceback (most recent call last):
    ...
    esmflow.python.vectors.SequencesError: sequence 0: '*' at residue 4 (invalid_residue: correct the sequence, or for J and stops inside set invalid_residues: replace_with_x)
    """  # noqa: E501
    if isinstance(sequences, str | bytes):
        raise SequencesError("give a list of sequences, or a dict of them by id; for a file there is `esmflow embed`")
    if not isinstance(sequences, Mapping):
        sequences = list(sequences)
    if not sequences:
        raise SequencesError("there is no sequence to embed")
    by_id = isinstance(sequences, Mapping)
    names = [str(name) for name in sequences] if by_id else []
    texts = list(sequences.values()) if isinstance(sequences, Mapping) else sequences
    config = _configured(os.fspath(model), kind, layer, settings)
    checkpoint, dimensions = _model(config)
    names = names or [f"sequence {number}" for number in range(len(texts))]
    block = _normalised(texts, names, ResiduePolicy.configured(config, dimensions.longest))
    engine = _load(config, checkpoint, dimensions)
    found = _extract(block, engine, config)
    if by_id:
        return dict(zip(sequences, found, strict=True))
    return np.stack(found) if engine.outputs.arrays()[0].is_pooled else found


def _configured(model: str, kind: str, layer: int, settings: Mapping[str, Any]) -> dict[str, Any]:
    others = sorted(set(settings) - set(SETTINGS))
    if others:
        raise SequencesError(f"{others[0]} is about runs, or no setting; what there is: {', '.join(SETTINGS)}")
    given = {"model": model, "include": [kind], "layers": [layer], "formats": ["npz"], **settings}
    return validated(given, PROJECT / "workflow" / "schemas" / "config.schema.yaml")


def _normalised(texts: Sequence[str], names: Sequence[str], policy: ResiduePolicy) -> RecordBlock:
    for name, text in zip(names, texts, strict=True):
        if not isinstance(text, str):
            raise SequencesError(f"{name}: a {type(text).__name__} is no text; give the residues as a string")
    columns = {ID: pa.array(names, pa.string()), SEQUENCE: pa.array([t.encode("utf-8", "replace") for t in texts])}
    block = read_batch("", 1, pa.record_batch({**columns, SEQUENCE: columns[SEQUENCE].cast(pa.binary())}), {}, policy)
    if block.reasons:
        wrong = sorted(block.reasons.items())
        said = [f"{names[i]}: {block.details.get(i, '')} ({reason.value}: {REMEDY[reason]})" for i, reason in wrong]
        more = f"; and {len(said) - _NAMED} more" if len(said) > _NAMED else ""
        raise SequencesError("; ".join(said[:_NAMED]) + more)
    return block


def _extract(block: RecordBlock, engine: Engine, config: Mapping[str, Any]) -> list[np.ndarray]:
    from tqdm import tqdm

    from esmflow.engine.extraction import extract_esm_features

    long = LongSequences.configured(config)
    cut = int((block.lengths > long.truncated_at).sum()) if long.truncated_at is not None else 0
    if cut:
        warn(
            f"{plural(cut, 'sequence')} of more than {long.truncated_at:,} residues cut there; long_sequences='window' "
            "or 'whole' embeds all of them",
            stacklevel=3,
        )
    digests = [digest.tobytes() for digest in block.digests]
    unique = {digest: record.sequence for digest, record in zip(digests, block.records(), strict=True)}
    budget = engine.default_token_budget() if config["batch_tokens"] == "auto" else config["batch_tokens"]
    residues = sum(long.embedded(len(sequence)) for sequence in unique.values())
    with tqdm(total=residues, unit=" residues", unit_scale=True, delay=2, leave=False) as bar:
        extraction = extract_esm_features(list(unique.items()), engine, budget, long=long, on_progress=bar.update)
    segment = extraction.segment
    if segment.failures:
        failure = segment.failures[0]
        name = block.ids[digests.index(bytes.fromhex(failure.digest))]
        raise SequencesError(f"{name}: {failure.detail} ({failure.reason}: {REMEDY[Reason(failure.reason)]})")
    array = engine.outputs.arrays()[0]
    values, offsets = segment.arrays[array.name], array.offsets(segment.lengths)
    rows = {digest.tobytes(): row for row, digest in enumerate(segment.digests)}
    return [_shaped(values[offsets[row] : offsets[row + 1]], array) for row in map(rows.__getitem__, digests)]


def _shaped(values: np.ndarray, array: Array) -> np.ndarray:
    if array.is_pooled:
        return values[0].copy()
    side = int(np.sqrt(len(values)))
    if array.kind == ATTENTION:
        return values.T.reshape(-1, side, side).copy()
    return values.reshape(side, side).copy() if array.kind == "contacts" else values.copy()


def _model(config: Mapping[str, Any]) -> tuple[str, ModelDimensions]:
    """The converted checkpoint, and what it is. Raises CheckpointError when it cannot do what is asked for."""
    where = config["model_folder"], config["download"]
    source = find_checkpoint(config["model"], *where)
    base = find_checkpoint(config["base_model"], *where) if config["base_model"] else None
    checkpoint = _converted(source, base)
    dimensions = read_checkpoint_info(checkpoint).dimensions
    try:
        check_method(config, dimensions)
        resolve_layers(config["layers"], dimensions.layers)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    return checkpoint, dimensions


def _load(config: Mapping[str, Any], checkpoint: str, dimensions: ModelDimensions) -> Engine:
    import torch

    device = config["device"]
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device == "cuda" and not torch.cuda.is_available():
        raise SequencesError("device: cuda, but torch sees no GPU here; set device to cpu, or leave it out")
    layers = resolve_layers(config["layers"], dimensions.layers)
    outputs = Outputs(layers, tuple(config["include"]), config["per_residue_precision"])
    return _loaded(config["engine"], checkpoint, outputs, config["precision"], device)


@lru_cache(1)
def _loaded(engine: str, checkpoint: str, outputs: Outputs, precision: str, device: str) -> Engine:
    from esmflow.engine import load_engine

    return load_engine(engine, checkpoint, outputs, precision, device)


def _converted(source: Path, base: Path | None) -> str:
    """The converted checkpoint, which is kept in the user's cache, since converting a large one takes a while."""
    from esmflow.checkpoint.convert import convert_checkpoint

    folder = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "esmflow"
    files = [file for path in filter(None, (source, base)) for file in files_of_checkpoint(str(path))]
    stamps = [str(number) for file in files for number in file_stamp(file)]
    name = safe_name("-".join([source.stem, *stamps]))
    target = folder / f"{name}.safetensors"
    if not target.exists():
        remove_left_overs([target], LEFT_OVER_SECONDS)
        convert_checkpoint(source, target, source.stem, base)
    return str(target)
