"""The command `esmflow` and its Python interface on one real run, from another folder than the data's."""

from __future__ import annotations

import doctest
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from workflow_run import PROJECT, Hold, shadow_modules, wait_until

import esmflow
from esmflow.files import read_json
from esmflow.python import results, vectors

COMMAND = [sys.executable, "-Pc", "from esmflow.cli.main import main; main()"]
DEMO = PROJECT / "resources" / "demo"


def start(folder: Path, *arguments: str, environment: dict[str, str] | None = None) -> subprocess.Popen:
    paths = os.pathsep.join([str(PROJECT / "workflow" / "scripts"), os.environ["PYTHONPATH"]])
    environment = {**os.environ, **(environment or {}), "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([*COMMAND, *arguments], cwd=folder, env=environment, **output)


def command(folder: Path, *arguments: str) -> str:
    """What a command prints that succeeds."""
    process = start(folder, *arguments)
    shown, _ = process.communicate(timeout=240)
    assert process.returncode == 0, shown
    return shown


@pytest.fixture(scope="module")
def options(real_model_folder) -> list[str]:
    model = ["--model", str(real_model_folder), "--include", "mean,per_residue", "--format", "npy"]
    settings = ("groups=1", "verify.sample=0", "report=false", "slot_lock_folder=slots")
    return [*model, "--gpus", "0", *(word for setting in settings for word in ("--set", setting))]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, options) -> tuple[Path, list[str], str]:
    """A folder in which a run has ended, the command of the run, and what it showed."""
    folder = tmp_path_factory.mktemp("first session")
    shadow_modules(folder)
    words = ["embed", str(DEMO / "reviewed.fasta"), str(DEMO / "difficult.fasta"), "-o", "out", *options]
    return folder, words, command(folder, *words)


def test_a_run_shows_its_command_its_steps_and_its_summary(finished):
    folder, _, shown = finished
    assert "--directory out" in next(line for line in shown.splitlines() if line.startswith("esmflow: runs  "))
    for step in ("finding and converting the model", "reading the input", "embedding", "writing the results"):
        assert f"esmflow: {step}\n" in shown
    assert "records    70: 66 embedded, 4 rejected, 0 failed" in shown
    assert "results    out/results/embeddings" in shown
    assert 'e = esmflow.open("out")' in shown
    assert {path.name for path in folder.iterdir() if path.suffix != ".py"} == {"out", "slots"}
    assert yaml.safe_load((folder / "out/config/config.yaml").read_text())["verify"] == {"sample": 0}


def test_the_same_command_again_computes_nothing(finished):
    folder, words, _ = finished
    before = {path: path.stat().st_mtime_ns for path in (folder / "out/results").rglob("*") if path.is_file()}
    shown = command(folder, *words)
    assert "everything was there already" in shown
    assert "nothing had to be computed" in shown
    assert before == {path: path.stat().st_mtime_ns for path in (folder / "out/results").rglob("*") if path.is_file()}


@pytest.mark.parametrize("module", [esmflow, results, vectors], ids=lambda module: module.__name__)
def test_the_examples_in_the_docstrings_are_true(finished, real_model_folder, monkeypatch, module, tmp_path):
    monkeypatch.chdir(finished[0])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    known = {"esmflow": esmflow, "e": esmflow.open("out"), "model": real_model_folder}
    examples = [found for found in doctest.DocTestFinder().find(module, extraglobs=known) if found.examples]
    assert examples
    said: list[str] = []
    for example in examples:
        doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(example, out=said.append)
    assert not said, "".join(said)


def test_a_notebook_gets_the_numbers_of_the_run(finished, real_model_folder, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    text = (DEMO / "reviewed.fasta").read_text().split(">")[1:6]
    sequences = {entry.split()[0]: entry.partition("\n")[2] for entry in text}
    found = esmflow.embed(sequences, model=real_model_folder, device="cpu")
    e = esmflow.open(finished[0] / "out")
    for identifier, vector in found.items():
        np.testing.assert_allclose(vector, e[identifier], rtol=1e-4, atol=1e-5)


def test_status_and_report_of_a_finished_run(finished):
    folder = finished[0]
    assert "1 of 1 finished" in command(folder, "status", "out")
    shown = command(folder, "report", "out")
    assert f"report     {folder}/out/results/report.html" in shown
    assert (folder / "out/results/report.html").exists()


def test_ctrl_c_ends_the_run_and_the_same_command_goes_on(tmp_path, options):
    lines = (DEMO / "reviewed.fasta").read_text().splitlines(keepends=True)
    (tmp_path / "few.fasta").write_text("".join(lines[:80]))
    words = ["embed", "few.fasta", "-o", "out", *options, "--set", "shard_residues=500"]
    hold = Hold(tmp_path, segments=1)
    process = start(tmp_path, *words, environment=hold.environment)
    try:
        wait_until(hold.held, 120, "a worker with a shard in hand")
        process.send_signal(signal.SIGINT)
        shown, _ = process.communicate(timeout=60)
    finally:
        hold.release()
        process.kill()
    assert process.returncode == 130
    assert shown.endswith("esmflow: stopped; what is finished is kept, and the same command goes on from there\n")
    assert "Traceback" not in shown
    kept = list(tmp_path.glob("out/results/store/*/*.safetensors"))
    command(tmp_path, *words)
    record = read_json(tmp_path / "out/results/embed/group-0/run.json")
    assert {path.stem for path in kept} == set(record["segments_reused"])


def test_a_run_that_fails_says_why_and_ends_with_its_status(tmp_path, options, real_model_folder):
    broken = tmp_path / "model"
    broken.mkdir()
    (broken / "config.json").write_text((real_model_folder / "config.json").read_text())
    (broken / "pytorch_model.bin").write_bytes(b"no weights")
    (tmp_path / "a.fasta").write_text(">a\nMKV\n")
    process = start(tmp_path, "embed", "a.fasta", "-o", "out", *options, "--model", str(broken))
    shown, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "not a readable PyTorch file, truncated or of another kind" in shown
    assert "esmflow: the end of out/logs/model.log:" in shown
    assert "all that was printed is in out/logs/snakemake.log" in shown
    assert "Traceback" not in shown
