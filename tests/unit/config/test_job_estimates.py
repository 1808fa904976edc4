"""Estimates of a job's time and memory: against what was measured, and in every case of what is known beforehand."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest

from esmflow.checkpoint.file import CheckpointInfo
from esmflow.checkpoint.models import ModelDimensions, guess_model
from esmflow.config.configuration import validated
from esmflow.config.job_estimates import (
    GroupWork,
    JobEstimate,
    estimate_job,
    estimate_verification,
    guess_work,
    job_settings,
)
from esmflow.plan.run_plan import GroupPlan, Plan

PROJECT = Path(__file__).resolve().parents[3]
SCHEMA = PROJECT / "workflow" / "schemas" / "config.schema.yaml"


def settings(device="cpu", **config):
    complete = validated({"model": "esm2_t6_8M_UR50D", "threads": 1, "shard_residues": 10000, **config}, SCHEMA)
    return job_settings(complete, device)


def measured():
    """The rows of the documentation's table."""
    for line in (PROJECT / "docs" / "resources.md").read_text().splitlines():
        if re.match(r"\| `esm2_", line):
            yield [cell.strip(" `") for cell in line.strip("|").split("|")]


@pytest.mark.parametrize("row", list(measured()), ids=lambda row: f"{row[0]} {row[3]}")
def test_estimates_are_within_a_factor_of_two_of_what_was_measured_and_as_documented(row):
    name, device, tflops, residues, sequences, seconds, estimated, megabytes, estimated_megabytes = row
    estimate = estimate_job(
        GroupWork(int(residues), int(sequences), True),
        guess_model(name),
        settings(device, device_tflops=float(tflops)),
    )
    assert 0.5 < estimate.seconds / float(seconds) < 2
    assert f"{estimate.seconds:.1f}" == estimated
    if megabytes:
        assert 0.5 < estimate.memory_mb / float(megabytes) < 2
        assert f"{estimate.memory_mb:.0f}" == estimated_megabytes


def test_requests_grow_with_the_attempt_and_leave_room():
    estimate = JobEstimate(seconds=3600, memory_mb=1010)
    assert [estimate.runtime_minutes(attempt) for attempt in (1, 2, 3)] == [120, 240, 360]
    assert [estimate.memory_mb_to_ask_for(attempt) for attempt in (1, 2, 3)] == [1600, 3200, 4800]
    assert JobEstimate(1, 1).runtime_minutes(1) == 10


def test_more_gpus_take_less_time_and_more_memory():
    work, model = GroupWork(100_000_000, 300_000, True), guess_model("esm2_t33_650M_UR50D")
    one, four = (estimate_job(work, model, settings("cuda", gpus_per_job=gpus)) for gpus in (1, 4))
    assert 0.2 < four.seconds / one.seconds < 0.4
    assert 2 < four.memory_mb / one.memory_mb < 4


def test_what_is_kept_for_every_residue_takes_memory():
    work, model = GroupWork(1_000_000, 3000, True), guess_model("esm2_t6_8M_UR50D")
    pooled, residues = (
        estimate_job(work, model, settings(include=[kind], shard_residues=1_000_000))
        for kind in ("mean", "per_residue")
    )
    # 320 values of 4 bytes for a million residues, three times.
    assert residues.memory_mb - pooled.memory_mb == pytest.approx(3 * 4 * 320, rel=0.01)


def test_an_empty_group_takes_a_moment():
    assert estimate_job(GroupWork(0, 0, True), guess_model("esm2_t48_15B_UR50D"), settings()).seconds <= 1


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("esm2_t6_8M_UR50D", 7.5),
        ("esm2_t12_35M_UR50D", 33.5),
        ("esm2_t30_150M_UR50D", 148),
        ("esm2_t33_650M_UR50D", 650),
        ("esm2_t36_3B_UR50D", 2835),
        ("esm2_t48_15B_UR50D", 15100),
    ],
)
def test_official_models_have_about_the_parameters_in_their_names(name, millions):
    assert guess_model(name).parameters == pytest.approx(millions * 1e6, rel=0.05)


