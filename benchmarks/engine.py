"""Measures the packed engine beside its peers, in one process, and prints one table.

python benchmarks/engine.py                    # everything, on a GPU: about 8 minutes
python benchmarks/engine.py --only 8M-proteome startup
python benchmarks/engine.py --only ESMC-600M-proteome ESMC-6B-proteome
python benchmarks/engine.py --smoke            # a toy model on any machine, in seconds: checks the benchmark itself
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from queue import Queue

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "workflow" / "scripts")]

import peers  # noqa: E402
import synthetic  # noqa: E402
from job import measure_job  # noqa: E402

from esmflow.arrays import Array, Outputs  # noqa: E402
from esmflow.engine.packed import PackedEngine, auto_token_budget  # noqa: E402

PADDED_BUDGETS = (16384, 65536)


@dataclass(frozen=True)
class Case:
    """One model on sequences of one kind. residues: how many the engine is timed on; peers get a share of them."""

    size: str
    kind: str
    residues: int
    peer_share: float = 0.25
    fair_esm: bool = False
    transformers: bool = False
    per_residue: bool = False

    @property
    def name(self) -> str:
        return f"{self.size}-{self.kind}"


CASES = (
    Case("3B", "proteome", 600_000, fair_esm=True, transformers=True),
    Case("650M", "viral", 2_500_000, peer_share=0.08, fair_esm=True),
    Case("650M", "proteome", 2_000_000, transformers=True, per_residue=True),
    Case("150M", "proteome", 6_000_000, transformers=True),
    Case("8M", "proteome", 40_000_000, peer_share=0.15, transformers=True),
    Case("ESMC-600M", "proteome", 2_000_000, transformers=True),
    Case("ESMC-6B", "proteome", 300_000, transformers=True),
)
NAMES = " ".join(case.name for case in CASES)
SMOKE = (
    Case("smoke", "viral", 3_000, peer_share=1.0, fair_esm=True, transformers=True, per_residue=True),
    Case("smoke-ESMC", "viral", 3_000, peer_share=1.0, transformers=True),
)


def batches_done(
    engine: PackedEngine, sequences: Sequence[str], budget: int, in_flight: int = 3
) -> Iterator[tuple[list[int], dict[str, np.ndarray]]]:
    """Runs the engine over all sequences with preparation, computation and copies overlapped; yields batch by batch."""
    launched: deque[tuple[list[int], object]] = deque()
    with ThreadPoolExecutor(1) as host:
        prepared: deque[tuple[list[int], object]] = deque()
        waiting = deque(engine.batches([len(s) for s in sequences], budget))
        while waiting or prepared or launched:
            while waiting and len(prepared) < 2:
                batch = waiting.popleft()
                prepared.append((batch, host.submit(engine.prepare, [sequences[i] for i in batch])))
            if prepared and len(launched) < in_flight:
                batch, ready = prepared.popleft()
                launched.append((batch, engine.launch(ready.result())))
            else:
                batch, result = launched.popleft()
                yield batch, engine.fetch(result)


def embed_means(engine: PackedEngine, budget: int) -> Callable[[Sequence[str]], np.ndarray]:
    """A function from sequences to their mean vectors, in the sequences' order."""
    name = Array("mean", engine.outputs.layers[-1]).name

    def embed(sequences: Sequence[str]) -> np.ndarray:
        means = np.empty((len(sequences), engine.model.weights.embedding.shape[1]), np.float32)
        for batch, arrays in batches_done(engine, sequences, budget):
            means[batch] = arrays[name]
        return means

    return embed


def write_per_residue(engine: PackedEngine, budget: int, path: Path) -> Callable[[Sequence[str]], None]:
    """A function that writes the sequences' per-residue arrays to one file, from a thread of its own."""

    def embed(sequences: Sequence[str]) -> None:
        arrays: Queue[dict[str, np.ndarray] | None] = Queue(maxsize=3)

        def write() -> None:
            with open(path, "wb") as handle:
                while (batch := arrays.get()) is not None:
                    for array in batch.values():
                        array.tofile(handle)

        writer = threading.Thread(target=write)
        writer.start()
        for _, batch in batches_done(engine, sequences, budget):
            arrays.put(batch)
        arrays.put(None)
        writer.join()

    return embed


