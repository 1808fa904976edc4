"""`pt`: for each input file one `{stem}_ESM.pt`, as VirNucPro reads them. Layout: docs/formats.md."""

from __future__ import annotations

from esmflow.collect.writers.base import Batch, EmbeddingWriter
from esmflow.collect.writers.tensor_list import TensorListFile


class PtWriter(EmbeddingWriter):
    """Appends to the file of one input at a time, in bounded memory."""

    by_file = True

    def begin_file(self, name: str) -> None:
        self.opened.close()
        self._file = self.enter(TensorListFile(self.new_file(f"pt/{name}_ESM.pt")))

    def add(self, batch: Batch) -> None:
        self._file.append(batch.ids, batch.values(self.description.array))
