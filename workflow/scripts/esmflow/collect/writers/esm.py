"""`esm`: one `.pt` for each record, as fair-esm's extract script writes them. Layout: docs/formats.md."""

from __future__ import annotations

import csv
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from esmflow.collect.writers.base import Batch, Description, EmbeddingWriter
from esmflow.collect.writers.names import NameGiver
from esmflow.files import atomic_folder
from esmflow.inputs.sheet import fasta_stem

log = logging.getLogger(__name__)

_FIELDS = {"per_residue": "representations", "mean": "mean_representations", "bos": "bos_representations"}


class EsmWriter(EmbeddingWriter):
    """Fills a folder for each input file; the folder of all has its name when all of them are on disk."""

    by_file = True

    def __init__(self, folder: Path, descriptions: Sequence[Description]) -> None:
        super().__init__(folder, descriptions)
        self._target = atomic_folder(folder)
        self._temporary = self._target.__enter__()
        self._open: _Folder | None = None
        self._repeated = 0

    def begin_file(self, path: str) -> None:
        self._finish()
        self._open = _Folder(self._temporary / fasta_stem(path))

    def add(self, batch: Batch) -> None:
        assert self._open is not None
        values = {description.array: batch.values(description.array) for description in self.descriptions}
        for number, record in enumerate(batch.records.select(["record", "id", "description"]).to_pylist()):
            content: dict[str, Any] = {"label": f"{record['id']} {record['description']}".strip()}
            for description in self.descriptions:
                # Saving a view would save everything that it is a view of.
                tensor = torch.from_numpy(values[description.array][number].copy())
                if description.array.layer is None:
                    content[description.array.kind] = tensor
                else:
                    content.setdefault(_FIELDS[description.array.kind], {})[description.array.layer] = tensor
            self._open.write(record, content)

    def close(self) -> None:
        self._finish()
        self._target.__exit__(None, None, None)
        if self._repeated:
            log.warning(
                "%s: the ids of %d records occurred before in their file; they are in id~2.pt, id~3.pt and so on: "
                "see each index.tsv",
                *(self.folder, self._repeated),
            )

    def _finish(self) -> None:
        if self._open is not None:
            self._repeated += self._open.close()
            self._open = None


class _Folder:
    """The files of one input file's records, and `index.tsv`, which says whose each one is."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.mkdir()
        self._names = NameGiver(lambda name: os.path.exists(path / f"{name}.pt"))
        self._index = open(path / "index.tsv", "w", newline="", encoding="utf-8")
        self._rows = csv.writer(self._index, delimiter="\t", lineterminator="\n")
        self._rows.writerow(("record", "id", "file"))

    def write(self, record: dict[str, Any], content: dict[str, Any]) -> None:
        name = f"{self._names.name(record['id'])}.pt"
        torch.save(content, self._path / name)
        self._rows.writerow((record["record"], record["id"], name))

    def close(self) -> int:
        """Returns how many of its ids had occurred before."""
        self._index.close()
        return self._names.repeated
