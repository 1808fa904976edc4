"""What a login node or CI does: look at the whole plan of jobs, without torch, quickly."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from workflow_run import WorkflowRun

FILES = 20_000
SECONDS = 20.0


@pytest.fixture(scope="module")
def python_without_torch(tmp_path_factory) -> Path:
    """A virtual environment with everything that this one has, except what computes: torch and fair-esm."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True, with_pip=False)
    here = Path(next(p for p in sys.path if p.endswith("site-packages")))
    there = next(folder.glob("lib/python*/site-packages"))
    for entry in here.iterdir():
        if not re.match(r"(torch|functorch|triton|nvidia_(?!ml)|esm|fair_esm)(\b|[_-])", entry.name):
            (there / entry.name).symlink_to(entry)
    python = folder / "bin" / "python"
    for module in ("torch", "esm"):
        missing = subprocess.run([python, "-c", f"import {module}"], capture_output=True, text=True)
        assert "ModuleNotFoundError" in missing.stderr
    return python


@pytest.fixture
def many_files(tmp_path) -> WorkflowRun:
    run = WorkflowRun(tmp_path, "esm2_t36_3B_UR50D", groups=7)
    (tmp_path / "fasta").mkdir()
    for number in range(FILES):
        (tmp_path / "fasta" / f"s{number}.faa").write_text(">a\nMKV\n")
    run.write_samples({f"s{number}": f"fasta/s{number}.faa" for number in range(FILES)})
    return run


def test_a_dry_run_of_20000_files_without_torch_shows_every_job_within_20_seconds_of_work(
    python_without_torch, many_files
):
    command = [str(python_without_torch), *many_files.command("--dry-run", cores=4, gpus=4)[1:]]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    shown = subprocess.run(command, cwd=many_files.folder, env=environment, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Time on a core, not on the clock, which depends on what else the machine does.
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert shown.returncode == 0, shown.stdout + shown.stderr
    counts = dict(re.findall(r"^(model|plan|embed|collect|finish|all|total) +(\d+)$", shown.stdout, re.MULTILINE))
    assert counts == {"model": "1", "plan": "1", "embed": "7", "collect": "1", "finish": "1", "all": "1", "total": "12"}
    assert set(re.findall(r"wildcards: group=(\d+)", shown.stdout)) == set("0123456")
    assert seconds < SECONDS
