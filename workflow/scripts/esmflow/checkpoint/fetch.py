"""Fetch a model: find its checkpoint, convert it, and see that it has what is asked of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from esmflow.arrays import resolve_layers
from esmflow.checkpoint.convert import convert_checkpoint
from esmflow.checkpoint.file import CheckpointError
from esmflow.checkpoint.models import check_heads
from esmflow.checkpoint.sources import find_checkpoint


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """Which model to fetch, and what it must have.

    model: a name or a path. folder: where official checkpoints are looked for first, if anywhere. download: whether one
    that is not here may be downloaded. layers, include: as configured. checkpoint, info: files to write.
    """

    model: str
    folder: str | None
    download: bool
    layers: Sequence[int]
    include: Sequence[str]
    checkpoint: str
    info: str


def fetch_model(settings: ModelSettings) -> None:
    """Writes the converted checkpoint and `model.json`.

    Raises CheckpointError when it cannot be found or converted, or lacks a layer or a head that is asked for.
    """
    source = find_checkpoint(settings.model, settings.folder, settings.download)
    info = convert_checkpoint(source, Path(settings.checkpoint), name=source.stem)
    try:
        resolve_layers(settings.layers, info.dimensions.layers)
        check_heads(settings.include, info.dimensions)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    info.write(settings.info)
