"""Collect without having embedded: segments and the table of records are made up, all that follows is real."""

from __future__ import annotations

import contextlib
import gzip
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from stage_settings import collect_settings

from esmflow.arrays import Outputs
from esmflow.collect.collecting import collect
from esmflow.embedding.run_record import RunRecord
from esmflow.inputs.records import Record
from esmflow.inputs.residues import sequence_digest
from esmflow.method import Fingerprint
from esmflow.plan.record_table import RecordTable
from esmflow.plan.run_plan import Plan
from esmflow.store.segments import Segment, Store


@dataclass(frozen=True)
class MadeUpRecord:
    """One good record of an input file."""

    file: str
    id: str
    sequence: str
    description: str = ""


class CollectedRun:
    """A store and the tables that earlier steps would leave, ready to be collected as often as a test likes."""

    def __init__(self, folder: Path, records: Sequence[MadeUpRecord], segments: Sequence[Segment], outputs: Outputs):
        self.folder, self.outputs = folder, outputs
        fingerprint = Fingerprint(
            "c", outputs.layers, outputs.include, None, "packed", "", "auto", "whole", None, None, "reject"
        )
        self.store = Store(folder / "store", fingerprint)
        self.store.create()
        names = [f"{number:032x}" for number in range(len(segments))]
        for name, segment in zip(names, segments):
            self.store.write(name, segment)
        positions: dict[str, int] = {}
        with RecordTable(folder / "records.parquet") as table:
            for record in records:
                position = positions[record.file] = positions.get(record.file, 0) + 1
                n = len(record.sequence)
                row = Record(record.file, position, record.id, record.description, record.sequence, n)
                table.add(f"sample of {record.file}", row, sequence_digest(record.sequence))
        for file in positions:
            self._write_input(file, [record for record in records if record.file == file])
        Plan(fingerprint=fingerprint.digest(), records=len(records), groups=()).write(folder / "plan.json")
        RunRecord(group="0", segments_written=tuple(names), sequences=len(records)).write(folder / "run.json")
        (folder / "failures.tsv").write_text("digest\treason\tdetail\n")

    def _write_input(self, file: str, records: Sequence[MadeUpRecord]) -> None:
        """The input file itself, below the folder, for formats that read it again."""
        (self.folder / file).parent.mkdir(parents=True, exist_ok=True)
        text = "".join(f">{record.id} {record.description}\n{record.sequence}\n" for record in records).encode()
        (self.folder / file).write_bytes(gzip.compress(text) if file.endswith(".gz") else text)

    def collect(self, formats: Sequence[str], name: str = "results", **options: Any) -> Path:
        """Returns the folder of the embeddings."""
        out = self.folder / name
        with contextlib.chdir(self.folder):
            collect(collect_settings(self.folder, out, self.store.description, formats=formats, **options))
        return out / "embeddings"


def read_h5ad(path: Path, **options: Any) -> Any:
    """The file as AnnData reads it; its import takes as long as that of all tests of formats."""
    import anndata

    return anndata.read_h5ad(path, **options)


def random_segment(sequences: Sequence[str], outputs: Outputs, width: int = 8, seed: int = 0) -> Segment:
    """A segment as embedding these sequences would give, with random values."""
    rng = np.random.default_rng(seed)
    lengths = np.array([len(sequence) for sequence in sequences], np.int64)
    arrays = {}
    for array in outputs.arrays():
        rows = int(array.rows(lengths).sum())
        arrays[array.name] = rng.standard_normal((rows, *array.row(width)), np.float32)
    digests = np.frombuffer(b"".join(map(sequence_digest, sequences)), np.uint8).reshape(-1, 16)
    return Segment(digests, lengths, arrays, "fp32")
