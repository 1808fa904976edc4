"""The wheel: it holds the workflow as it lies in the repository, and the library once."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder

PROJECT = Path(__file__).resolve().parents[2]
LIBRARY = "workflow/scripts/esmflow/"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    return Path(next(WheelBuilder(str(PROJECT)).build(directory=str(folder), versions=["standard"])))


def tracked(*places: str) -> list[str]:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *places]
    return subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True).stdout.split()


def test_the_wheel_is_one_that_an_index_takes(wheel):
    checked = subprocess.run(
        [sys.executable, "-m", "twine", "check", "--strict", wheel], capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stdout


def test_it_holds_the_workflow_and_the_library_once(wheel):
    found = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    files = tracked("workflow", "profiles", "environment.yml", "config/config.yaml", "config/samples.tsv")
    expected = {
        f"esmflow/{name.removeprefix(LIBRARY)}" if name.startswith(LIBRARY) else f"esmflow/project/{name}"
        for name in [*files, "config/README.md"]
    }
    assert found == expected
    assert {"esmflow/py.typed", "esmflow/project/workflow/Snakefile"} <= found


def test_an_installed_workflow_can_be_planned_from_a_folder_that_nobody_may_write_to(wheel, tmp_path):
    installed = tmp_path / "site packages"
    zipfile.ZipFile(wheel).extractall(installed)
    for path in [installed, *installed.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    (tmp_path / "a.fasta").write_text(">a\nMKV\n")
    code = "import esmflow; print(esmflow.__file__); from esmflow.cli.main import main; main()"
    words = [sys.executable, "-c", code, "embed", "a.fasta", "-o", "out", "-n", "--gpus", "0"]
    environment = {**os.environ, "PYTHONPATH": str(installed), "PYTHONDONTWRITEBYTECODE": "1"}
    shown = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stdout + shown.stderr
    assert f"{installed}/esmflow/__init__.py" in shown.stdout
    assert f"{installed}/esmflow/project/workflow/Snakefile" in shown.stderr
    assert "650M" in shown.stderr
    assert "embed" in shown.stdout + shown.stderr
    for path in [installed, *installed.rglob("*")]:
        path.chmod(0o755)
