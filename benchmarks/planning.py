"""How long planning takes and how much memory, beside a bare Biopython parse of the same files.

`python benchmarks/planning.py` makes FASTA files of 10 thousand to 10 million records (3.1 billion residues), and runs
over each set the parse and the whole plan step, as the workflow runs it, each in a process of its own. It prints a
table, and with `--json` writes all figures. `--smoke` is small enough for any machine.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np

SCRIPTS = Path(__file__).resolve().parents[1] / "workflow" / "scripts"
SIZES = (10_000, 100_000, 1_000_000, 10_000_000)
MAX_FILES = 10
LINE = 60
MEAN_RESIDUES = 310
GROUPS = 8
# As the rule of the plan step allows on a machine whose cores are all for it.
PROCESSES = min(4, os.cpu_count() or 1)


# The input


def write_input(folder: Path, records: int, seed: int = 0) -> list[Path]:
    """FASTA files with `records` records in all, in lines of 60: most of them plain, and some of what people have.

    Lengths are lognormal around 310 residues. Of each file's records 4% repeat one of the same file, 1% one of the
    first file, 1% end in `*`, 1% are in lower case; 0.1% are rejected: empty, with a J, with a stop inside, or
    nucleotides.
    """
    files = min(MAX_FILES, max(1, records // 10_000))
    shared: list[bytes] = []
    paths = []
    for number in range(files):
        path = folder / f"part{number}.fasta"
        count = records * (number + 1) // files - records * number // files
        with open(path, "wb") as handle:
            for start in range(0, count, 100_000):
                rng = np.random.default_rng([seed, number, start])
                bodies = _bodies(min(100_000, count - start), rng, shared)
                shared = shared or bodies[:1000]
                first = f"file{number}_"
                handle.write(
                    b"".join(
                        b">%b%d made-up protein %d OS=Nothing that lives\n%b" % (first.encode(), i, i, body)
                        for i, body in enumerate(bodies, start)
                    )
                )
        paths.append(path)
    return paths


def _bodies(count: int, rng: np.random.Generator, shared: list[bytes]) -> list[bytes]:
    """The lines under each header."""
    sigma = 0.7
    lengths = rng.lognormal(np.log(MEAN_RESIDUES) - sigma**2 / 2, sigma, count).clip(20, 35_000).astype(int)
    lines = lengths // LINE + 1
    letters = np.frombuffer(b"LAGVSERTIDPKQNFYMHWC", np.uint8)
    text = np.full((int(lines.sum()), LINE + 1), ord("\n"), np.uint8)
    text[:, :LINE] = letters[rng.integers(0, 20, (len(text), LINE), np.uint8)]
    residues = text.tobytes()
    starts = (np.cumsum(lines) - lines) * (LINE + 1)
    ends = starts + lengths // LINE * (LINE + 1) + lengths % LINE
    bodies = [residues[start:end] + b"\n" for start, end in zip(starts.tolist(), ends.tolist())]
    chance = rng.random(count)
    for i in np.flatnonzero(chance < 0.071).tolist():
        body, kind = bodies[i], chance[i]
        if kind < 0.04:
            bodies[i] = bodies[int(rng.integers(0, i + 1))]
        elif kind < 0.05 and shared:
            bodies[i] = shared[int(rng.integers(0, len(shared)))]
        elif kind < 0.06:
            bodies[i] = body[:-1] + b"*\n"
        elif kind < 0.07:
            bodies[i] = body.lower()
        else:
            bodies[i] = (b"", b"MJ" + body, b"MK*" + body, b"ACGT" * 30 + b"\n")[i % 4]
    return bodies


# What is measured; each runs in a process of its own


def parse(files: list[str], folder: Path) -> dict:
    from Bio.SeqIO.FastaIO import SimpleFastaParser

    records = residues = 0
    for file in files:
        with open(file) as handle:
            for _, sequence in SimpleFastaParser(handle):
                records += 1
                residues += len(sequence)
    return {"records": records, "residues": residues}


def plan(files: list[str], folder: Path) -> dict:
    """The plan step's script, with what Snakemake would hand it."""
    sys.path.insert(0, str(SCRIPTS))
    import plan as step

    from esmflow.files import read_json

    config = read_json(folder / "job.json")
    outputs = SimpleNamespace(
        records=str(folder / "plan" / "records.parquet"),
        plan=str(folder / "plan" / "plan.json"),
        candidates=str(folder / "plan" / "candidates.fasta"),
        groups=[str(folder / "plan" / "shards" / f"group-{g}") for g in range(GROUPS)],
    )
    inputs = SimpleNamespace(fasta=files, model=config["model"], checkpoint=config["checkpoint"], variants=[])
    stems = [Path(file).stem for file in files]
    cut = {"groups": GROUPS, "work": 0.0, "least": 0.0}
    params = SimpleNamespace(samples=stems, annotations=[()] * len(files), groups=cut, **config["params"])
    settings = {
        "formats": ["h5", "pt"],
        "pooled_precision": "fp32",
        "disk_check": False,
        "attention": {"max_gigabytes": 1},
    }
    job = SimpleNamespace(input=inputs, output=outputs, params=params, config=settings, threads=PROCESSES)
    step.plan(step.plan_settings(job))
    found = read_json(outputs.plan)
    return {key: found[key] for key in ("records", "rejected", "duplicates")} | {
        "records.parquet, bytes": os.path.getsize(outputs.records),
        "shards": sum(group["shards"] for group in found["groups"]),
    }


