"""What users of `--sdm conda`, login nodes and catalogues have: Snakemake, what it installs itself, nothing else."""

from __future__ import annotations

import os
import re
import resource
import shutil
import subprocess
import venv
from importlib.metadata import Distribution, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from workflow_run import PROFILE, PROJECT, SNAKEFILE, WorkflowRun

FILES = 5_000
SECONDS = 10.0
MOST_MODULES = 15
NOT_THERE = ("numpy", "pyarrow", "pandas", "polars", "safetensors", "torch", "h5py", "pynvml")

# A dry run asks conda what it is, and makes no environment. Where there is no conda, this answers as one would.
ANSWERS_AS_CONDA = """#!/bin/sh
case "$1 $2" in
  "info --json")
    echo '{"conda_version": "25.1.0", "conda_prefix": "/opt/c", "root_prefix": "/opt/c", "platform": "linux-64"}' ;;
  "config --get") echo '{"get": {"channel_priority": "strict"}}' ;;
  "--version "*) echo 'conda 25.1.0' ;;
  *) echo "a dry run must not call: conda $*" >&2; exit 1 ;;
esac
"""


def needed_by(name: str, found: dict[str, Distribution]) -> dict[str, Distribution]:
    """A distribution and all that it requires here, by name."""
    key = re.sub(r"[-_.]+", "-", name).lower()
    if key not in found:
        found[key] = distribution(name)
        for line in found[key].requires or []:
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                needed_by(requirement.name, found)
    return found


@pytest.fixture(scope="module")
def snakemake_alone(tmp_path_factory) -> Path:
    """The Python of a virtual environment with Snakemake and what it requires, in the versions that are here."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True, with_pip=False)
    there = next(folder.glob("lib/python*/site-packages"))
    for found in needed_by("snakemake", {}).values():
        for top in {file.parts[0] for file in found.files or [] if file.parts[0] not in ("..", "__pycache__")}:
            if not (there / top).exists():
                (there / top).symlink_to(found.locate_file(top))
    python = folder / "bin" / "python"
    for module in NOT_THERE:
        assert subprocess.run([python, "-c", f"import {module}"], capture_output=True).returncode, module
    if shutil.which("conda") is None:
        (folder / "bin" / "conda").write_text(ANSWERS_AS_CONDA)
        (folder / "bin" / "conda").chmod(0o755)
    return python


@pytest.fixture
def many_files(tmp_path) -> WorkflowRun:
    run = WorkflowRun(tmp_path, "esm2_t36_3B_UR50D", groups=3, verify={"sample": 32}, report=True, device="auto")
    (tmp_path / "fasta").mkdir()
    for number in range(FILES):
        (tmp_path / "fasta" / f"s{number}.faa").write_text(">a\nMKV\n")
    run.write_samples({f"s{number}": f"fasta/s{number}.faa" for number in range(FILES)})
    return run


def run_alone(python: Path, folder: Path, *arguments: str, snakefile: Path = SNAKEFILE) -> tuple[str, float]:
    """Runs Snakemake in a folder. Returns what it prints and the seconds that it worked on a core."""
    command = [str(python), "-m", "snakemake", "--snakefile", str(snakefile), "--workflow-profile", str(PROFILE)]
    path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**{k: v for k, v in os.environ.items() if k != "PYTHONPATH"}, "PATH": path}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    shown = subprocess.run([*command, *arguments], cwd=folder, env=environment, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert shown.returncode == 0, shown.stdout + shown.stderr
    return shown.stdout + shown.stderr, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize("options", [[], ["--sdm", "conda"]], ids=["plain", "conda"])
def test_a_dry_run_of_5000_files_needs_nothing_but_snakemake(snakemake_alone, many_files, options):
    shown, seconds = run_alone(snakemake_alone, many_files.folder, "-n", "--cores", "4", *options)
    counts = dict(re.findall(r"^(\w+) +(\d+)$", shown, re.MULTILINE))
    assert counts["embed"] == "3"
    assert {"model", "plan", "collect", "verify", "report", "finish", "all"} <= counts.keys()
    assert seconds < SECONDS


def test_lint_needs_nothing_but_snakemake(snakemake_alone):
    run_alone(snakemake_alone, PROJECT, "--lint")


def test_a_table_as_input_is_left_to_the_plan_step_where_nothing_can_read_it(snakemake_alone, tmp_path):
    run = WorkflowRun(tmp_path, "esm2_t36_3B_UR50D")
    (tmp_path / "a.tsv").write_text("id\tsequence\na\tMKV\n")
    run.write_samples({"a": "a.tsv"})
    run_alone(snakemake_alone, tmp_path, "-n", "--cores", "1")


def test_a_dry_run_loads_few_modules_of_the_library(snakemake_alone, tmp_path):
    run = WorkflowRun(tmp_path, "esm2_t36_3B_UR50D", device="auto", long_sequences="window")
    (tmp_path / "a.fasta").write_text(">a\nMKV\n")
    run.write_samples({"a": "a.fasta"})
    watching = tmp_path / "Snakefile"
    watching.write_text(
        f'include: "{SNAKEFILE}"\n'
        "import atexit, sys\n"
        "atexit.register(lambda: print('LOADED', *(name for name, module in sys.modules.items() if name.startswith"
        "('esmflow.') and not hasattr(module, '__path__')), file=sys.stderr))\n"
    )
    shown, _ = run_alone(snakemake_alone, tmp_path, "-n", "--cores", "1", snakefile=watching)
    loaded = next(line for line in shown.splitlines() if line.startswith("LOADED")).split()[1:]
    assert "esmflow.config.configuration" in loaded
    assert len(loaded) <= MOST_MODULES, loaded
