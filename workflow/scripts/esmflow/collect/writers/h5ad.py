"""`h5ad`: one `embeddings.h5ad`, an AnnData with a row for each record. Layout: docs/formats.md.

AnnData's own writer wants the whole matrix and all names in memory, so what grows with the records is written here, as
AnnData's on-disk format has it (https://anndata.readthedocs.io/en/stable/fileformat-prose.html); the rest by AnnData.
"""

from __future__ import annotations

import anndata
import h5py
import numpy as np
import pandas as pd

from esmflow.collect.tables import MANIFEST_SCHEMA
from esmflow.collect.writers.base import Batch, Numbering
from esmflow.collect.writers.h5 import Hdf5Writer
from esmflow.collect.writers.names import warn_of_repeated_ids

_INDEX = "_index"
_CATEGORIES = ("sample", "file")
_NUMBERS = ("record", "length")
_BLOCK = 65_536


class H5adWriter(Hdf5Writer):
    """Appends block by block; of earlier records only an 8-byte hash of each id stays in memory."""

    def open(self) -> None:
        self._file = self.new_h5("embeddings.h5ad")
        self._obs = self._file.create_group("obs")
        self._hashes: list[np.ndarray] = []
        self._annotations: dict[str, None] = {}
        self._categories = {name: Numbering() for name in _CATEGORIES}

    def add(self, batch: Batch) -> None:
        values = batch.arrays[self.description.array]
        # A number for each record is a matrix of one column.
        self.append(self._file, "X", values if values.ndim > 1 else values[:, None])
        self.append(self._obs, "id", batch.ids)
        self._hashes.append(_hashes(batch.ids))
        for name in _NUMBERS:
            self.append(self._obs, name, batch.records[name].to_numpy())
        for name in batch.records.column_names:
            if name not in MANIFEST_SCHEMA.names:
                self._annotations[name.replace("/", "_")] = None
                self.append(self._obs, name.replace("/", "_"), batch.records[name].cast("string").to_numpy())
        for name, numbering in self._categories.items():
            self.append(self._obs, f"{name}/codes", numbering.encode(batch.records[name]))

    def finish(self) -> None:
        repeated = self._name_records()
        for name, numbering in self._categories.items():
            anndata.io.write_elem(self._obs[name], "categories", np.array(numbering.names, dtype=object))
            _mark(self._obs[name]["codes"], "array")
            _mark(self._obs[name], "categorical", ordered=False)
        for dataset in (self._file["X"], *(self._obs[name] for name in _NUMBERS)):
            _mark(dataset, "array")
        for name in self._annotations:
            _mark(self._obs[name], "string-array")
        _mark(self._obs, "dataframe", _index=_INDEX)
        self._obs.attrs["column-order"] = np.array(
            ["id", *_CATEGORIES, *_NUMBERS, *self._annotations], h5py.string_dtype()
        )
        dimensions = pd.DataFrame(index=[str(number) for number in range(self._file["X"].shape[1])])
        anndata.io.write_elem(self._file, "var", dimensions)
        anndata.io.write_elem(self._file, "uns", {"esmflow": self.description.attributes()})
        for name in ("layers", "obsm", "obsp", "varm", "varp"):
            anndata.io.write_elem(self._file, name, {})
        _mark(self._file, "anndata", version="0.1.0")
        warn_of_repeated_ids(
            self.folder / "embeddings.h5ad",
            repeated,
            "; their names are id-1, id-2 and so on, and the column id of obs has the ids",
        )

    def _name_records(self) -> int:
        """Makes the names of the records, which must differ: the ids, where they do. Returns how many do not."""
        ids = self._obs["id"]
        _mark(ids, "string-array")
        hashes = np.concatenate(self._hashes)
        ordered = np.sort(hashes)
        repeated = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
        if not len(repeated):
            self._obs[_INDEX] = ids
            return 0
        last: dict[str, int] = {}
        renamed = 0
        for start in range(0, len(ids), _BLOCK):
            names = ids.asstr()[start : start + _BLOCK]
            for i in np.flatnonzero(np.isin(hashes[start : start + len(names)], repeated)).tolist():
                identifier = names[i]
                if identifier in last:
                    names[i], last[identifier] = _free_name(identifier, last[identifier], ordered)
                    renamed += 1
                else:
                    last[identifier] = 0
            self.append(self._obs, _INDEX, names)
        _mark(self._obs[_INDEX], "string-array")
        return renamed


def _free_name(identifier: str, last: int, hashes: np.ndarray) -> tuple[str, int]:
    """`id-1`, `id-2`, …: the next that is no id, as AnnData makes names unique; and its number."""
    while True:
        last += 1
        name = f"{identifier}-{last}"
        found = _hashes(np.array([name], dtype=object))[0]
        at = np.searchsorted(hashes, found)
        if at == len(hashes) or hashes[at] != found:
            return name, last


def _hashes(ids: np.ndarray) -> np.ndarray:
    return pd.util.hash_array(ids, categorize=False)


def _mark(element: h5py.HLObject, encoding: str, version: str = "0.2.0", **attributes: object) -> None:
    element.attrs.update({"encoding-type": encoding, "encoding-version": version, **attributes})
