"""`h5_per_protein`: one `per_protein.h5` with a dataset for each record, named by its id. Layout: docs/formats.md."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import h5py

from esmflow.collect.writers.base import Batch, Description, EmbeddingWriter
from esmflow.collect.writers.names import NameGiver
from esmflow.files import atomic_path

log = logging.getLogger(__name__)


class H5PerProteinWriter(EmbeddingWriter):
    """Adds dataset after dataset; the library keeps no more than a cache of them in memory."""

    def __init__(self, folder: Path, descriptions: Sequence[Description]) -> None:
        super().__init__(folder, descriptions)
        self._path = folder / "per_protein.h5"
        self._target = atomic_path(self._path)
        # Groups of the latest version find a name among millions; the old ones hold each name in one list.
        self._file = h5py.File(self._target.__enter__(), "w", libver=("v110", "v110"))
        self._file.attrs.update(self.description.attributes())
        self._names = NameGiver(self._file.__contains__)

    def add(self, batch: Batch) -> None:
        for identifier, values in zip(batch.ids, batch.values(self.description.array), strict=True):
            dataset = self._file.create_dataset(self._names.name(identifier), data=values)
            dataset.attrs["original_id"] = identifier

    def close(self) -> None:
        self._file.close()
        self._target.__exit__(None, None, None)
        if self._names.repeated:
            log.warning(
                "%s: the ids of %d records occurred before; their datasets are named id~2, id~3 and so on, and "
                "their attribute original_id is the id",
                *(self._path, self._names.repeated),
            )
