"""What the code host and the workflow catalogue read: it parses, and names what exists."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

PROJECT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((PROJECT / ".github/workflows").glob("*.yml"))
SCHEMA = yaml.safe_load((PROJECT / "workflow/schemas/config.schema.yaml").read_text())


def steps(workflow: Path) -> list[dict]:
    return [step for job in yaml.safe_load(workflow.read_text())["jobs"].values() for step in job["steps"]]


def test_changes_are_checked_and_tags_are_released():
    # YAML reads a bare `on` as true.
    started = {path.stem: yaml.safe_load(path.read_text())[True].keys() for path in WORKFLOWS}
    assert started == {"ci": {"push", "pull_request"}, "release": {"push"}}
    assert {"run": ".ci/run"} in steps(PROJECT / ".github/workflows/ci.yml")


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_every_step_is_an_action_of_a_version_or_commands_that_a_shell_can_read(workflow):
    for step in steps(workflow):
        assert ("uses" in step) != ("run" in step)
        if "uses" in step:
            assert re.fullmatch(r"[\w.-]+/[\w.-]+@v\d+", step["uses"])
            continue
        subprocess.run(["bash", "-n"], input=step["run"], text=True, check=True)
        for script in re.findall(r"\.ci/\S+", step["run"]):
            assert os.access(PROJECT / script, os.X_OK), script


def test_snakemakes_action_is_given_a_folder_and_a_workflow_that_can_be_planned(tmp_path):
    given = [
        step["with"] for step in steps(PROJECT / ".github/workflows/ci.yml") if "snakemake" in step.get("uses", "")
    ]
    assert {(each["directory"], each["snakefile"]) for each in given} == {(".test", "workflow/Snakefile")}
    for name in ("workflow", "resources/demo", ".test/config"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).symlink_to(PROJECT / name)
    shutil.copy(PROJECT / "environment.yml", tmp_path)
    (run,) = [each["args"].split() for each in given if "--cores" in each["args"]]
    command = [
        sys.executable,
        "-m",
        "snakemake",
        "--directory",
        ".test",
        "--snakefile",
        "workflow/Snakefile",
        "-n",
        *run,
    ]
    command = [word for word in command if word not in ("--sdm", "conda")]
    planned = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert planned.returncode == 0, planned.stderr
    assert re.search(r"embed +2\b", planned.stdout)


def test_the_catalogue_is_told_what_is_so():
    usage = yaml.safe_load((PROJECT / ".snakemake-workflow-catalog.yml").read_text())["usage"]
    assert usage["mandatory-flags"]["flags"] == "--resources gpu=1"
    offered = usage["software-stack-deployment"]
    rules = "".join(path.read_text() for path in (PROJECT / "workflow/rules").glob("*.smk"))
    has = {"conda": "conda:" in rules, "apptainer": "container:" in rules, "report": "report(" in rules}
    assert {name: offered[name] for name in has} == has
    assert offered["apptainer+conda"] is False or has["apptainer"]


def keys(rules: dict, prefix: str = ""):
    for key, rule in rules.items():
        yield f"{prefix}{key}", rule
        yield from keys(rule.get("properties", {}), f"{prefix}{key}.")


@pytest.mark.parametrize(
    ("key", "rule"), list(keys(SCHEMA["properties"])), ids=lambda value: value if isinstance(value, str) else ""
)
def test_every_key_has_a_description_and_a_default_for_the_catalogue_to_show(key, rule):
    assert rule["description"].strip()
    assert "default" in rule


def release_notes(folder: Path, tag: str) -> subprocess.CompletedProcess:
    return subprocess.run([folder / ".ci/release-notes", tag], capture_output=True, text=True)


def test_a_release_has_the_notes_of_its_version_or_is_refused(tmp_path):
    (tmp_path / ".ci").mkdir()
    shutil.copy(PROJECT / ".ci/release-notes", tmp_path / ".ci")
    for name in ("pyproject.toml", "CITATION.cff"):
        shutil.copy(PROJECT / name, tmp_path)
    version = yaml.safe_load((PROJECT / "CITATION.cff").read_text())["version"]
    log = tmp_path / "CHANGELOG.md"
    log.write_text("# Changelog\n\n## Unreleased\n- later\n")
    assert "CHANGELOG.md has no section" in release_notes(tmp_path, f"v{version}").stderr
    log.write_text(f"{log.read_text()}\n## {version} - 2026-01-01\n\n### Added\n- this\n\n## 0.0.1\n- before\n")
    made = release_notes(tmp_path, f"v{version}")
    assert (made.returncode, made.stdout.strip()) == (0, "### Added\n- this")
    refused = release_notes(tmp_path, "v99.0")
    assert refused.returncode == 1
    assert "pyproject.toml has another version" in refused.stderr
