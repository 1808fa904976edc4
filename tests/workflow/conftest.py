"""Inputs of workflow tests: real proteins, few enough for a CPU."""

from __future__ import annotations

import gzip
from functools import partial
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
def small_run(tmp_path, real_model_folder, real_checkpoint, short_proteins):
    """Makes a run over the first proteins of the sample, cut into files; the real model has been converted already."""
    return partial(_make_run, tmp_path, real_model_folder, real_checkpoint.parent, short_proteins)


@pytest.fixture
def quick_run(tmp_path, made_up_model, short_proteins):
    """The same with a made-up model that takes no time: for tests of processes, not of numbers."""
    return partial(_make_run, tmp_path, made_up_model, made_up_model.parent, short_proteins)


def _make_run(
    tmp_path: Path, model: Path, fetched: Path, records: list[tuple[str, str]], /,
    proteins: int, files: int = 1, folder: str = "run", **config,
) -> WorkflowRun:  # fmt: skip
    run = WorkflowRun(tmp_path / folder, **{"model": model, **config})
    # A test that names a model wants to see it converted.
    if "model" not in config:
        run.has_fetched(fetched)
    chosen = records[:proteins]
    names = {}
    for number in range(files):
        part = chosen[number::files]
        (run.folder / f"part{number}.faa").write_text("".join(f">{h}\n{s}\n" for h, s in part))
        names[f"part{number}"] = f"part{number}.faa"
    run.write_samples(names)
    return run
