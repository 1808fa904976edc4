"""`pt`: for each input file one `{stem}_ESM.pt`, as VirNucPro reads them.

`{'proteins': [id, …], 'data': [tensor, …]}`, in input order. A tensor is `[D]` for pooled outputs, `[residues, D]` for
per-residue ones, `[residues, 33]` for logits, `[residues, residues]` for contacts; fp32, or fp16 for per-residue
outputs that are stored so. Opens with `torch.load(path, weights_only=True)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from esmflow.engine import is_pooled, rows_per_sequence
from esmflow.fasta import fasta_stem
from esmflow.files import atomic_path
from esmflow.writers.base import Description, EmbeddingWriter


class PtWriter(EmbeddingWriter):
    """Holds one input file's vectors in memory and writes them when the next file begins."""

    def __init__(self, folder: Path, description: Description) -> None:
        super().__init__(folder, description)
        self._target: Path | None = None
        self._ids: list[str] = []
        self._tensors: list[torch.Tensor] = []

    def begin_file(self, path: str) -> None:
        self._write()
        self._target = self.folder / "pt" / pt_file_name(path)

    def add(self, ids: Sequence[str], vectors: np.ndarray, lengths: np.ndarray) -> None:
        block = torch.from_numpy(np.array(vectors))
        self._ids.extend(ids)
        # Views of one block: saved as one storage, where a storage for each record would be thousands of zip entries.
        if is_pooled(self.description.array):
            self._tensors.extend(block.unbind(0))
            return
        parts = block.split(rows_per_sequence(self.description.array, lengths).tolist())
        if self.description.kind == "contacts":
            parts = [part.view(n, n) for part, n in zip(parts, lengths.tolist(), strict=True)]
        self._tensors.extend(parts)

    def close(self) -> None:
        self._write()
        self._target = None

    def _write(self) -> None:
        if self._target is not None:
            with atomic_path(self._target) as temporary:
                torch.save({"proteins": self._ids, "data": self._tensors}, temporary)
        self._ids, self._tensors = [], []


def pt_file_name(path: str) -> str:
    """`viruses/a.faa.gz` gives `a_ESM.pt`."""
    return f"{fasta_stem(path)}_ESM.pt"
