"""What every output format has in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Description:
    """What the values of one output are: written into formats that can hold it.

    array: the output's name, such as `mean_layer36` or `contacts`. kind, layer: its two parts; contacts and logits are
    of the whole model and have no layer. precision: what was used; more than one if `auto` met different cards.
    """

    array: str
    model: str
    precision: str
    fingerprint: str
    versions: dict[str, str]

    @property
    def kind(self) -> str:
        return self.array.partition("_layer")[0]

    @property
    def layer(self) -> int | None:
        layer = self.array.partition("_layer")[2]
        return int(layer) if layer else None


class EmbeddingWriter(ABC):
    """Writes one output (one array of one run) in one format. Records come in input order, file by file."""

    def __init__(self, folder: Path, description: Description) -> None:
        self.folder = folder
        self.description = description

    @abstractmethod
    def begin_file(self, path: str) -> None:
        """The records that follow are of this input file."""

    @abstractmethod
    def add(self, ids: Sequence[str], vectors: np.ndarray, lengths: np.ndarray) -> None:
        """Adds embedded records.

        vectors: `[N, D]` for pooled outputs, else the records' rows end to end (see `engine.rows_per_sequence`).
        lengths: residues of each record, `[N]`.
        """

    @abstractmethod
    def close(self) -> None:
        """Finishes what is open; every file is complete afterwards."""
