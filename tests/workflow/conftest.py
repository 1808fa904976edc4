"""Inputs of workflow tests: real proteins, few enough for a CPU."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
from workflow_run import WorkflowRun

DATA = Path(__file__).resolve().parent.parent / "data"


@pytest.fixture(scope="session")
def short_proteins() -> list[tuple[str, str]]:
    """Real proteins of at most 300 residues: header and sequence."""
    entries = gzip.decompress((DATA / "uniprot_sample_500.fasta.gz").read_bytes()).decode().split(">")[1:]
    parsed = [(entry.split("\n", 1)[0].strip(), entry.split("\n", 1)[1].replace("\n", "")) for entry in entries]
    unique = {sequence: header for header, sequence in parsed if len(sequence) <= 300}
    return [(header, sequence) for sequence, header in unique.items()]


@pytest.fixture
def small_run(tmp_path, real_model_folder, short_proteins):
    """Makes a run over the first proteins of the sample, cut into files."""

    def make(proteins: int, files: int = 1, folder: str = "run", **config) -> WorkflowRun:
        run = WorkflowRun(tmp_path / folder, **{"model": real_model_folder, **config})
        chosen = short_proteins[:proteins]
        names = {}
        for number in range(files):
            part = chosen[number::files]
            (run.folder / f"part{number}.faa").write_text("".join(f">{h}\n{s}\n" for h, s in part))
            names[f"part{number}"] = f"part{number}.faa"
        run.write_samples(names)
        return run

    return make