def measure(case: Case, checkpoint: Path, device: str, budget: int | None) -> dict[str, float]:
    """All figures of one case: residues per second by engine, and the rates that bound them."""
    sequences = synthetic.sequences(case.kind, case.residues)
    few = synthetic.sequences(case.kind, int(case.residues * case.peer_share), seed=1)
    precision = "bf16" if device == "cuda" else "fp32"
    last = (synthetic.SIZES[case.size].layers,)
    figures: dict[str, float] = {}

    engine = PackedEngine.load(checkpoint, Outputs(last, ("mean",)), precision, device)
    budget = budget or auto_token_budget(synthetic.SIZES[case.size], precision, device)
    figures["tokens per pack"] = budget
    figures["packed"] = peers.residues_per_second(embed_means(engine, budget), sequences, device)
    lengths = [len(s) for s in sequences]
    figures["packed, model FLOP/s"] = synthetic.model_flops(case.size, lengths) / sum(lengths) * figures["packed"]
    figures["fc1 alone, FLOP/s"] = peers.fc1_flops_per_second(case.size, device, budget)
    if case.per_residue:
        engine = PackedEngine.load(checkpoint, Outputs(last, ("per_residue",), "fp16"), precision, device)
        with tempfile.TemporaryDirectory() as folder:
            embed = write_per_residue(engine, budget, Path(folder) / "per_residue")
            figures["packed, per-residue fp16 to disk"] = peers.residues_per_second(embed, sequences, device)
    del engine
    release(device)
    others = ("fp16", "int8") if synthetic.SIZES[case.size].family.eight_bits else ("fp16",)
    for other in others if device == "cuda" else ():
        engine = PackedEngine.load(checkpoint, Outputs(last, ("mean",)), other, device)
        figures[f"packed, {other}"] = peers.residues_per_second(embed_means(engine, budget), sequences, device)
        del engine
        release(device)

    if case.fair_esm:
        embed = peers.fair_esm(checkpoint, device, autocast=True, tokens_per_batch=3072)
        figures["fair-esm, autocast, 3072"] = peers.residues_per_second(embed, few, device, warm_up=1)
        del embed
        release(device)
    if case.transformers and has_transformers():
        with_budget = peers.transformers_sdpa(case.size, device)
        for padded in PADDED_BUDGETS:
            speed = peers.residues_per_second(with_budget(padded), few, device, warm_up=1)
            figures[f"transformers, SDPA, {padded}"] = speed
        del with_budget
        release(device)
    return figures


def has_transformers() -> bool:
    """Whether the second peer is installed; it is not among the project's dependencies."""
    return installed_version("transformers") is not None


def release(device: str) -> None:
    """Gives the device's memory back before the next model comes."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def measure_startup(size: str, folder: Path, device: str) -> dict[str, float]:
    """Seconds from a process's start to its first pack done, and to fair-esm's model on the device."""
    tensors = synthetic.random_tensors(size, device)
    converted = synthetic.write_converted(folder / "startup.safetensors", size, tensors)
    original = synthetic.write_fair_esm(folder / "esm2_startup.pt", size, tensors)
    del tensors
    release(device)
    figures = {}
    script = Path(__file__).with_name("startup.py")
    # First without compiled kernels on disk, as on a new machine.
    for name, loader, path, cache in (
        ("packed, first pack, nothing compiled yet", "packed", converted, "new"),
        ("packed, first pack", "packed", converted, "new"),
        ("fair-esm, model loaded", "fair-esm", original, "new"),
    ):
        start = time.perf_counter()
        environment = {**os.environ, "TRITON_CACHE_DIR": str(folder / cache)}
        subprocess.run([sys.executable, str(script), loader, str(path), device], check=True, env=environment)
        figures[name] = time.perf_counter() - start
    return figures


def measure_one_job(case: Case, folder: Path, device: str, seconds: float) -> dict[str, float]:
    """The embed job of a case's model on about so many seconds of work, and the engine alone on the same card."""
    checkpoint = folder / f"{case.size}.safetensors"
    if not checkpoint.exists():
        synthetic.write_converted(checkpoint, case.size, synthetic.random_tensors(case.size, device))
    engine = PackedEngine.load(checkpoint, Outputs((synthetic.SIZES[case.size].layers,), ("mean",)), "auto", device)
    embed = embed_means(engine, engine.default_token_budget())
    alone = peers.residues_per_second(embed, synthetic.sequences(case.kind, case.residues), device)
    del engine, embed
    release(device)
    sequences = synthetic.sequences(case.kind, max(case.residues, int(alone * seconds)), seed=2)
    return {"engine alone": alone, **measure_job(checkpoint, sequences, folder / "job", device)}


