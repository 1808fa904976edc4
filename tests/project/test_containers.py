"""The container recipes install what the lock says, on a Python that the project supports, both of them the same."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

PROJECT = Path(__file__).resolve().parents[2]
DOCKERFILE = PROJECT / "containers" / "Dockerfile"
APPTAINER = PROJECT / "containers" / "esmflow.def"


@dataclass(frozen=True)
class Recipe:
    """base: the image it starts from. copies: (source, target). commands: what it runs as root, one a line."""

    base: str
    copies: list[tuple[str, str]]
    commands: list[str]


def read_dockerfile(path: Path) -> Recipe:
    """Every instruction; one that is not known here is an error."""
    text = re.sub(r"\\\n\s*", "", "\n".join(line for line in path.read_text().splitlines() if line[:1] != "#"))
    instructions = [line.split(" ", 1) for line in text.splitlines() if line.strip()]
    assert {name for name, _ in instructions} <= {"FROM", "RUN", "COPY", "WORKDIR", "CMD"}
    assert [name for name, _ in instructions].count("FROM") == 1
    assert instructions[0][0] == "FROM"
    commands = [part for name, rest in instructions if name == "RUN" for part in rest.split(" && ")]
    copies = [tuple(rest.split()) for name, rest in instructions if name == "COPY"]
    return Recipe(instructions[0][1], copies, commands)


def read_apptainer(path: Path) -> Recipe:
    """Header and sections; one that is not known here is an error."""
    lines = [line for line in path.read_text().splitlines() if line.strip() and not line.lstrip().startswith("#")]
    starts = [number for number, line in enumerate(lines) if line.startswith("%")]
    header = dict(line.split(": ", 1) for line in lines[: starts[0]])
    assert header.keys() == {"Bootstrap", "From"}
    assert header["Bootstrap"] == "docker"
    sections = {
        lines[start][1:]: [line.strip() for line in lines[start + 1 : end]]
        for start, end in zip(starts, [*starts[1:], len(lines)])
    }
    assert sections.keys() == {"files", "post", "runscript"}
    return Recipe(header["From"], [tuple(line.split()) for line in sections["files"]], sections["post"])


RECIPES = [read_dockerfile(DOCKERFILE), read_apptainer(APPTAINER)]


def test_both_recipes_are_the_same():
    docker, apptainer = RECIPES
    assert docker.base == apptainer.base
    assert sorted(docker.copies) == sorted(apptainer.copies)
    assert docker.commands == apptainer.commands


@pytest.mark.parametrize("recipe", RECIPES, ids=["docker", "apptainer"])
def test_a_recipe_installs_the_lock_and_no_python_package_beside_it(recipe):
    targets = dict(recipe.copies)
    pip = [command for command in recipe.commands if re.search(r"\b(pip|conda|mamba|uv)\b", command)]
    assert pip == [f"python -m pip install --no-cache-dir -r {targets['requirements.lock']}"]


@pytest.mark.parametrize("recipe", RECIPES, ids=["docker", "apptainer"])
def test_the_python_of_a_recipe_is_the_one_that_the_lock_was_resolved_for(recipe):
    (version,) = re.findall(r"^python:(\d+\.\d+)-slim", recipe.base)
    pyproject = tomllib.loads((PROJECT / "pyproject.toml").read_text())
    assert SpecifierSet(pyproject["project"]["requires-python"]).contains(version)
    assert f"--python-version {version}" in (PROJECT / "Makefile").read_text()
    lines = (PROJECT / "requirements.lock").read_text().splitlines()
    locked = [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]
    environment = {"python_version": version, "python_full_version": f"{version}.0", "sys_platform": "linux"}
    there = {r.name for r in locked if r.marker is None or r.marker.evaluate(environment)}
    assert {Requirement(line).name for line in pyproject["project"]["dependencies"]} <= there


@pytest.mark.parametrize("recipe", RECIPES, ids=["docker", "apptainer"])
def test_a_recipe_copies_what_a_run_needs_and_what_is_there(recipe):
    sources = {source for source, _ in recipe.copies}
    assert {"workflow", "config", "profiles", "environment.yml", "requirements.lock"} == sources
    assert all((PROJECT / source).exists() for source in sources)
    let_through = {line[1:] for line in (PROJECT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert sources == let_through


@pytest.mark.parametrize("recipe", RECIPES, ids=["docker", "apptainer"])
def test_every_command_of_a_recipe_is_one_that_a_shell_can_read(recipe):
    subprocess.run(["sh", "-n"], input="\n".join(recipe.commands), text=True, check=True)


def test_what_was_copied_is_enough_for_a_dry_run(tmp_path):
    for source, target in RECIPES[0].copies:
        place = tmp_path / "image" / target.lstrip("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(PROJECT / source)
    data = tmp_path / "data"
    data.mkdir()
    (data / "one.faa").write_text(">a\nMKV\n")
    snakefile = tmp_path / "image" / "opt" / "esmflow" / "workflow" / "Snakefile"
    (data / "config").mkdir()
    (data / "config" / "config.yaml").write_text('samples: "*.faa"\n')
    command = [sys.executable, "-m", "snakemake", "--snakefile", snakefile, "--dry-run", "--cores", "2"]
    shown = subprocess.run(command, cwd=data, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert "embed" in shown.stdout
