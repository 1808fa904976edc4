"""`esm` and `npz`: one file for each record, in a folder for each input file. Layouts: docs/formats.md."""

from __future__ import annotations

import csv
from abc import abstractmethod
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch

from esmflow.arrays import POOLED, Array
from esmflow.collect.writers.base import Batch, EmbeddingWriter
from esmflow.collect.writers.names import NameGiver, warn_of_repeated_ids
from esmflow.files import atomic_folder, safe_name

_FIELDS = {"per_residue": "representations", **{kind: f"{kind}_representations" for kind in POOLED}}


class RecordFilesWriter(EmbeddingWriter):
    """Fills a folder for each input file; the folder of all has its name when all of them are on disk."""

    by_file = True
    suffix = ""
    """Of each record's file."""

    def open(self) -> None:
        self._all = self.enter(atomic_folder(self.folder))
        self._index = self.enter(ExitStack())
        self._repeated = 0

    def begin_file(self, name: str) -> None:
        self._folder = folder = self._all / name
        folder.mkdir()
        self._names = NameGiver(lambda name: (folder / f"{name}{self.suffix}").exists())
        self._index.close()
        handle = self._index.enter_context(open(folder / "index.tsv", "w", newline="", encoding="utf-8"))
        self._rows = csv.writer(handle, delimiter="\t", lineterminator="\n")
        self._rows.writerow(("record", "id", "file"))

    def add(self, batch: Batch) -> None:
        values = [(array, batch.values(array)) for array in self.arrays]
        for number, record in enumerate(batch.records.select(["record", "id", "description"]).to_pylist()):
            name = f"{self._names.name(record['id'])}{self.suffix}"
            self._repeated += name != f"{safe_name(record['id'])}{self.suffix}"
            self.write(self._folder / name, record, {array: of_records[number] for array, of_records in values})
            self._rows.writerow((record["record"], record["id"], name))

    @abstractmethod
    def write(self, path: Path, record: dict[str, Any], values: dict[Array, np.ndarray]) -> None:
        """Writes one record's file."""

    def finish(self) -> None:
        warn_of_repeated_ids(
            self.folder,
            self._repeated,
            f" in their file; they are in id~2{self.suffix}, id~3{self.suffix} and so on: see each index.tsv",
        )


class EsmWriter(RecordFilesWriter):
    """As fair-esm's extract script writes them."""

    suffix = ".pt"

    def write(self, path: Path, record: dict[str, Any], values: dict[Array, np.ndarray]) -> None:
        content: dict[str, Any] = {"label": f"{record['id']} {record['description']}".strip()}
        for array, found in values.items():
            # Saving a view would save everything that it is a view of.
            tensor = torch.from_numpy(found.copy())
            if array.layer is None:
                content[array.kind] = tensor
            else:
                content.setdefault(_FIELDS[array.kind], {})[array.layer] = tensor
        torch.save(content, path)


class NpzWriter(RecordFilesWriter):
    """NumPy's archives, with an array for each output."""

    suffix = ".npz"

    def write(self, path: Path, record: dict[str, Any], values: dict[Array, np.ndarray]) -> None:
        with open(path, "wb") as file:
            np.savez(file, **{array.name: found for array, found in values.items()})  # type: ignore[arg-type]