MEASURED = {"parse": parse, "plan": plan}


def write_job(folder: Path) -> None:
    """A model and a configuration as the workflow has them at this point: the 3B model's shape, no weight."""
    sys.path.insert(0, str(SCRIPTS))
    import torch
    import yaml

    from esmflow.checkpoint.file import write_checkpoint
    from esmflow.checkpoint.models import ModelDimensions
    from esmflow.config.configuration import with_defaults
    from esmflow.files import write_json
    from esmflow.method import computing_method

    checkpoint = folder / "checkpoint.safetensors"
    info = write_checkpoint(
        checkpoint, {"weight": torch.zeros(4)}, name="made up", dimensions=ModelDimensions(36, 2560, 40, True, True)
    )
    write_json(folder / "model.json", asdict(info))
    schema = SCRIPTS.parent / "schemas" / "config.schema.yaml"
    config = with_defaults({}, yaml.safe_load(schema.read_text()))
    keys = ("max_residues", "nucleotide_sequences", "assignment", "shard_residues", "gpus_per_job")
    params = {
        **{key: config[key] for key in keys},
        "method": computing_method(config),
        "store": str(folder / "store"),
        "plan_number": {"plan number": 0},
        "reading": {"gaps": config["gaps"], "id": config["id"]},
    }
    write_json(
        folder / "job.json", {"model": str(folder / "model.json"), "checkpoint": str(checkpoint), "params": params}
    )


def child(what: str, folder: Path) -> None:
    found = MEASURED[what](sorted(map(str, (folder / "input").iterdir())), folder)
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    status = Path("/proc/self/status").read_text()
    own = int(status.split("VmHWM:")[1].split()[0])
    print(
        json.dumps(
            found
            | {
                "cpu_seconds": sum(u.ru_utime + u.ru_stime for u in used),
                # Kilobytes on Linux. Workers are counted as if all were as large as the largest, at the same time.
                "peak_memory_bytes": 1024 * (own + (PROCESSES - 1) * used[1].ru_maxrss),
            }
        )
    )


def measure(what: str, folder: Path) -> dict:
    shutil.rmtree(folder / "plan", ignore_errors=True)
    os.sync()
    load = os.getloadavg()[0]
    started = time.perf_counter()
    run = subprocess.run([sys.executable, __file__, "--child", what, str(folder)], stdout=subprocess.PIPE, check=True)
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "load_before": load, **json.loads(run.stdout)}


# The table


def row(figures: dict) -> str:
    parsed, planned = figures["parse"], figures["plan"]
    cells = [
        f"{parsed['records']:,}",
        f"{figures['input_bytes'] / 1e6:,.0f} MB",
        *(f"{run['seconds']:.1f} s ({run['cpu_seconds']:.1f})" for run in (parsed, planned)),
        f"{planned['seconds'] / parsed['seconds']:.2f}",
        f"{1e6 * planned['seconds'] / planned['records']:.1f} µs",
        f"{planned['peak_memory_bytes'] / 1e6:,.0f} MB",
        f"{max(run['load_before'] for run in (parsed, planned)):.1f}",
    ]
    return "| " + " | ".join(cells) + " |"


HEADER = """\
| records | input | bare parse, wall (CPU) | plan, wall (CPU) | plan / parse | one record | peak memory | load before |
|---|---|---|---|---|---|---|---|"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="numbers of records")
    parser.add_argument("--repeat", type=int, default=1, help="runs of each; the quickest counts")
    parser.add_argument("--folder", help="where the files go (about 7 GB at 10 million records); they are deleted")
    parser.add_argument("--json", help="also write all figures to this file")
    parser.add_argument("--smoke", action="store_true", help="2,000 records")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child[0], Path(options.child[1]))
        return

    versions = {name: importlib.metadata.version(name) for name in ("biopython", "pyarrow", "numpy")}
    where = {"cores": os.cpu_count(), "python": platform.python_version(), **versions}
    print(", ".join(f"{key} {value}" for key, value in where.items()), end="\n\n")
    print(HEADER, flush=True)
    sizes = []
    for records in [2000] if options.smoke else options.sizes:
        with tempfile.TemporaryDirectory(dir=options.folder, prefix="esmflow-planning-") as name:
            folder = Path(name)
            (folder / "input").mkdir()
            write_input(folder / "input", records)
            write_job(folder)
            figures: dict = {"input_bytes": sum(f.stat().st_size for f in (folder / "input").iterdir())}
            runs = [{what: measure(what, folder) for what in MEASURED} for _ in range(options.repeat)]
            for what in MEASURED:
                figures[what] = min((run[what] for run in runs), key=lambda run: run["seconds"])
            figures["runs"] = runs
            sizes.append(figures)
            print(row(figures), flush=True)
    if options.json:
        Path(options.json).write_text(json.dumps({"where": where, "sizes": sizes}, indent=2) + "\n")


if __name__ == "__main__":
    main()
