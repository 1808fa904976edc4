"""Measures the packed engine beside fair-esm on a CPU, in fp32, for several numbers of threads and of processes.

python benchmarks/cpu.py                          # 8M, one thread and two: about a minute
python benchmarks/cpu.py --size 150M --threads 1 2 4
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "workflow" / "scripts")]

import peers  # noqa: E402
import synthetic  # noqa: E402
from engine import embed_means, surroundings  # noqa: E402

from esmflow.arrays import Outputs  # noqa: E402
from esmflow.engine.packed import PackedEngine  # noqa: E402

ROUNDS = 3


def measure(checkpoint: Path, size: str, residues: int, threads: int) -> dict[str, float]:
    """Residues per second of each engine: the median of several rounds, in turns, since other work comes and goes."""
    torch.set_num_threads(threads)
    sequences = synthetic.sequences("proteome", residues)
    engine = PackedEngine.load(checkpoint, Outputs((synthetic.SIZES[size].layers,), ("mean",)), "fp32", "cpu")
    embeds = {
        "packed": embed_means(engine, engine.default_token_budget()),
        "fair-esm": peers.fair_esm(checkpoint, "cpu", autocast=False, tokens_per_batch=4096),
    }
    rounds = [
        {name: peers.residues_per_second(embed, sequences, "cpu") for name, embed in embeds.items()}
        for _ in range(ROUNDS)
    ]
    return {name: statistics.median(each[name] for each in rounds) for name in embeds}


def packed_alone(checkpoint: Path, size: str, residues: int, start: Any, done: Any) -> None:
    """One of several processes of one thread each: waits for the others, and says how fast it was beside them."""
    torch.set_num_threads(1)
    sequences = synthetic.sequences("proteome", residues)
    engine = PackedEngine.load(checkpoint, Outputs((synthetic.SIZES[size].layers,), ("mean",)), "fp32", "cpu")
    embed = embed_means(engine, engine.default_token_budget())
    embed(sequences[:5])
    start.wait()
    began = time.perf_counter()
    embed(sequences)
    done.put(sum(map(len, sequences)) / (time.perf_counter() - began))


def side_by_side(processes: int, checkpoint: Path, size: str, residues: int) -> float:
    """Residues per second of several processes together."""
    spawned = multiprocessing.get_context("spawn")
    start, done = spawned.Barrier(processes), spawned.Queue()
    workers = [
        spawned.Process(target=packed_alone, args=(checkpoint, size, residues, start, done)) for _ in range(processes)
    ]
    for worker in workers:
        worker.start()
    total = sum(done.get() for _ in workers)
    for worker in workers:
        worker.join()
    return float(total)


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="8M", choices=list(synthetic.SIZES))
    parser.add_argument("--residues", type=int, default=20_000)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()
    print(", ".join(f"{name} {found}" for name, found in surroundings("cpu").items()))
    print(f"\n{options.size}, fp32, residues/s\n")
    print("| threads | packed | fair-esm | ratio | as many processes of one thread |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        checkpoint = Path(name) / f"{options.size}.safetensors"
        synthetic.write_converted(checkpoint, options.size, synthetic.random_tensors(options.size, "cpu"))
        for threads in options.threads:
            speeds = measure(checkpoint, options.size, options.residues, threads)
            together = side_by_side(threads, checkpoint, options.size, options.residues)
            packed, fair_esm = speeds["packed"], speeds["fair-esm"]
            ratio = packed / fair_esm
            print(f"| {threads} | {packed:,.0f} | {fair_esm:,.0f} | {ratio:.2f} | {together:,.0f} |", flush=True)


if __name__ == "__main__":
    main()
