"""Measures the whole workflow on 1, 2, 4, 8 GPUs of one machine, and checks that no card is shared, idle or wrong.

python benchmarks/scaling.py                              # as many GPUs as this machine has
python benchmarks/scaling.py --sizes 650M --slots 1 2 --seconds 150 --json scaling.json
python benchmarks/scaling.py --sizes 3B --slots 1 2 --precisions bf16 int8 --groups 4
python benchmarks/scaling.py --smoke                      # a toy model on CPU slots: checks the benchmark itself
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import psutil
import yaml

PROJECT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(Path(__file__).parent), str(PROJECT / "workflow" / "scripts")]

import synthetic  # noqa: E402

from esmflow.embedding.heartbeat import State  # noqa: E402
from esmflow.embedding.status import StatusError, read_status  # noqa: E402
from esmflow.slots.gpus import driver_gpus  # noqa: E402
from esmflow.text import plural  # noqa: E402

# About what one H100 does in a second: it only sizes the input.
RESIDUES_PER_SECOND = {"8M": 10_000_000, "150M": 1_100_000, "650M": 370_000, "3B": 100_000, "smoke": 20_000}
SHARDS_PER_GROUP = 8


@dataclass(frozen=True)
class Layout:
    """How the workflow uses the machine: so many slots, each job on `gpus_per_job` of them."""

    slots: int
    gpus_per_job: int = 1
    kill: bool = False

    @property
    def name(self) -> str:
        if self.kill:
            return f"{self.slots} slots, a worker killed"
        if self.gpus_per_job > 1:
            return f"{self.slots} slots, one job on {self.gpus_per_job}"
        return f"{self.slots} slots" if self.slots > 1 else "1 slot"


class ProcessWatch(threading.Thread):
    """Asks the driver once a second which processes compute on each GPU. `seen`: (time, uuid, process ids)."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.seen: list[tuple[float, str, frozenset[int]]] = []
        self._ended = threading.Event()

    def run(self) -> None:
        import pynvml

        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        while not self._ended.wait(1.0):
            for handle in handles:
                processes = frozenset(p.pid for p in pynvml.nvmlDeviceGetComputeRunningProcesses(handle))
                self.seen.append((time.time(), pynvml.nvmlDeviceGetUUID(handle), processes))

    def end(self) -> None:
        self._ended.set()
        self.join()


def write_input(folder: Path, size: str, residues: int, device: str) -> None:
    """A sample sheet with one FASTA file, and a fair-esm checkpoint with random weights."""
    tensors = synthetic.random_tensors(size, device)
    synthetic.write_fair_esm(folder / f"random_{size}.pt", size, tensors)
    with open(folder / "proteins.fasta", "w") as fasta:
        for number, sequence in enumerate(synthetic.sequences("proteome", residues)):
            fasta.write(f">protein{number}\n{sequence}\n")
    (folder / "samples.tsv").write_text(f"sample\tfasta\nproteins\t{folder / 'proteins.fasta'}\n")


