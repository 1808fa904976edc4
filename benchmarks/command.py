"""Times `esmflow embed` from the first keystroke to the prompt, and shows what each second went to.

python benchmarks/command.py --case human --gpus 1            # 20,600 proteins like the human proteome's, 650M
python benchmarks/command.py --case viral --size 3B --share 0.1
python benchmarks/command.py --smoke                          # a toy model and few proteins on any machine
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import psutil

PROJECT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(Path(__file__).parent), str(PROJECT / "workflow" / "scripts")]

import synthetic  # noqa: E402

from esmflow.slots.gpus import driver_gpus  # noqa: E402
from esmflow.text import plural  # noqa: E402

_STEP = re.compile(r"/tmp\w+\.(\w+)\.py$")
LETTERS = np.frombuffer(b"LAGVSERTIDPKQNFYMHWC", dtype=np.uint8)


class Steps(threading.Thread):
    """Looks at all processes below this one 20 times a second. `seen`: by step, when it began and was last seen."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.seen: dict[str, list[float]] = {}
        self._ended = threading.Event()

    def run(self) -> None:
        while not self._ended.wait(0.05):
            for process in psutil.Process().children(recursive=True):
                try:
                    began, words = process.create_time(), process.cmdline()
                except psutil.Error:
                    continue
                step = next((found[1] for word in words if (found := _STEP.search(word))), None)
                if step:
                    self.seen.setdefault(step, [began, began])[1] = time.time()

    def end(self) -> None:
        self._ended.set()
        self.join()


def human_lengths(count: int) -> np.ndarray:
    """Lengths like those of the human reference proteome: median 415, mean about 553, titin's isoform of 34,350."""
    lengths = np.random.default_rng(0).lognormal(np.log(415), 0.75, count).clip(20, 9_000).astype(int)
    lengths[:4] = (34_350, 14_507, 8_799, 8_797)
    return lengths


def viral_lengths(count: int) -> np.ndarray:
    """Peptides of 20 to 166 residues."""
    return np.random.default_rng(0).integers(20, 167, count)


CASES = {"human": (human_lengths, 20_600), "viral": (viral_lengths, 800_000)}


def write_input(folder: Path, size: str, lengths: np.ndarray, device: str) -> None:
    """One FASTA file of random proteins, and a fair-esm checkpoint with random weights."""
    draw = np.random.default_rng(1)
    with open(folder / "proteins.fasta", "w") as fasta:
        for number, length in enumerate(lengths):
            fasta.write(f">protein{number}\n{LETTERS[draw.integers(0, 20, length)].tobytes().decode()}\n")
    synthetic.write_fair_esm(folder / f"random_{size}.pt", size, synthetic.random_tensors(size, device))


def run_command(folder: Path, name: str, words: list[str]) -> dict[str, float]:
    """Runs the command in an empty folder. Returns seconds by step, in the order in which they began."""
    command = [sys.executable, "-c", "from esmflow.cli.main import main; main()", "embed", "proteins.fasta", "-o", name]
    environment = {**os.environ, "PYTHONPATH": f"{PROJECT}/workflow/scripts:{os.environ.get('PYTHONPATH', '')}"}
    # Where it is forbidden to keep bytecode, as in some images, every step would compile all that it imports.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    steps = Steps()
    steps.start()
    started = time.time()
    run = subprocess.run([*command, *words], cwd=folder, env=environment)
    ended = time.time()
    steps.end()
    if run.returncode != 0:
        raise SystemExit(f"{name}: the command ended with exit code {run.returncode}")
    figures = {"in all": ended - started}
    for step, (began, last) in sorted(steps.seen.items(), key=lambda item: item[1]):
        figures[f"{step} begins"], figures[f"{step} takes"] = began - started, last - began
    runs = [json.loads(path.read_text()) for path in (folder / name).glob("results/embed/group-*/run.json")]
    shards = [shard for run in runs for shard in run["shards"]]
    figures["first shard begins"] = min(shard["started"] for shard in shards) - started
    figures["last shard ends"] = max(shard["ended"] for shard in shards) - started
    figures["residues"] = sum(run["residues"] for run in runs)
    figures["sequences"] = sum(run["sequences"] for run in runs)
    figures["jobs"] = len(runs)
    return figures


def as_markdown(figures: dict[str, float]) -> str:
    """One line for each step."""
    steps = [name.removesuffix(" begins") for name in figures if name.endswith(" begins") and " shard" not in name]
    lines = ["| step | begins, s | takes, s |", "|---|---|---|"]
    lines += [f"| {step} | {figures[f'{step} begins']:.1f} | {figures[f'{step} takes']:.1f} |" for step in steps]
    embedding = figures["last shard ends"] - figures["first shard begins"]
    lines.append(f"| of it, from the first shard to the last | {figures['first shard begins']:.1f} | {embedding:.1f} |")
    lines.append(f"| **in all** | 0 | **{figures['in all']:.1f}** |")
    rate = figures["residues"] / embedding
    lines += [
        "",
        f"{figures['residues']:,.0f} residues of {figures['sequences']:,.0f} sequences in {figures['jobs']} jobs: ",
    ]
    lines[-1] += f"{rate:,.0f} aa/s while embedding, {figures['sequences'] / figures['in all']:,.0f} sequences/s in all"
    return "\n".join(lines)


def main() -> None:
    """Writes the input, runs the command for each number of GPUs and precision, and prints a table for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, default="human")
    parser.add_argument("--size", default="650M", choices=sorted(synthetic.SIZES))
    parser.add_argument("--share", type=float, default=1.0, help="of the case's sequences")
    parser.add_argument("--gpus", nargs="+", type=int, default=[1])
    parser.add_argument("--precisions", nargs="+", default=["bf16"])
    parser.add_argument("--smoke", action="store_true", help="a toy model on a CPU")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    if options.smoke:
        options.size, options.share, options.gpus, options.precisions = "smoke", 0.003, [0], ["fp32"]
    elif max(options.gpus) > (there := len(driver_gpus() or [])):
        asked = plural(max(options.gpus), "GPU")
        parser.error(f"{asked} asked for, {there} here: name fewer with --gpus, or use --smoke")
    make, count = CASES[options.case]
    results = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        device = "cpu" if options.smoke else "cuda"
        synthetic.write_apart(write_input, folder, options.size, make(int(count * options.share)), device)
        # Speed is all that random weights can tell: whatever they give is in order.
        common = ["--model", f"random_{options.size}.pt", "--set", "verify.min_cosine=-1"]
        common += ["--set", "verify.max_relative_error=1e9", "--set", f"slot_lock_folder={folder / 'slots'}"]
        for gpus in options.gpus:
            for precision in options.precisions:
                case = f"{options.case}, {options.size}, {precision}, {gpus} GPU"
                words = [*common, "--gpus", str(gpus), "--set", f"precision={precision}"]
                results[case] = run_command(folder, f"out-{gpus}-{precision}", words)
                print(f"## {case}\n\n{as_markdown(results[case])}\n", flush=True)
    from engine import surroundings

    where = surroundings(device)
    print(", ".join(f"{name} {version}" for name, version in where.items()))
    if options.json:
        options.json.write_text(json.dumps({"where": where, "figures": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
