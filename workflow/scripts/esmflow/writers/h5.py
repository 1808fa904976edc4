"""`h5`: one `embeddings.h5` for the whole run.

Datasets `embeddings` (fp32 `[N, D]`) and `ids` (UTF-8 strings `[N]`), in input order; attributes name the model, layer,
pooling, precision, fingerprint and versions. A repeated id is repeated.

Outputs that are not pooled also have `offsets` (int64 `[N + 1]`): record i has the rows `offsets[i]` to
`offsets[i + 1]` of `embeddings`, which is `[sum of residues, D]` for per-residue outputs (fp16 if they are stored so),
`[sum of residues, 33]` for logits, and `[sum of squared residues]` for contacts: each record's map, flattened.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np

from esmflow.engine import is_pooled, rows_per_sequence
from esmflow.files import atomic_path
from esmflow.writers.base import Description, EmbeddingWriter

_CHUNK_BYTES = 1 << 20


class H5Writer(EmbeddingWriter):
    """Appends block by block, in bounded memory."""

    def __init__(self, folder: Path, description: Description) -> None:
        super().__init__(folder, description)
        folder.mkdir(parents=True, exist_ok=True)
        self._target = atomic_path(folder / "embeddings.h5")
        self._file = h5py.File(self._target.__enter__(), "w")
        self._file.attrs.update(
            {
                "model": description.model,
                "pooling": description.kind,
                "precision": description.precision,
                "fingerprint": description.fingerprint,
                **{f"version_{name}": version for name, version in description.versions.items()},
            }
        )
        if description.layer is not None:
            self._file.attrs["layer"] = description.layer
        self._ids = self._file.create_dataset("ids", (0,), h5py.string_dtype(), maxshape=(None,), chunks=(8192,))
        self._embeddings: h5py.Dataset | None = None
        self._offsets: h5py.Dataset | None = None
        if not is_pooled(description.array):
            self._offsets = self._file.create_dataset("offsets", (1,), np.int64, maxshape=(None,), chunks=(8192,))

    def begin_file(self, path: str) -> None:
        """Records of all files follow one another."""

    def add(self, ids: Sequence[str], vectors: np.ndarray, lengths: np.ndarray) -> None:
        if self._embeddings is None:
            row = vectors.shape[1:]
            rows = max(1, _CHUNK_BYTES // int(vectors.dtype.itemsize * np.prod(row)))
            self._embeddings = self._file.create_dataset(
                "embeddings", (0, *row), vectors.dtype, maxshape=(None, *row), chunks=(rows, *row)
            )
        _append(self._embeddings, vectors)
        _append(self._ids, np.array(ids, dtype=object))
        if self._offsets is not None:
            _append(self._offsets, self._offsets[-1] + np.cumsum(rows_per_sequence(self.description.array, lengths)))

    def close(self) -> None:
        if self._embeddings is None:
            self._file.create_dataset("embeddings", (0, 0), np.float32)
        self._file.close()
        self._target.__exit__(None, None, None)


def _append(dataset: h5py.Dataset, values: np.ndarray) -> None:
    start = dataset.shape[0]
    dataset.resize(start + len(values), axis=0)
    dataset[start:] = values