def run_workflow(
    folder: Path, size: str, residues: int, layout: Layout, tokens: list[str], changes: dict[str, Any]
) -> dict[str, Any]:
    """Runs the workflow from FASTA to embeddings in this layout. Returns seconds, and what the driver saw meanwhile.

    changes: configuration keys and their values.
    """
    work = folder / f"{layout.name} {changes['precision']}".replace(" ", "-").replace(",", "")
    (work / "config").mkdir(parents=True)
    config = {
        "samples": str(folder / "samples.tsv"),
        "model": str(folder / f"random_{size}.pt"),
        "gpus_per_job": layout.gpus_per_job,
        "shard_residues": max(1000, residues // (changes["groups"] * SHARDS_PER_GROUP)),
        "formats": ["h5"],
        "slot_lock_folder": str(folder / "slots"),
        "cpu_slots": layout.slots,
        "threads": 1,
        **changes,
    }
    if layout.gpus_per_job > 1:
        config["groups"] = max(1, layout.slots // layout.gpus_per_job)
    (work / "config" / "config.yaml").write_text(yaml.safe_dump(config))
    snakefile, profile = PROJECT / "workflow" / "Snakefile", PROJECT / "profiles" / "default"
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(snakefile), "--workflow-profile", str(profile)]
    command += ["--cores", str(max(2, layout.slots)), "--resources", f"gpu={layout.slots}", "--quiet", "all"]
    # The model is converted by the first run.
    command += ["--cache", "model"]
    environment = {**os.environ, "SNAKEMAKE_OUTPUT_CACHE": str(folder / "converted")}
    if tokens:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(tokens[: layout.slots])
    watch = ProcessWatch() if tokens else None
    if watch:
        watch.start()
    started = time.time()
    run = subprocess.Popen(command, cwd=work, env=environment)
    if layout.kill:
        kill_a_worker(run, work / "results")
    if run.wait() != 0:
        raise SystemExit(f"{layout.name}: the workflow ended with exit code {run.returncode}")
    seconds = time.time() - started
    if watch:
        watch.end()
    runs = [json.loads(path.read_text()) for path in sorted(work.glob("results/embed/group-*/run.json"))]
    figures = stage_figures(runs, seconds)
    figures |= slot_checks(runs, watch.seen if watch else [])
    figures["restarts"] = sum(group["worker_restarts"] for group in runs)
    if layout.kill and not figures["restarts"]:
        raise SystemExit(f"{layout.name}: no worker had to be replaced; give them more to do (--seconds)")
    if changes["verify"]["sample"]:
        certificate = json.loads((work / "results" / "certificate.json").read_text())
        figures["certificate, s"] = certificate["seconds"]
        figures["certificate, s to load the model"] = certificate["model_load_seconds"]
    figures["embeddings"] = str(next(work.glob("results/embeddings/mean_*/embeddings.h5")))
    return figures


def kill_a_worker(run: subprocess.Popen, results: Path) -> None:
    """SIGKILLs one worker process: the first that has done some of its job and has half of it to do."""
    while run.poll() is None:
        time.sleep(0.1)
        # Before there is a plan there is no status, and processes end while they are looked at.
        with suppress(StatusError, psutil.Error):
            jobs = [group.job for group in read_status(results) if group.state is State.EMBEDDING and group.job]
            for job in (job for job in jobs if 0 < job.residues_done < job.residues / 2):
                children = psutil.Process(job.process).children()
                workers = [child for child in children if any("spawn_main" in word for word in child.cmdline())]
                if workers:
                    workers[0].kill()
                    return


def stage_figures(runs: list[dict], seconds: float) -> dict[str, Any]:
    """Rates: of the embed stage, from the first lease to the last release, and end to end."""
    residues = sum(group["residues"] for group in runs)
    workers = [worker for group in runs for worker in group["workers"]]
    stage = max(w["released"] for w in workers) - min(w["leased"] for w in workers)
    shards = [shard for group in runs for shard in group["shards"]]
    busy = sum(shard["ended"] - shard["started"] for shard in shards)
    return {
        "residues": residues,
        "embed stage, aa/s": residues / stage,
        "one worker while embedding, aa/s": residues / busy,
        "end to end, aa/s": residues / seconds,
        "embed stage, s": stage,
        "end to end, s": seconds,
    }


def slot_checks(runs: list[dict], seen: list[tuple[float, str, frozenset[int]]]) -> dict[str, Any]:
    """What the jobs wrote down about their slots, held against each other and against what the driver saw."""
    held: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for worker in (worker for group in runs for worker in group["workers"]):
        slot = worker["slot"]
        held[slot["uuid"] or slot["token"]].append((worker["leased"], worker["released"]))
    last_lease = max(start for spans in held.values() for start, _ in spans)
    shared = idle = 0.0
    for spans in held.values():
        for (_, end), (start, _) in pairwise(sorted(spans)):
            shared += max(0.0, end - start)
            # Until the last group has its slot, groups wait, and a free slot is idle.
            idle += max(0.0, min(start, last_lease) - end)
    checks: dict[str, Any] = {
        "slots used": len(held),
        "seconds shared": shared,
        "seconds idle while groups wait": idle,
    }
    if seen:
        checks["most processes on one GPU at once"] = max(len(processes) for _, _, processes in seen)
        checks["GPUs with processes"] = len({uuid for _, uuid, processes in seen if processes})
        workers = {shard["worker"] for group in runs for shard in group["shards"]}
        known = {process for _, _, processes in seen for process in processes}
        if known & workers:
            slots = [{w["device"]: w["slot"]["uuid"] for w in group["workers"]} for group in runs]
            homes = {s["worker"]: slot[s["device"]] for slot, group in zip(slots, runs) for s in group["shards"]}
            checks["processes on another GPU than their slot"] = sum(
                homes.get(process, uuid) != uuid for _, uuid, processes in seen for process in processes
            )
    return checks


def compare_embeddings(one: str, other: str) -> dict[str, float]:
    """Another run's vectors against the one-slot run's, row by row."""
    with h5py.File(one) as first, h5py.File(other) as second:
        a, b = first["embeddings"][:].astype(np.float64), second["embeddings"][:].astype(np.float64)
        if first["ids"][:].tolist() != second["ids"][:].tolist():
            raise SystemExit(f"{other}: the ids differ from those of {one}")
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    return {"lowest cosine to one slot": float(cosine.min()), "rows bitwise equal": float((a == b).all(1).mean())}


def layouts(slots: list[int], kinds: list[str]) -> list[Layout]:
    """Every layout to run: separate jobs, one job on all cards, and a worker killed where there are several."""
    several = [n for n in slots if n > 1]
    by_kind = {
        "separate": [Layout(n) for n in slots],
        "whole": [Layout(n, gpus_per_job=n) for n in several if n <= 4],
        "killed": [Layout(max(slots), kill=True)] if several else [],
    }
    return [layout for kind in kinds for layout in by_kind[kind]]


def as_markdown(where: dict[str, str], results: dict[str, dict[str, dict]]) -> str:
    """The table as printed and committed."""
    lines = [", ".join(f"{name} {version}" for name, version in where.items()), ""]
    lines += ["| model | layout | embed stage, aa/s | efficiency | end to end, aa/s | shared, s | idle, s | cosine |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for size, by_layout in results.items():
        one = by_layout.get("1 slot")
        for name, figures in by_layout.items():
            rate = figures["embed stage, aa/s"]
            efficiency = f"{rate / figures['slots used'] / one['embed stage, aa/s']:.1%}" if one else ""
            cosine = figures.get("lowest cosine to one slot")
            lines.append(
                f"| {size} | {name} | {rate:,.0f} | {efficiency} | {figures['end to end, aa/s']:,.0f} "
                f"| {figures['seconds shared']:.1f} | {figures['seconds idle while groups wait']:.1f} "
                f"| {'' if cosine is None else f'{cosine:.6f}'} |"
            )
    return "\n".join(lines)


def main() -> None:
    """Runs the layouts asked for; prints the table and writes the figures where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a toy model on two CPU slots")
    parser.add_argument("--sizes", nargs="+", default=["650M", "3B"], choices=sorted(RESIDUES_PER_SECOND))
    parser.add_argument("--slots", nargs="+", type=int, help="as many of 1 2 4 8 as there are GPUs if left out")
    parser.add_argument("--seconds", type=float, default=150, help="work for one H100")
    parser.add_argument("--precisions", nargs="+", default=["auto"])
    kinds = ["separate", "whole", "killed"]
    parser.add_argument("--layouts", nargs="+", default=kinds, choices=kinds)
    parser.add_argument("--groups", type=int, default=8, help="each is a start for its card")
    parser.add_argument("--verify", type=int, default=0, help="sequences that a certificate computes again")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    if options.smoke:
        options.sizes, options.seconds, options.groups = ["smoke"], 20, 2
        options.slots = options.slots or [1, 2]
    gpus = [] if options.smoke else driver_gpus() or []
    slots = options.slots or [n for n in (1, 2, 4, 8) if n <= len(gpus)] or [1]
    if not options.smoke and max(slots) > len(gpus):
        asked = plural(max(slots), "GPU")
        parser.error(f"{asked} asked for, {len(gpus)} here: name fewer with --slots, or use --smoke")
    from engine import surroundings

    device = "cuda" if gpus else "cpu"
    results: dict[str, dict[str, dict]] = {}
    for size in options.sizes:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            residues = int(RESIDUES_PER_SECOND[size] * options.seconds)
            synthetic.write_apart(write_input, folder, size, residues, device)
            (folder / "converted").mkdir()
            for layout in layouts(slots, options.layouts):
                for precision in options.precisions:
                    # Speed is all that random weights can tell: whatever they give is in order.
                    verify = {"sample": options.verify, "min_cosine": -1, "max_relative_error": 1e9}
                    changes = {"precision": precision, "groups": options.groups, "verify": verify}
                    tokens = [gpu.uuid for gpu in gpus]
                    figures = run_workflow(folder, size, residues, layout, tokens, changes)
                    of_model = results.setdefault(f"{size} {precision}", {})
                    if "1 slot" in of_model:
                        figures |= compare_embeddings(of_model["1 slot"]["embeddings"], figures["embeddings"])
                    of_model[layout.name] = figures
                    print(size, precision, layout.name, figures, file=sys.stderr, flush=True)
            for of_model in results.values():
                for figures in of_model.values():
                    figures.pop("embeddings", None)
    where = {**surroundings(device), "GPUs": str(len(gpus))}
    print(as_markdown(where, results))
    if options.json:
        options.json.write_text(json.dumps({"where": where, "figures": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
