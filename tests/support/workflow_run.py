"""Run the workflow in a folder of its own, as a user would."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import yaml

PROJECT = Path(__file__).resolve().parents[2]
SNAKEFILE = PROJECT / "workflow" / "Snakefile"
PROFILE = PROJECT / "profiles" / "default"
# What the rule `model` makes.
FETCHED = ("checkpoint.safetensors", "model.json")


class WorkflowRun:
    """One working directory with its configuration, in which `snakemake` is run."""

    def __init__(self, folder: Path, model: Path | str, **config) -> None:
        self.folder = folder
        self.config = {
            "samples": "samples.tsv",
            "model": str(model),
            "threads": 1,
            "slot_lock_folder": str(folder / "slots"),
            "device": "cpu",
            # Seconds of each test run, which only tests of the certificate and of the report need.
            "verify": {"sample": 0},
            "report": False,
            **config,
        }
        (folder / "config").mkdir(parents=True, exist_ok=True)
        self.configure()

    @property
    def results(self) -> Path:
        return self.folder / "results"

    def configure(self, **changes) -> None:
        self.config.update(changes)
        (self.folder / "config" / "config.yaml").write_text(yaml.safe_dump(self.config))

    def write_samples(self, files: dict[str, str | Path]) -> None:
        lines = ["sample\tfasta", *(f"{sample}\t{path}" for sample, path in files.items())]
        (self.folder / "samples.tsv").write_text("\n".join(lines) + "\n")

    def has_fetched(self, folder: Path) -> None:
        """Gives the run what its rule `model` makes, which is in `folder`: most tests are not about that."""
        (self.results / "model").mkdir(parents=True)
        for name in FETCHED:
            shutil.copyfile(folder / name, self.results / "model" / name)

    def command(self, *arguments: str, cores: int = 2, gpus: int = 2) -> list[str]:
        return [
            sys.executable, "-Pm", "snakemake", "--snakefile", str(SNAKEFILE), "--workflow-profile", str(PROFILE),
            "--cores", str(cores), "--resources", f"gpu={gpus}", *arguments,
        ]  # fmt: skip

    def start(self, *arguments: str, environment: dict[str, str] | None = None, **limits: int) -> subprocess.Popen:
        """Starts a run and returns at once; its output goes to `snakemake.out`."""
        with open(self.folder / "snakemake.out", "ab") as output:
            return subprocess.Popen(
                self.command(*arguments, **limits),
                cwd=self.folder,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(environment or {})},
                start_new_session=True,
            )

    def run(
        self, *arguments: str, environment: dict[str, str] | None = None, timeout: float = 240, **limits: int
    ) -> subprocess.CompletedProcess:
        """Runs to the end. The result's `stdout` has everything that was printed."""
        return subprocess.run(
            self.command(*arguments, **limits),
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **(environment or {})},
            timeout=timeout,
        )

    def succeed(self, *arguments: str, **options) -> str:
        """Runs to the end and expects success."""
        completed = self.run(*arguments, **options)
        assert completed.returncode == 0, completed.stdout
        return completed.stdout

    def groups(self) -> list[dict]:
        """Every group's `run.json`."""
        return groups(self.results)

    def summary(self) -> dict:
        return json.loads((self.results / "summary.json").read_text())

    def segments(self) -> list[Path]:
        return sorted((self.results / "store").glob("*/*.safetensors"))


class Hold:
    """Holds runs that are started in its `environment`: with `segments` in the store, workers commit no more of them.

    A worker that is held has a shard in hand, computed and not yet committed. `release` lets all of them go on.
    """

    def __init__(self, folder: Path, segments: int = 2) -> None:
        self._go_on = folder / "go-on"
        self.environment = {"ESMFLOW_HELD": f"{segments} {self._go_on}"}

    def held(self) -> set[int]:
        """The process ids of all workers that have been held, of those that died since, too."""
        return {int(path.suffix[1:]) for path in self._go_on.parent.glob(f"{self._go_on.name}.*")}

    def release(self) -> None:
        self._go_on.touch()


def groups(results: Path) -> list[dict]:
    """Every group's `run.json` under a results folder."""
    return [json.loads(path.read_text()) for path in sorted(results.glob("embed/group-*/run.json"))]


def demo_folder(folder: Path) -> Path:
    """Makes the folder look like a clone of this repository, so that the demo's own command runs in it."""
    for name in ("config", "profiles", "resources", "workflow"):
        (folder / name).symlink_to(PROJECT / name)
    return folder


def wait_until(condition, seconds: float = 240.0, what: str = "the condition"):
    """Waits for something to become true, and returns it."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.05)
    raise AssertionError(f"{what} did not come true within {seconds} seconds")


def shadow_modules(folder: Path) -> None:
    """Puts modules into a folder that end whoever imports them, named like some that every process imports."""
    for name in ("select", "socket", "queue", "numpy"):
        (folder / f"{name}.py").write_text(f"raise SystemExit('this is not the {name} that was meant')\n")


def kill(process_id: int, number: int = signal.SIGKILL) -> None:
    os.kill(process_id, number)
