"""Starts many whole runs at once that share one store, and compares what comes out with a run that had it alone.

Each run has proteins of its own and others that it shares with all. While they work, a bit is flipped in a finished
segment again and again. A run may end with an error only if a segment was damaged between its steps; then, as its
message says, the same command must end well.

    python tests/stress/runs_on_one_store.py --runs 10 --seed 1
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import h5py
import numpy as np
from safetensors.numpy import load_file

PROJECT = Path(__file__).resolve().parents[2]
sys.path += [str(PROJECT / "workflow" / "scripts"), str(PROJECT / "tests" / "support")]

from made_up import RESIDUES, random_model, stored_tensors, write_fair_esm  # noqa: E402
from workflow_run import WorkflowRun  # noqa: E402

_LIMIT_SECONDS = 1800
_SECONDS_BETWEEN_DAMAGES = 10.0


def make_run(folder: Path, model: Path, proteins: dict[str, str], store: Path) -> WorkflowRun:
    """A run over these proteins, in two groups and shards of a few proteins each."""
    settings = {"groups": 2, "shard_residues": 3000, "precision": "fp32", "formats": ["h5"], "store": str(store)}
    run = WorkflowRun(folder, model, **settings)
    (run.folder / "proteins.faa").write_text("".join(f">{name}\n{residues}\n" for name, residues in proteins.items()))
    run.write_samples({"proteins": "proteins.faa"})
    return run


def vectors_of(run: WorkflowRun) -> dict[str, np.ndarray]:
    """The vectors that a run ended with, by id."""
    with h5py.File(next((run.results / "embeddings").glob("mean_*/embeddings.h5"))) as file:
        return dict(zip(file["ids"].asstr()[:], file["embeddings"][:], strict=True))


def damage_one(store: Path, choose: random.Random) -> bool:
    """Flips a bit of one segment. False if there is none yet."""
    segments = sorted(store.glob("*/*.safetensors"))
    if not segments:
        return False
    path = choose.choice(segments)
    with open(path, "r+b") as file:
        position = choose.randrange(path.stat().st_size)
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1 << choose.randrange(8)]))
    return True


def run_all(runs: list[WorkflowRun], store: Path, choose: random.Random) -> tuple[int, int]:
    """Runs all at once, damaging segments meanwhile. Returns how often, and how many had to run again."""
    processes = [run.start(cores=1, gpus=1) for run in runs]
    damaged = 0
    try:
        while any(process.poll() is None for process in processes):
            time.sleep(_SECONDS_BETWEEN_DAMAGES)
            damaged += damage_one(store, choose)
    finally:
        for process in processes:
            process.terminate()
    again = [run for run, process in zip(runs, processes, strict=True) if process.wait()]
    for run in again:
        end_well(run)
    return damaged, len(again)


def end_well(run: WorkflowRun) -> None:
    """The same command again; twice if the first finds damage that was not yet known."""
    for _ in range(3):
        ended = run.run(cores=1, gpus=1, timeout=_LIMIT_SECONDS)
        if ended.returncode == 0:
            return
        if "The same command again" not in ended.stdout:
            break
    raise AssertionError(f"{run.folder}: ended with {ended.returncode}:\n{ended.stdout}")


def compare(runs: list[WorkflowRun], proteins: list[dict[str, str]], expected: dict[str, np.ndarray]) -> float:
    """Every record has the vector of its sequence. Returns the largest relative difference."""
    largest = 0.0
    for run, own in zip(runs, proteins, strict=True):
        found = vectors_of(run)
        assert found.keys() == own.keys(), f"{run.folder}: other records"
        for name, residues in own.items():
            right = expected[residues]
            largest = max(largest, float(np.linalg.norm(found[name] - right) / np.linalg.norm(right)))
    assert largest < 1e-5, f"a vector differs by {largest:.1e}"
    return largest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--proteins", type=int, default=100, help="of each run; half of them are shared by all")
    arguments = parser.parse_args()
    choose = random.Random(arguments.seed)

    def make(count: int) -> list[str]:
        return ["".join(choose.choices(RESIDUES, k=choose.randint(40, 300))) for _ in range(count)]

    with tempfile.TemporaryDirectory(prefix="esmflow-store-") as name:
        folder = Path(name)
        model = write_fair_esm(folder / "model" / "made_up.pt", stored_tensors(random_model(layers=4, hidden=160)))
        shared = make(arguments.proteins // 2)
        proteins = []
        for _ in range(arguments.runs):
            sequences = shared + make(arguments.proteins - len(shared))
            choose.shuffle(sequences)
            proteins.append({f"protein{n}": sequence for n, sequence in enumerate(sequences)})
        everything = sorted({sequence for own in proteins for sequence in own.values()})
        alone = make_run(folder / "alone", model, {s: s for s in everything}, folder / "store of one")
        alone.succeed(timeout=_LIMIT_SECONDS)
        expected = vectors_of(alone)
        store = folder / "store"
        runs = [make_run(folder / f"run{n}", model, own, store) for n, own in enumerate(proteins)]
        started = time.monotonic()
        damaged, again = run_all(runs, store, choose)
        seconds = time.monotonic() - started
        largest = compare(runs, proteins, expected)
        computed = sum(len(load_file(path)["digests"]) for path in store.glob("*/*.safetensors"))
        aside = len(list(store.glob("*/*.damaged-*")))
        print(
            f"{len(runs)} runs on one store in {seconds:.0f} s: all records right, the largest relative difference "
            f"{largest:.1e}.\n{damaged} times a bit was flipped, {aside} segments were set aside, {again} runs "
            f"had to be started again.\n{len(everything)} different sequences; the store holds {computed}, since "
            "runs that start together do not know of each other's plans"
        )


if __name__ == "__main__":
    try:
        main()
    except subprocess.TimeoutExpired as error:
        raise SystemExit(str(error)) from error
