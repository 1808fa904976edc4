"""What every output format has in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Description:
    """What the vectors of one output are: written into formats that can hold it.

    array: `{mean,bos,per_residue}_layer{n}`. precision: what was used, as configured and as it came out.
    """

    array: str
    model: str
    layer: int
    pooling: str
    precision: str
    fingerprint: str
    versions: dict[str, str]

    @property
    def per_residue(self) -> bool:
        """Whether there is one vector for each residue, instead of one for each record."""
        return self.pooling == "per_residue"


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
        """Adds embedded records. vectors: fp32 `[N, D]`, or `[sum of lengths, D]` for per-residue outputs."""

    @abstractmethod
    def close(self) -> None:
        """Finishes what is open; every file is complete afterwards."""
