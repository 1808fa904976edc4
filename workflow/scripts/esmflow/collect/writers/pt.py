"""`pt`: for each input file one `{stem}_ESM.pt`, as VirNucPro reads them. Layout: docs/formats.md."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from esmflow.collect.writers.base import Batch, Description, EmbeddingWriter
from esmflow.collect.writers.tensor_list import TensorListFile
from esmflow.files import atomic_path
from esmflow.inputs.sheet import fasta_stem


class PtWriter(EmbeddingWriter):
    """Appends to the file of one input at a time, in bounded memory."""

    by_file = True

    def __init__(self, folder: Path, descriptions: Sequence[Description]) -> None:
        super().__init__(folder, descriptions)
        self._open = ExitStack()
        self._file: TensorListFile | None = None

    def begin_file(self, path: str) -> None:
        self.close()
        temporary = self._open.enter_context(atomic_path(self.folder / "pt" / pt_file_name(path)))
        self._file = TensorListFile(temporary)

    def add(self, batch: Batch) -> None:
        assert self._file is not None
        self._file.append(batch.ids, batch.values(self.description.array))

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
        self._open.close()


def pt_file_name(path: str) -> str:
    """`viruses/a.faa.gz` gives `a_ESM.pt`."""
    return f"{fasta_stem(path)}_ESM.pt"
