"""`h5ad`: one `embeddings.h5ad`, an AnnData with a row for each record. Layout: docs/formats.md.

AnnData's own writer wants the whole matrix and all names in memory, so what grows with the records is written here, as
AnnData's on-disk format has it (https://anndata.readthedocs.io/en/stable/fileformat-prose.html); the rest by AnnData.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd

from esmflow.collect.writers.base import Batch, Description, EmbeddingWriter
from esmflow.collect.writers.h5 import append, growing
from esmflow.files import atomic_path

log = logging.getLogger(__name__)

_INDEX = "_index"
_CATEGORIES = ("sample", "file")
_NUMBERS = ("record", "length")
_BLOCK = 65_536


class H5adWriter(EmbeddingWriter):
    """Appends block by block; of earlier records only an 8-byte hash of each id stays in memory."""

    def __init__(self, folder: Path, descriptions: Sequence[Description]) -> None:
        super().__init__(folder, descriptions)
        self._path = folder / "embeddings.h5ad"
        self._target = atomic_path(self._path)
        self._file = h5py.File(self._target.__enter__(), "w")
        self._obs = self._file.create_group("obs")
        self._matrix: h5py.Dataset | None = None
        self._ids = growing(self._obs, "id", (), h5py.string_dtype())
        self._hashes: list[np.ndarray] = []
        self._numbers = {name: growing(self._obs, name, (), np.int64) for name in _NUMBERS}
        self._codes = {name: growing(self._obs.create_group(name), "codes", (), np.int32) for name in _CATEGORIES}
        self._categories: dict[str, dict[str, int]] = {name: {} for name in _CATEGORIES}

    def add(self, batch: Batch) -> None:
        vectors = batch.arrays[self.description.array]
        if self._matrix is None:
            self._matrix = growing(self._file, "X", vectors.shape[1:], vectors.dtype)
        append(self._matrix, vectors)
        ids = batch.ids
        append(self._ids, ids)
        self._hashes.append(_hashes(ids))
        for name, numbers in self._numbers.items():
            append(numbers, batch.records[name].to_numpy())
        for name, codes in self._codes.items():
            append(codes, self._encode(name, batch))

    def _encode(self, name: str, batch: Batch) -> np.ndarray:
        """Numbers of the batch's categories; new ones are added."""
        column = batch.records[name].combine_chunks()
        known = self._categories[name]
        # A dictionary may hold names that no record of the batch has.
        used, codes = np.unique(column.indices.to_numpy(), return_inverse=True)
        names = column.dictionary.take(used).to_pylist()
        return np.array([known.setdefault(each, len(known)) for each in names], np.int32)[codes]

    def close(self) -> None:
        if self._matrix is None:
            self._matrix = self._file.create_dataset("X", (0, 0), np.float32)
        repeated = self._name_records()
        for name, codes in self._codes.items():
            anndata.io.write_elem(codes.parent, "categories", np.array(list(self._categories[name]), dtype=object))
            _mark(codes, "array")
            _mark(codes.parent, "categorical", ordered=False)
        for dataset in (self._matrix, *self._numbers.values()):
            _mark(dataset, "array")
        columns = ["id", *_CATEGORIES, *_NUMBERS]
        _mark(self._obs, "dataframe", _index=_INDEX)
        self._obs.attrs["column-order"] = np.array(columns, h5py.string_dtype())
        dimensions = pd.DataFrame(index=[str(number) for number in range(self._matrix.shape[1])])
        anndata.io.write_elem(self._file, "var", dimensions)
        anndata.io.write_elem(self._file, "uns", {"esmflow": self.description.attributes()})
        for name in ("layers", "obsm", "obsp", "varm", "varp"):
            anndata.io.write_elem(self._file, name, {})
        _mark(self._file, "anndata", version="0.1.0")
        self._file.close()
        self._target.__exit__(None, None, None)
        if repeated:
            log.warning(
                "%s: the ids of %d records occurred before; their names are id-1, id-2 and so on, and the column "
                "id of obs has the ids",
                *(self._path, repeated),
            )

    def _name_records(self) -> int:
        """Makes the names of the records, which must differ: the ids, where they do. Returns how many do not."""
        _mark(self._ids, "string-array")
        hashes = np.concatenate([*self._hashes, np.empty(0, np.uint64)])
        ordered = np.sort(hashes)
        repeated = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
        if not len(repeated):
            self._obs[_INDEX] = self._ids
            return 0
        names = growing(self._obs, _INDEX, (), h5py.string_dtype())
        _mark(names, "string-array")
        last: dict[str, int] = {}
        renamed = 0
        for start, ids in _blocks(self._ids):
            for i in np.flatnonzero(np.isin(hashes[start : start + len(ids)], repeated)).tolist():
                identifier = ids[i]
                if identifier in last:
                    ids[i], last[identifier] = _free_name(identifier, last[identifier], ordered)
                    renamed += 1
                else:
                    last[identifier] = 0
            append(names, ids)
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


def _blocks(dataset: h5py.Dataset) -> Iterator[tuple[int, np.ndarray]]:
    for start in range(0, len(dataset), _BLOCK):
        yield start, dataset.asstr()[start : start + _BLOCK]


def _mark(element: h5py.HLObject, encoding: str, version: str = "0.2.0", **attributes: object) -> None:
    element.attrs.update({"encoding-type": encoding, "encoding-version": version, **attributes})