def ratios(results: dict[str, dict[str, float]]) -> list[tuple[str, str, float]]:
    """The table's lines: case, what is divided by what, ratio."""
    lines = []
    for name, figures in results.items():
        if name == "startup":
            ours, theirs = figures["packed, first pack"], figures["fair-esm, model loaded"]
            lines.append((name, "seconds to first pack over fair-esm's loader", ours / theirs))
            continue
        if name == "job":
            lines.append((name, "whole job over the engine alone", figures["whole job"] / figures["engine alone"]))
            continue
        packed = figures["packed"]
        if "packed, int8" in figures:
            lines.append((name, "int8 over bf16", figures["packed, int8"] / packed))
        if "fair-esm, autocast, 3072" in figures:
            lines.append((name, "over fair-esm autocast", packed / figures["fair-esm, autocast, 3072"]))
        padded = [speed for peer, speed in figures.items() if peer.startswith("transformers")]
        if padded:
            lines.append((name, "over transformers SDPA, best budget", packed / max(padded)))
        lines.append((name, "model FLOP/s over fc1's", figures["packed, model FLOP/s"] / figures["fc1 alone, FLOP/s"]))
        if "packed, per-residue fp16 to disk" in figures:
            share = figures["packed, per-residue fp16 to disk"] / packed
            lines.append((name, "per-residue to disk over mean only", share))
    return lines


def surroundings(device: str) -> dict[str, str]:
    """The hardware and versions that the figures hold for."""
    versions = {name: installed_version(name) for name in ("torch", "triton", "fair-esm", "transformers", "numpy")}
    hardware = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    return {
        "hardware": hardware,
        "python": platform.python_version(),
        "cuda": torch.version.cuda or "none",
        **{name: found or "not installed" for name, found in versions.items()},
    }


def installed_version(package: str) -> str | None:
    """A package's version, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def unit_of(case: str, what: str) -> str:
    """The unit of one figure."""
    if case == "startup" or "seconds" in what:
        return "s"
    if "FLOP/s" in what:
        return "TFLOP/s"
    return "tokens" if "tokens" in what else "aa/s"


def as_markdown(where: dict[str, str], results: dict[str, dict[str, float]]) -> str:
    """The table as printed and committed."""
    lines = [", ".join(f"{k} {v}" for k, v in where.items()), "", "| case | what | figure |", "|---|---|---|"]
    for name, figures in results.items():
        for what, figure in figures.items():
            unit = unit_of(name, what)
            shown = (
                f"{figure / 1e12:.1f}" if unit == "TFLOP/s" else f"{figure:.1f}" if unit == "s" else f"{figure:,.0f}"
            )
            lines.append(f"| {name} | {what.removesuffix(', FLOP/s')} | {shown} {unit} |")
    lines += ["", "| case | ratio | |", "|---|---|---|"]
    lines += [f"| {name} | {what} | {ratio:.2f} |" for name, what, ratio in ratios(results)]
    return "\n".join(lines)


def main() -> None:
    """Runs the cases asked for; prints the table and writes the figures where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a toy model, on a CPU too")
    parser.add_argument("--only", nargs="+", metavar="CASE", help="some of: job startup " + NAMES)
    parser.add_argument("--seconds", type=float, default=60, help="work of the job, in seconds of the engine alone")
    parser.add_argument("--budget", type=int, help="tokens per pack; chosen by the engine if left out")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.smoke:
        parser.error("no GPU here: use --smoke")
    cases = SMOKE if options.smoke else CASES
    wanted = options.only or [*(case.name for case in cases), "job", "startup"]
    results: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for case in (c for c in cases if c.name in wanted):
            checkpoint = folder / f"{case.size}.safetensors"
            if not checkpoint.exists():
                synthetic.write_converted(checkpoint, case.size, synthetic.random_tensors(case.size, device))
            results[case.name] = measure(case, checkpoint, device, options.budget)
            print(case.name, {k: round(v) for k, v in results[case.name].items()}, file=sys.stderr, flush=True)
        if "job" in wanted:
            results["job"] = measure_one_job(cases[0], folder, device, 0 if options.smoke else options.seconds)
        if "startup" in wanted:
            results["startup"] = measure_startup("smoke" if options.smoke else "3B", folder, device)
    where = surroundings(device)
    print(as_markdown(where, results))
    if options.json:
        ratio_table = [{"case": c, "what": w, "ratio": r} for c, w, r in ratios(results)]
        content = {"where": where, "figures": results, "ratios": ratio_table}
        options.json.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
