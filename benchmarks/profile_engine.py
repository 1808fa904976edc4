"""Prints where the GPU's time goes in one model: kernels by kind, and how long the GPU waits for the host.

python benchmarks/profile_engine.py 650M --kind viral
python benchmarks/profile_engine.py 650M --sums                          # what it costs to add up in fp32
python benchmarks/profile_engine.py 8M --sums --checkpoint 8m.safetensors   # with real weights, for the cosines
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "workflow" / "scripts")]

import peers  # noqa: E402
import synthetic  # noqa: E402
from engine import embed_means  # noqa: E402

from esmflow.arrays import Outputs  # noqa: E402
from esmflow.engine.packed import PackedEngine, auto_token_budget  # noqa: E402

KINDS = {
    "layer norm": ("_normalise", "layer_norm"),
    "rotation": ("_rotate",),
    "attention": ("_attend", "flash", "fmha"),
    "pooling": ("segment_reduce",),
    "copies": ("memcpy", "memset"),
    "matrix products": ("gemm", "cutlass", "nvjet", "sm90_xmma"),
}


def kind_of(kernel: str) -> str:
    """The part of the model that a kernel belongs to, by its name."""
    name = kernel.lower()
    return next((kind for kind, marks in KINDS.items() if any(mark in name for mark in marks)), "other")


def profile(engine: PackedEngine, packs: list[list[str]]) -> tuple[dict[str, float], dict[str, float], float]:
    """Milliseconds by kind, by kernel, and from first to last kernel, over `packs` launched at once."""
    engine.fetch(engine.launch(engine.prepare(packs[0])))
    prepared = [engine.prepare(pack) for pack in packs]
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        begin.record()
        launched = [engine.launch(pack) for pack in prepared]
        end.record()
        for result in launched:
            engine.fetch(result)
    kinds: dict[str, float] = defaultdict(float)
    kernels: dict[str, float] = {}
    for event in trace.key_averages():
        milliseconds = event.self_device_time_total / 1000
        if milliseconds:
            kinds[kind_of(event.key)] += milliseconds
            kernels[event.key] = milliseconds
    return kinds, kernels, begin.elapsed_time(end)


def allow_16_bit_sums(precision: str, allowed: bool) -> None:
    """Whether a matrix product in `precision` may add up its parts in 16 bits, where it was split over a GPU."""
    setattr(torch.backends.cuda.matmul, f"allow_{precision}_reduced_precision_reduction", allowed)


def compare_sums(checkpoint: Path, layer: int, kind: str, budget: int, packs: int, device: str) -> list[str]:
    """A table: speed and cosine against fp32 with 16-bit sums allowed and not, by turns, with the same weights.

    Products of few rows are the ones that are split: cosines are taken in packs and of sequences alone.
    """
    outputs = Outputs((layer,), ("mean",))
    sequences, few = synthetic.sequences(kind, packs * budget), synthetic.sequences(kind, 2 * budget, seed=1)[:200]
    exact = embed_means(PackedEngine.load(checkpoint, outputs, "fp32", device), 4096)(few)
    lines = ["| precision | 16-bit sums | aa/s | cosine in packs, min | alone, min |", "|---|---|---|---|---|"]
    for precision in ("fp16", "bf16"):
        engine = PackedEngine.load(checkpoint, outputs, precision, device)
        for allowed in (True, False, True, False):
            allow_16_bit_sums(precision, allowed)
            speed = peers.residues_per_second(embed_means(engine, budget), sequences, device)
            cosines = [lowest_cosine(embed_means(engine, tokens)(few), exact) for tokens in (budget, 1)]
            shown = " | ".join(f"{cosine:.7f}" for cosine in cosines)
            lines.append(f"| {precision} | {'allowed' if allowed else 'not'} | {speed:,.0f} | {shown} |")
    return lines


def lowest_cosine(found: np.ndarray, exact: np.ndarray) -> float:
    """The lowest cosine between vectors of the same rows."""
    found, exact = found.astype(np.float64), exact.astype(np.float64)
    return float(((found * exact).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(exact, axis=1)).min())


def main() -> None:
    """Profiles three packs of random sequences, or compares sums."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=list(synthetic.SIZES))
    parser.add_argument("--kind", choices=["proteome", "viral"], default="proteome")
    parser.add_argument("--budget", type=int, help="tokens per pack; chosen by the engine if left out")
    parser.add_argument("--sums", action="store_true", help="compare sums in 16 bits and in fp32; runs on a CPU too")
    parser.add_argument("--checkpoint", type=Path, help="with --sums: a converted checkpoint instead of random weights")
    options = parser.parse_args()
    dimensions = synthetic.SIZES[options.size]
    if options.sums:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        budget = options.budget or auto_token_budget(dimensions, "bf16", device)
        with tempfile.TemporaryDirectory() as folder:
            path = options.checkpoint or Path(folder) / "model.safetensors"
            if not options.checkpoint:
                synthetic.write_converted(path, options.size, synthetic.random_tensors(options.size, device))
            packs = 20 if device == "cuda" else 1
            print(*compare_sums(path, dimensions.layers, options.kind, budget, packs, device), sep="\n")
        return
    if not torch.cuda.is_available():
        parser.error("no GPU here: only --sums runs on a CPU")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        synthetic.write_converted(path, options.size, synthetic.random_tensors(options.size, "cuda"))
        engine = PackedEngine.load(path, Outputs((dimensions.layers,), ("mean",)), "bf16", "cuda")
    budget = options.budget or auto_token_budget(dimensions, "bf16", "cuda")
    sequences = synthetic.sequences(options.kind, 20 * budget)
    batches = engine.batches([len(s) for s in sequences], budget)
    chosen = [batches[int(len(batches) * share)] for share in (0.15, 0.5, 0.85)]
    kinds, kernels, elapsed = profile(engine, [[sequences[i] for i in batch] for batch in chosen])
    print(
        f"{options.size}, {options.kind}, 3 packs of {budget} tokens, {torch.cuda.get_device_name()}: {elapsed:.1f} ms"
    )
    for kind, milliseconds in sorted(kinds.items(), key=lambda item: -item[1]):
        print(f"  {kind:16} {milliseconds:8.2f} ms {milliseconds / elapsed:6.1%}")
    print(f"  {'idle':16} {elapsed - sum(kinds.values()):8.2f} ms")
    for kernel, milliseconds in sorted(kernels.items(), key=lambda item: -item[1])[:12]:
        print(f"    {milliseconds:8.2f} ms  {kernel[:110]}")


if __name__ == "__main__":
    main()
