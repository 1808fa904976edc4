"""Every command in the documents works as it is written, in a clone of the project with one finished run."""

from __future__ import annotations

import gzip
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from clone import PROJECT, make_clone, make_recipe
from documents import LANGUAGES, NEEDS, RUNNABLE, Block, blocks
from made_up import random_model, stored_tensors, write_fair_esm

from esmflow.config.configuration import validated

SCHEMA = PROJECT / "workflow" / "schemas" / "config.schema.yaml"
KEYS = yaml.safe_load(SCHEMA.read_text())["properties"]
CHANGES_THE_MACHINE = re.compile(r"\b(pip|uv|conda|mamba|apt-get|docker|apptainer|sbatch|curl|wget|sudo)\b")
MARKED = [block for block in blocks(*RUNNABLE) if block.need or block.shown_by]
TO_RUN = [block for block in blocks(*RUNNABLE) if block not in MARKED and not block.make_targets]
MAKE_TARGETS = sorted({target for block in blocks("bash") for target in block.make_targets})


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    """An activated one. Torch hub's cache has a model of the default's name, of 36 layers but random and 32 wide."""
    home = tmp_path_factory.mktemp("torch")
    write_fair_esm(home / "hub/checkpoints/esm2_t36_3B_UR50D.pt", stored_tensors(random_model(36, 32, 2)))
    activated = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": activated, "TORCH_HOME": str(home), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def clone(tmp_path_factory, environment, short_proteins) -> Path:
    """A clone in which the README's steps were followed: two samples, the configuration as it comes, and one run."""
    clone = make_clone(tmp_path_factory.mktemp("documents") / "clone", copied=("config",))
    (clone / "data/soil").mkdir(parents=True)
    records = [f">{header}\n{sequence}\n" for header, sequence in short_proteins[:60]]
    (clone / "data/gut.faa.gz").write_bytes(gzip.compress("".join(records[:40]).encode()))
    (clone / "data/soil/a.faa").write_text("".join(records[40:]))
    (clone / "config/samples.tsv").write_text("sample\tfasta\ngut\tdata/gut.faa.gz\nsoil\tdata/soil/*.faa\n")
    labels = [f"{header.split()[0]}\t{number % 2}\n" for number, (header, _) in enumerate(short_proteins[:60])]
    (clone / "labels.tsv").write_text("id\tlabel\n" + "".join(labels))
    config = yaml.safe_load((clone / "config/config.yaml").read_text())
    config |= {"formats": KEYS["formats"]["items"]["enum"], "include": ["mean", "per_residue"], "groups": 1}
    config |= {"slot_lock_folder": str(clone / "slots"), "download": False, "verify": {"sample": 0}, "report": False}
    (clone / "config/config.yaml").write_text(yaml.safe_dump(config))
    ran = run("bash", ".venv/bin/snakemake --cores 2 --resources gpu=2", clone, environment)
    assert ran.returncode == 0, ran.stdout
    return clone


def run(language: str, code: str, clone: Path, environment: dict[str, str]) -> subprocess.CompletedProcess:
    command = ["bash", "-euo", "pipefail", "-c", code] if language == "bash" else [sys.executable, "-c", code]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.run(command, cwd=clone, env=environment, text=True, **pipes)


@pytest.mark.parametrize("block", TO_RUN, ids=str)
def test_a_documented_block_runs_as_it_is_written(block: Block, clone, environment, monkeypatch):
    assert not CHANGES_THE_MACHINE.search(block.code), f"{block} changes the machine: mark it with what it needs"
    # A block that looks for modules itself must find them itself; the others need not import everything anew.
    if block.language == "python" and "sys.path" not in block.code:
        monkeypatch.chdir(clone)
        exec(compile(block.code, str(block), "exec"), {"__name__": "__main__"})
        return
    ran = run(block.language, block.code, clone, environment)
    assert ran.returncode == 0, f"{block}\n{block.code}\n{ran.stdout}"


@pytest.mark.parametrize("block", MARKED, ids=str)
def test_a_block_that_is_not_run_says_what_it_needs_or_which_test_shows_it(block: Block):
    if block.need:
        assert block.need in NEEDS
    else:
        file, _, test = block.shown_by.partition("::")
        assert f"def {test}" in (PROJECT / file).read_text()


@pytest.mark.parametrize("target", MAKE_TARGETS)
def test_a_documented_target_is_one_of_the_makefile(target, clone):
    """Running them would install the environment and start these tests once more; what they run is tested elsewhere."""
    subprocess.run(["make", "--dry-run", target], cwd=clone, check=True, capture_output=True)


@pytest.mark.parametrize("target", ["demo", "example"])
def test_the_run_behind_a_target_can_be_planned(target, clone, environment):
    planned = run("bash", f"{make_recipe(clone, target)} --dry-run", clone, environment)
    assert planned.returncode == 0, planned.stdout
    assert "embed" in planned.stdout


@pytest.mark.parametrize("block", list(blocks("yaml")), ids=str)
def test_a_documented_configuration_is_valid(block: Block, monkeypatch, tmp_path):
    """Blocks of YAML that have a key of the configuration are configurations; others are profiles."""
    content = yaml.safe_load(block.code)
    monkeypatch.chdir(tmp_path)
    if "variants" in content:
        Path(content["variants"]).write_text("id\tvariant\n")
    if content.keys() & KEYS.keys():
        validated(content, SCHEMA)


def test_no_block_hides_behind_another_language():
    assert {block.language for block in blocks()} <= set(LANGUAGES)
