"""`esm`: one `.pt` for each record, as fair-esm's extract script writes them. Layout: docs/formats.md."""

from __future__ import annotations

import csv
from contextlib import ExitStack
from typing import Any

import torch

from esmflow.arrays import POOLED
from esmflow.collect.writers.base import Batch, EmbeddingWriter
from esmflow.collect.writers.names import NameGiver, warn_of_repeated_ids
from esmflow.files import atomic_folder, safe_name

_FIELDS = {"per_residue": "representations", **{kind: f"{kind}_representations" for kind in POOLED}}


class EsmWriter(EmbeddingWriter):
    """Fills a folder for each input file; the folder of all has its name when all of them are on disk."""

    by_file = True

    def open(self) -> None:
        self._all = self.enter(atomic_folder(self.folder))
        self._index = self.enter(ExitStack())
        self._repeated = 0

    def begin_file(self, name: str) -> None:
        self._folder = folder = self._all / name
        folder.mkdir()
        self._names = NameGiver(lambda name: (folder / f"{name}.pt").exists())
        self._index.close()
        handle = self._index.enter_context(open(folder / "index.tsv", "w", newline="", encoding="utf-8"))
        self._rows = csv.writer(handle, delimiter="\t", lineterminator="\n")
        self._rows.writerow(("record", "id", "file"))

    def add(self, batch: Batch) -> None:
        values = [(description, batch.values(description.array)) for description in self.descriptions]
        for number, record in enumerate(batch.records.select(["record", "id", "description"]).to_pylist()):
            content: dict[str, Any] = {"label": f"{record['id']} {record['description']}".strip()}
            for description, of_records in values:
                # Saving a view would save everything that it is a view of.
                tensor = torch.from_numpy(of_records[number].copy())
                if description.array.layer is None:
                    content[description.array.kind] = tensor
                else:
                    content.setdefault(_FIELDS[description.array.kind], {})[description.array.layer] = tensor
            name = self._names.name(record["id"])
            self._repeated += name != safe_name(record["id"])
            torch.save(content, self._folder / f"{name}.pt")
            self._rows.writerow((record["record"], record["id"], f"{name}.pt"))

    def finish(self) -> None:
        warn_of_repeated_ids(
            self.folder,
            self._repeated,
            " in their file; they are in id~2.pt, id~3.pt and so on: see each index.tsv",
        )
