"""`skbio`: one `embeddings.skbio.h5`, as scikit-bio's `embed` format has it. Layout: docs/formats.md."""

from __future__ import annotations

import h5py
import numpy as np

from esmflow.collect.writers.base import Batch, Numbering
from esmflow.collect.writers.h5 import Hdf5Writer


class SkbioWriter(Hdf5Writer):
    """Appends block by block, in bounded memory. scikit-bio knows a protein by its sequence, so that comes along."""

    wants_sequences = True

    def open(self) -> None:
        self._file = self.new_h5("embeddings.skbio.h5")
        self._file.attrs.update({"format": "embedding", "format-version": "1.0", **self.description.attributes()})
        self._residues = self._records = 0
        self._samples = Numbering()

    def add(self, batch: Batch) -> None:
        array = self.description.array
        sequences = [sequence.encode() for sequence in batch.sequences]
        if not array.is_pooled:
            # Of a truncated record, each row stands beside its residue.
            sequences = [sequence[:length] for sequence, length in zip(sequences, batch.lengths.tolist())]
        ends = self._residues + np.cumsum([len(sequence) for sequence in sequences], dtype=np.int64)
        self.append(self._file, "id", np.frombuffer(b"".join(sequences), np.uint8))
        self.append(self._file, "idptr", ends)
        embedding = self.append(self._file, "embedding", batch.arrays[array])
        if array.is_pooled:
            self.append(self._file, "embedding_ptr", self._records + np.arange(1, len(batch) + 1))
        self.append(self._file, "ids", batch.ids)
        self.append(self._file, "sample_numbers", self._samples.encode(batch.records["sample"]))
        self._residues, self._records = int(ends[-1]) if len(ends) else 0, self._records + len(batch)
        self._file.attrs.update({"dtype": embedding.dtype.name, "dim": embedding.shape[1]})

    def finish(self) -> None:
        self._file.create_dataset("samples", data=np.array(self._samples.names, h5py.string_dtype()))
