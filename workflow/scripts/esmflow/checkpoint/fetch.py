"""Fetch a model: find its checkpoint, and convert it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from esmflow.checkpoint.convert import convert_checkpoint
from esmflow.checkpoint.sources import find_checkpoint


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """Which model to fetch.

    model: a name or a path. base: of the model to merge it into, if it is an adapter. folder: where official
    checkpoints are looked for first, if anywhere. download: whether one that is not here may be downloaded. checkpoint,
    info: files to write.
    """

    model: str
    base: str | None
    folder: str | None
    download: bool
    checkpoint: str
    info: str


def fetch_model(settings: ModelSettings) -> None:
    """Writes the converted checkpoint and `model.json`. Raises CheckpointError when it cannot be found or converted."""
    source = find_checkpoint(settings.model, settings.folder, settings.download)
    base = find_checkpoint(settings.base, settings.folder, settings.download) if settings.base else None
    convert_checkpoint(source, Path(settings.checkpoint), source.stem, base).write(settings.info)
