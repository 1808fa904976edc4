"""Whole runs of the other families on tiny random weights: failures, copies, windows, resuming and the certificate."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from made_up import proteins
from made_up_families import ESM_C_SHAPES, random_esm1, random_esm_c, write_esm1, write_esm_c
from workflow_run import Hold, WorkflowRun, wait_until

from esmflow.engine.fair_esm import load_fair_esm, padded_tokens
from esmflow.python.results import open_results
from esmflow.verify.esm_c import PlainEsmC

SHORT = proteins(6, 20, 60, seed=5)
LONG = proteins(1, 1500, 1500, seed=6)[0]
RECORDS = [
    *((f"p{n}", s) for n, s in enumerate(SHORT)),
    ("copy", SHORT[0]),
    ("long", LONG),
    ("bad", "MKJV"),
    ("no", ""),
]


def made_run(folder: Path, model: Path, **config) -> WorkflowRun:
    # Two sequences in a shard at most, so that a run has something to go on with.
    settings = {"groups": 1, "shard_residues": 100, "formats": ["h5"], "verify": {"sample": 16}, **config}
    run = WorkflowRun(folder, model, **settings)
    (folder / "a.fasta").write_text("".join(f">{name}\n{sequence}\n" for name, sequence in RECORDS))
    run.write_samples({"a": "a.fasta"})
    return run


def manifest(run: WorkflowRun) -> dict[str, dict]:
    return {row["id"]: row for row in pq.read_table(run.results / "manifest.parquet").to_pylist()}


def certificate(run: WorkflowRun) -> dict:
    return json.loads((run.results / "certificate.json").read_text())


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def kill_and_go_on(run: WorkflowRun) -> dict[Path, int]:
    """Kills a run when two segments are there, and runs it to its end. Returns the times of these segments."""
    hold = Hold(run.folder)
    killed = run.start(environment=hold.environment)
    wait_until(lambda: len(run.segments()) == 2, what="two segments")
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    hold.release()
    before = segment_times(run)
    run.succeed("--nolock", "--rerun-incomplete")
    return before


def segment_times(run: WorkflowRun) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in run.segments()}


def check_went_on(run: WorkflowRun, before: dict[Path, int]) -> None:
    assert len(before) == 2
    assert before.items() <= segment_times(run).items()
    assert sum(len(group["segments_reused"]) for group in run.groups()) == 2


def check_outcomes(run: WorkflowRun, of_long: tuple[str, str | None]) -> None:
    rows = manifest(run)
    assert {name: (row["status"], row["reason"]) for name, row in rows.items()} == {
        **dict.fromkeys([*(f"p{n}" for n in range(6)), "copy"], ("embedded", None)),
        "long": of_long,
        "bad": ("rejected", "invalid_residue"),
        "no": ("rejected", "empty_sequence"),
    }
    assert (rows["copy"]["segment"], rows["copy"]["row"]) == (rows["p0"]["segment"], rows["p0"]["row"])


def mean_over_windows(residues: Callable[[str], np.ndarray]) -> np.ndarray:
    """The mean of LONG's residues, each of them the mean over the windows that hold it."""
    total, times = np.zeros((1500, 1)), np.zeros((1500, 1))
    for start in (0, 500, 900):
        window = residues(LONG[start : start + 600])
        total = total + np.pad(window, ((start, 900 - start), (0, 0)))
        times[start : start + 600] += 1
    return (total / times).mean(0)


WINDOWS = {"long_sequences": "window", "max_residues": 600, "window_overlap": 100}


@pytest.fixture(scope="module")
def esm_c(tmp_path_factory) -> WorkflowRun:
    """A run in windows that was killed and went on."""
    folder = tmp_path_factory.mktemp("esm_c")
    shape = ESM_C_SHAPES["head 16"]
    model = write_esm_c(folder / "tiny_esm_c", random_esm_c(*shape), shape[2])
    run = made_run(folder / "run", model, include=["mean", "bos", "entropy"], report=True, **WINDOWS)
    run.before = kill_and_go_on(run)
    return run


