"""`h5_per_protein`: one `per_protein.h5` with a dataset for each record, named by its id. Layout: docs/formats.md."""

from __future__ import annotations

from esmflow.collect.writers.base import Batch
from esmflow.collect.writers.h5 import Hdf5Writer
from esmflow.collect.writers.names import NameGiver, warn_of_repeated_ids


class H5PerProteinWriter(Hdf5Writer):
    """Adds dataset after dataset; the library keeps no more than a cache of them in memory."""

    def open(self) -> None:
        # Groups of the latest version find a name among millions; the old ones hold each name in one list.
        self._file = self.new_h5("per_protein.h5", libver=("v110", "v110"))
        # ProtSpace asks for the model under this name.
        self._file.attrs.update({**self.description.attributes(), "model_name": self.description.model})
        self._names = NameGiver(self._file.__contains__)

    def add(self, batch: Batch) -> None:
        samples = batch.records["sample"].to_pylist()
        for identifier, sample, values in zip(batch.ids, samples, batch.values(self.description.array), strict=True):
            dataset = self._file.create_dataset(self._names.name(identifier), data=values)
            dataset.attrs["original_id"] = identifier
            dataset.attrs["sample"] = sample
        self.check_disk()

    def finish(self) -> None:
        warn_of_repeated_ids(
            self.folder / "per_protein.h5",
            self._names.repeated,
            "; their datasets are named id~2, id~3 and so on, and their attribute original_id is the id",
        )
