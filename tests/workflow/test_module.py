"""Used as a module of another workflow: from a folder of this machine, and from a git host as snakedeploy does it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import h5py
import pytest
import yaml
from workflow_run import PROJECT, SNAKEFILE

OUTER = """
configfile: "outer.yaml"

module esmflow:
    snakefile: "{snakefile}"
    config: config["esmflow"]
    pathvars:
        results="embedded/results",
        logs="embedded/logs",

use rule * from esmflow as esmflow_*

rule all:
    default_target: True
    input: rules.esmflow_all.input, "ids.txt"

rule ids:
    input: rules.esmflow_collect.output.manifest_tsv
    output: "ids.txt"
    shell: "cut -f 4 {{input}} > {{output}}"
"""


INNER = {"samples": "*.faa", "groups": 1, "threads": 1, "device": "cpu"}


def run_snakemake(folder, *arguments: str, **environment: str) -> str:
    command = [sys.executable, "-m", "snakemake", "--cores", "1", "--resources", "gpu=1", *arguments]
    ran = subprocess.run(command, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout + ran.stderr


def embedded_ids(results) -> list[str]:
    with h5py.File(results / "embeddings" / "mean_layer2" / "embeddings.h5") as file:
        return list(file["ids"].asstr()[:])


def test_another_workflow_can_use_this_one_and_place_its_results(tmp_path, made_up_model):
    (tmp_path / "Snakefile").write_text(OUTER.format(snakefile=SNAKEFILE))
    inner = {**INNER, "model": str(made_up_model)}
    (tmp_path / "outer.yaml").write_text(yaml.safe_dump({"esmflow": inner}))
    (tmp_path / "two.faa").write_text(">first\nMKVLAAG\n>second\nMKVLAAGG\n")
    printed = run_snakemake(tmp_path)
    assert printed.count("records    2: 2 embedded") == 1
    assert "finish.log =====" in (tmp_path / "embedded/results/run.log").read_text()
    # A rule of the outer workflow reads the manifest.
    assert (tmp_path / "ids.txt").read_text().replace('"', "").split() == ["id", "first", "second"]
    assert embedded_ids(tmp_path / "embedded/results") == ["first", "second"]
    assert (tmp_path / "embedded/results/store").is_dir()
    assert (tmp_path / "embedded/logs/embed/group-0.log").exists()
    assert not (tmp_path / "results").exists()
    assert not (tmp_path / "logs").exists()
    assert "Nothing to be done" in run_snakemake(tmp_path)


@pytest.fixture
def git_host(tmp_path):
    """This project as a tagged repository, and the environment in which git finds it at a git host's address."""
    repository = tmp_path / "repository"
    repository.mkdir()
    for name in ("workflow", "config", "profiles"):
        shutil.copytree(PROJECT / name, repository / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("environment.yml", "LICENSE"):
        shutil.copy(PROJECT / name, repository)
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    for command in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "-m", "all"], ["tag", "v1"]):
        subprocess.run(["git", *identity, *command], cwd=repository, check=True)
    return {
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"url.file://{repository}.insteadOf",
        "GIT_CONFIG_VALUE_0": "https://github.com/someone/esmflow",
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }


# What `snakedeploy deploy-workflow https://github.com/someone/esmflow . --tag v1` writes as workflow/Snakefile.
DEPLOYED = """
configfile: "config/config.yaml"

module esmflow:
    snakefile:
        github("someone/esmflow", path="workflow/Snakefile", tag="v1")
    config:
        config

use rule * from esmflow
"""


def test_deployed_from_a_git_host_every_file_is_fetched_and_the_run_finishes(tmp_path, git_host, made_up_model):
    folder = tmp_path / "deployed"
    (folder / "workflow").mkdir(parents=True)
    (folder / "config").mkdir()
    (folder / "workflow" / "Snakefile").write_text(DEPLOYED)
    (folder / "config" / "config.yaml").write_text(yaml.safe_dump({**INNER, "model": str(made_up_model)}))
    (folder / "one.faa").write_text(">only\nMKVLAAG\n")
    run_snakemake(folder, **git_host)
    assert embedded_ids(folder / "results") == ["only"]


def test_the_list_of_the_library_is_complete():
    folder = PROJECT / "workflow"
    there = [path for part in ("scripts/esmflow", "report") for path in (folder / part).rglob("*") if path.is_file()]
    names = sorted(str(path.relative_to(folder)) for path in there if "__pycache__" not in path.parts)
    listed = (folder / "library.files").read_text().split()
    assert listed == names, "run `make library.files`"