def test_a_run_of_esm_c_goes_on_where_it_was_killed_and_accounts_for_every_record(esm_c):
    check_outcomes(esm_c, of_long=("embedded", None))
    check_went_on(esm_c, esm_c.before)


@torch.no_grad()
def test_vectors_of_esm_c_are_those_of_the_plain_implementation_windows_put_together(esm_c):
    model = load_fair_esm(str(esm_c.results / "model" / "checkpoint.safetensors"), torch.device("cpu"), None, PlainEsmC)

    def residues(sequence: str) -> np.ndarray:
        return model(padded_tokens(model, [sequence]), repr_layers=[3])["representations"][3][0, 1:-1].numpy()

    found = open_results(esm_c.results)
    assert relative_error(found["p3"], residues(SHORT[3]).mean(0)) < 1e-5
    assert relative_error(found["long"], mean_over_windows(residues)) < 1e-5


def test_the_certificate_and_the_report_of_esm_c_say_what_was_used(esm_c):
    found = certificate(esm_c)
    assert found["passed"]
    assert found["verified_with"] == "a plain implementation of ESM C in fp32, written apart from the engine"
    assert found["computed_again"] == 7
    said = "verified   7 sequences computed again with a plain implementation of ESM C in fp32: lowest"
    assert said in (esm_c.results / "summary.txt").read_text()
    assert "fair-esm" not in (esm_c.folder / "logs" / "verify.log").read_text()
    assert {array for sequence in found["sequences"] for array in sequence["outputs"]} == {
        "mean_layer3", "bos_layer3", "entropy"
    }  # fmt: skip
    page = (esm_c.results / "report.html").read_text()
    assert "embedded with ESM C (ESM Team, 2024; checkpoint tiny_esm_c)" in page
    assert "ESM Cambrian" in page
    assert "Lin Z" not in page


def test_a_run_of_esm_c_in_8_bits_passes_its_certificate(tmp_path):
    shape = ESM_C_SHAPES["head 64"]
    model = write_esm_c(tmp_path / "tiny_esm_c", random_esm_c(*shape), shape[2])
    run = made_run(tmp_path / "run", model, include=["mean", "bos"], precision="int8")
    run.succeed()
    assert {row["precision"] for row in manifest(run).values() if row["status"] == "embedded"} == {"int8"}
    found = certificate(run)
    assert found["passed"]
    assert found["computed_again"] == 7
    assert found["limits"].keys() == {"int8"}


@torch.no_grad()
@pytest.mark.parametrize("family", ["ESM-1b", "ESM-1v"])
def test_a_run_of_esm_1b_and_1v_goes_on_where_it_was_killed_and_gives_fair_esm_s_numbers(tmp_path, family):
    module = random_esm1(family == "ESM-1b")
    model = write_esm1(tmp_path / "tiny.pt", module, contact_regression=family == "ESM-1b")
    include = ["mean", "contacts"] if family == "ESM-1b" else ["mean"]
    run = made_run(tmp_path / "run", model, include=include, long_sequences="whole")
    before = kill_and_go_on(run)
    check_outcomes(run, of_long=("rejected", "too_long"))
    check_went_on(run, before)
    assert manifest(run)["long"]["detail"] == "1500 residues; the limit is 1022"
    module.embed_tokens.weight.data[32] = 0

    def residues(sequence: str) -> np.ndarray:
        tokens = torch.tensor([[0, *(4 + "LAGVSERTIDPKQNFYMHWC".index(letter) for letter in sequence), 2]])
        return module(tokens, repr_layers=[2])["representations"][2][0, 1:-1].numpy()

    assert relative_error(open_results(run.results)["p2"], residues(SHORT[2]).mean(0)) < 1e-5
    found = certificate(run)
    assert found["passed"]
    assert found["verified_with"] == f"fair-esm's own {family} module in fp32"

    run.configure(include=["mean"], **WINDOWS)
    run.succeed("--nolock")
    check_outcomes(run, of_long=("embedded", None))
    assert relative_error(open_results(run.results)["long"], mean_over_windows(residues)) < 1e-5
    assert certificate(run)["passed"]
