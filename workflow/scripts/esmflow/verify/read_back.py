"""Embeddings as a user finds them: single records read back from the files of a run, or else from the store."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from esmflow.arrays import ATTENTION, Array
from esmflow.files import safe_name
from esmflow.inputs.sheet import fasta_stem
from esmflow.method import Fingerprint
from esmflow.store.gather import read_rows
from esmflow.store.segments import Store
from esmflow.text import record_name


@dataclass(frozen=True)
class Sampled:
    """One record that is verified, and where its embedding is.

    sequence: all of its residues; length: how many. segment, row: in the store. position: among all embedded records
    of the run, from 0; position_in_file: among those of its input file.
    """

    digest: str
    sequence: str
    sample: str
    file: str
    record: int
    id: str
    length: int
    precision: str
    segment: str
    row: int
    position: int
    position_in_file: int

    @property
    def name(self) -> str:
        """For a person."""
        return record_name(self.file, self.record, self.id)


@dataclass(frozen=True)
class Embeddings:
    """Where a run's embeddings are. `read_from` is the format to read, or `store`."""

    folder: str
    store: str
    fingerprint: Fingerprint
    read_from: str

    def read(self, sampled: Sequence[Sampled], arrays: Sequence[Array]) -> list[dict[str, np.ndarray]]:
        """The arrays of records by name: `[D]`, or the record's rows (see `Array.rows`)."""
        by_name = {array.name: self._read_array(sampled, array) for array in arrays}
        return [{name: values[i] for name, values in by_name.items()} for i in range(len(sampled))]

    def compare_with_store(self, sampled: Sequence[Sampled]) -> tuple[dict[str, str], frozenset[str]]:
        """Digests of the numbers that the store has, by sequence, and the sequences for which the files have others.

        Pooled arrays may be rounded to fp16 in the files.
        """
        hashers = [hashlib.blake2b(digest_size=8) for _ in sampled]
        differing = set()
        stored = replace(self, read_from="store")
        # One array after the other, so that few of them are in memory.
        for array in self.fingerprint.outputs.arrays():
            expected = stored._read_array(sampled, array)
            found = self._read_array(sampled, array) if self._in_files(array) else expected
            for record, hasher, right, values in zip(sampled, hashers, expected, found, strict=True):
                hasher.update(right.tobytes())
                rounded = array.is_pooled and values.dtype == np.float16
                if not np.array_equal((right.astype(np.float16) if rounded else right).ravel(), values.ravel()):
                    differing.add(record.digest)
        numbers = {record.digest: hasher.hexdigest() for record, hasher in zip(sampled, hashers, strict=True)}
        return numbers, frozenset(differing)

    def _in_files(self, array: Array) -> bool:
        """Whether the files that are read have this array; attention maps are in none of them."""
        return self.read_from in READERS and array.kind != ATTENTION

    def _read_array(self, sampled: Sequence[Sampled], array: Array) -> list[np.ndarray]:
        if self._in_files(array):
            return READERS[self.read_from](Path(self.folder) / array.name, array, sampled)
        store = Store(self.store, self.fingerprint)
        rows = read_rows(store, [(record.segment, record.row) for record in sampled], array)
        found = {number: np.array(values) for number, values in rows}
        return [found[number] for number in range(len(sampled))]


def _read_h5(folder: Path, array: Array, sampled: Sequence[Sampled]) -> list[np.ndarray]:
    import h5py

    with h5py.File(folder / "embeddings.h5", locking=False) as file:
        values = file["embeddings"]
        if array.is_pooled:
            return [values[record.position] for record in sampled]
        offsets = file["offsets"]
        return [values[offsets[r.position] : offsets[r.position + 1]] for r in sampled]


def _read_pt(folder: Path, array: Array, sampled: Sequence[Sampled]) -> list[np.ndarray]:
    import torch

    # One file at a time: a large one takes a while to open.
    found = {}
    for file, sample in sorted({(record.file, record.sample) for record in sampled}):
        # Named by the sample where files share their stem.
        path, by_sample = (folder / "pt" / f"{name}_ESM.pt" for name in (fasta_stem(file), safe_name(sample)))
        data = torch.load(path if path.exists() else by_sample, weights_only=True, mmap=True)["data"]
        for record in sampled:
            if record.file == file:
                found[record.digest] = data[record.position_in_file].numpy().copy()
    return [found[record.digest] for record in sampled]


READERS: dict[str, Callable[[Path, Array, Sequence[Sampled]], list[np.ndarray]]] = {"h5": _read_h5, "pt": _read_pt}