def test_a_model_is_known_from_its_description_its_folder_its_name_or_its_size(tmp_path):
    dimensions = ModelDimensions(7, 64, 4, True, False)
    CheckpointInfo("made up", "", "", "", dimensions).write(tmp_path / "model.json")
    assert guess_model("esm2_t6_8M_UR50D", tmp_path / "model.json") == dimensions

    folder = tmp_path / "folder"
    folder.mkdir()
    config = {"num_hidden_layers": 9, "hidden_size": 96, "num_attention_heads": 6}
    (folder / "config.json").write_text(json.dumps(config))
    assert guess_model(str(folder)).hidden == 96

    named, sized = tmp_path / "esm2_t12_35M_UR50D.pt", tmp_path / "mine.pt"
    named.write_bytes(b"")
    assert guess_model(str(named)).hidden == 480
    with open(sized, "wb") as handle:
        handle.truncate(2_610_000_000)
    assert guess_model(str(sized)).hidden == 1280


@pytest.mark.parametrize("ending", [".bin", ".safetensors"])
def test_a_folder_without_a_description_is_known_by_the_size_of_its_weights(tmp_path, ending):
    for part in range(2):
        with open(tmp_path / f"weights-{part}{ending}", "wb") as handle:
            handle.truncate(1_305_000_000)
    assert guess_model(str(tmp_path)).hidden == 1280
    # The same weights in the other form are not twice the model.
    with open(tmp_path / f"all{'.bin' if ending == '.safetensors' else '.safetensors'}", "wb") as handle:
        handle.truncate(2_610_000_000)
    assert guess_model(str(tmp_path)).hidden == 1280


def verification(name, device="cpu", sample=32, plan="none", **config):
    return estimate_verification(guess_model(name), settings(device, **config), sample, plan)


def test_the_certificates_job_asks_for_what_its_model_takes(tmp_path):
    small, medium, large = (verification(f"esm2_{name}_UR50D") for name in ("t6_8M", "t33_650M", "t48_15B"))
    # Measured: 550 MB for the demo.
    assert 500 < small.memory_mb < 1400
    # The weights in fp32, and no more than a few layers of what is read layer by layer.
    assert medium.memory_mb - small.memory_mb > 2600
    assert 5000 < large.memory_mb < 12_000
    assert small.runtime_minutes(1) == 10 < medium.runtime_minutes(1) < large.runtime_minutes(1)
    on_gpu = verification("esm2_t36_3B_UR50D", "cuda", device_tflops=500)
    # Measured: 15 s on an H100.
    assert 10 < on_gpu.seconds < 120
    assert on_gpu.memory_mb < 5000


def test_the_certificates_job_asks_for_more_where_it_computes_or_looks_up_more(tmp_path):
    name = "esm2_t6_8M_UR50D"
    once = verification(name)
    assert verification(name, sample=128).seconds > once.seconds
    assert verification(name, threads=4).seconds < once.seconds
    assert verification(name, long_sequences="whole").memory_mb > once.memory_mb + 1000
    assert verification(name, include=["mean", "contacts"]).memory_mb > once.memory_mb + 1000
    assert verification(name, include=["per_residue"]).memory_mb > once.memory_mb + 100
    Plan(fingerprint="f", records=100_000_000, groups=()).write(tmp_path / "plan.json")
    # 28 bytes for each sequence of the index that the manifest is held against.
    assert verification(name, plan=tmp_path / "plan.json").memory_mb == pytest.approx(once.memory_mb + 2800)


def test_work_is_read_from_the_plan_and_guessed_from_the_inputs_before_there_is_one(tmp_path):
    sequences = "".join(
        f">protein{n} with a description of some length\n{'MKVLAAGIVGLLLAQWERTYDE' * 15}\n" for n in range(200)
    )
    plain = tmp_path / "a.faa"
    plain.write_text(sequences)
    guessed = guess_work(0, 2, tmp_path / "plan.json", [plain])
    assert not guessed.planned
    assert guessed.residues == pytest.approx(200 * 22 * 15 / 2, rel=0.3)

    groups = (GroupPlan(residues=5, sequences=1),) * 2
    Plan(fingerprint="f", records=2, groups=groups).write(tmp_path / "plan.json")
    assert guess_work(1, 2, tmp_path / "plan.json", [plain]) == GroupWork(5, 1, True)
    # A plan of another number of groups is an old one.
    assert guess_work(1, 3, tmp_path / "plan.json", [plain]).planned is False


def test_real_inputs_are_guessed_within_a_factor_of_two():
    demo = PROJECT / "resources" / "demo"
    files = [demo / "reviewed.fasta", demo / "unreviewed.fasta.gz", PROJECT / "tests/data/uniprot_sample_500.fasta.gz"]
    for file in files:
        text = (gzip.open(file, "rt") if file.suffix == ".gz" else open(file)).read()
        residues = sum(len(line) for line in text.splitlines() if not line.startswith(">"))
        assert 0.5 < guess_work(0, 1, "none", [file]).residues / residues < 2
