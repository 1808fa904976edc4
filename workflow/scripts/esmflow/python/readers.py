"""Read one output of a run back, from whichever format it was written in. Layouts: docs/formats.md.

Every reader knows records by their number among the embedded ones, in manifest order, and opens files when it must.
"""

from __future__ import annotations

import csv
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from esmflow.arrays import ATTENTION, POOLED, Array
from esmflow.collect.writers.names import NameGiver
from esmflow.inputs.sheet import InputFile, output_names


@dataclass(frozen=True)
class Written:
    """What was written of one array: the folder of all embeddings, the array, and the embedded records in order.

    ids: of each record. files: the input files in order. file_of: the number of each record's file. positions: of each
    record, the number among the embedded ones of its file.
    """

    folder: Path
    array: Array
    ids: Sequence[str]
    files: Sequence[InputFile]
    file_of: np.ndarray
    positions: np.ndarray

    @property
    def own(self) -> Path:
        """The folder of the array alone."""
        return self.folder / self.array.name

    def names(self) -> dict[int, str]:
        """What the outputs of each file, by its number, are called."""
        called = output_names(list(self.files))
        return {number: called[file.path] for number, file in enumerate(self.files)}


class Reader(ABC):
    """One array of a run in one format."""

    @abstractmethod
    def record(self, number: int) -> np.ndarray:
        """The values of one record: `[D]`, `[]` of a number, or its rows (see `Array.rows`)."""

    @abstractmethod
    def matrix(self) -> np.ndarray:
        """The values of all records: `[N, D]`, `[N]` of numbers, or the rows of all of them end to end."""


class _Rows(Reader):
    """A format that has all rows in one array. offsets: where each record's begin, None where each has one."""

    def __init__(self, values: Any, offsets: np.ndarray | None, mapped: bool = False) -> None:
        self._values, self._offsets, self._mapped = values, offsets, mapped

    def record(self, number: int) -> np.ndarray:
        if self._offsets is None:
            return np.array(self._values[number])
        return np.array(self._values[self._offsets[number] : self._offsets[number + 1]])

    def matrix(self) -> np.ndarray:
        return self._values if self._mapped else self._values[:]


class _Each(Reader):
    """A format that has each record by itself. read: the values of one."""

    def __init__(self, written: Written, read: Callable[[int], np.ndarray]) -> None:
        self._written, self._read = written, read

    def record(self, number: int) -> np.ndarray:
        return self._read(number)

    def matrix(self) -> np.ndarray:
        values = [self._read(number) for number in range(len(self._written.ids))]
        if not values:
            return np.empty((0, 0), np.float32)
        if self._written.array.is_pooled:
            return np.stack(values)
        flat = self._written.array.kind in ("contacts", ATTENTION)
        return np.concatenate([each.ravel() for each in values] if flat else values)


def _open_h5(path: Path) -> Any:
    import h5py

    return h5py.File(path, locking=False)


def _h5(written: Written) -> Reader:
    file = _open_h5(written.own / "embeddings.h5")
    return _Rows(file["embeddings"], None if written.array.is_pooled else file["offsets"][:])


def _npy(written: Written) -> Reader:
    offsets = None if written.array.is_pooled else np.load(written.own / "offsets.npy")
    return _Rows(np.load(written.own / "embeddings.npy", mmap_mode="r"), offsets, mapped=True)


def _parquet(written: Written) -> Reader:
    import polars as pl

    column = pl.read_parquet(written.own / "embeddings.parquet", columns=["embedding"])["embedding"]
    if written.array.is_pooled:
        return _Rows(column.to_numpy(), None)
    return _Rows(column.explode().to_numpy(), np.concatenate(([0], column.list.len().cast(pl.Int64).cum_sum())))


def _h5ad(written: Written) -> Reader:
    values = _open_h5(written.own / "embeddings.h5ad")["X"]
    return _Rows(values if written.array.is_vector else values[:].ravel(), None)


def _skbio(written: Written) -> Reader:
    file = _open_h5(written.own / "embeddings.skbio.h5")
    return _Rows(file["embedding"], None if written.array.is_pooled else np.concatenate(([0], file["idptr"][:])))


def _h5_per_protein(written: Written) -> Reader:
    file = _open_h5(written.own / "per_protein.h5")
    taken: dict[str, None] = {}
    giver = NameGiver(taken.__contains__)
    # As they were named when they were written.
    for identifier in written.ids:
        taken[giver.name(identifier)] = None
    names = list(taken)
    return _Each(written, lambda number: np.asarray(file[names[number]][()]))


def _pt(written: Written) -> Reader:
    import torch

    names = written.names()

    @cache
    def tensors(file: int) -> list[torch.Tensor]:
        path = written.own / "pt" / f"{names[file]}_ESM.pt"
        return torch.load(path, weights_only=True, mmap=True)["data"]

    def read(number: int) -> np.ndarray:
        return tensors(int(written.file_of[number]))[int(written.positions[number])].numpy().copy()

    return _Each(written, read)


def _record_files(written: Written, form: str) -> Callable[[int], Path]:
    """Where each record's file is."""
    names = written.names()

    @cache
    def paths(file: int) -> list[Path]:
        folder = written.folder / form / names[file]
        with open(folder / "index.tsv", newline="", encoding="utf-8") as handle:
            return [folder / row["file"] for row in csv.DictReader(handle, delimiter="\t")]

    return lambda number: paths(int(written.file_of[number]))[int(written.positions[number])]


def _npz(written: Written) -> Reader:
    path_of = _record_files(written, "npz")

    def read(number: int) -> np.ndarray:
        with np.load(path_of(number)) as archive:
            return archive[written.array.name]

    return _Each(written, read)


def _esm(written: Written) -> Reader:
    import torch

    path_of, kind, layer = _record_files(written, "esm"), written.array.kind, written.array.layer
    fields = {"per_residue": "representations", **{kind: f"{kind}_representations" for kind in POOLED}}

    def read(number: int) -> np.ndarray:
        content = torch.load(path_of(number), weights_only=True)
        return (content[kind] if layer is None else content[fields[kind]][layer]).numpy()

    return _Each(written, read)


READERS: dict[str, tuple[str, Callable[[Written], Reader]]] = {
    "h5": ("{array}/embeddings.h5", _h5),
    "npy": ("{array}/embeddings.npy", _npy),
    "parquet": ("{array}/embeddings.parquet", _parquet),
    "h5ad": ("{array}/embeddings.h5ad", _h5ad),
    "skbio": ("{array}/embeddings.skbio.h5", _skbio),
    "h5_per_protein": ("{array}/per_protein.h5", _h5_per_protein),
    "pt": ("{array}/pt", _pt),
    "esm": ("esm", _esm),
    "npz": ("npz", _npz),
}
"""By format: what is there when it was written, below the folder of the embeddings, and what reads it."""
