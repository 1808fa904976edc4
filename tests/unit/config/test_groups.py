"""How a run is cut: as many jobs as can run at once, none of less than half a minute, and as before when done."""

from __future__ import annotations

from pathlib import Path

import pytest

from esmflow.config.configuration import validated
from esmflow.config.job_estimates import Given, Groups, decide_groups, group_names, resolve_threads
from esmflow.files import write_json
from esmflow.plan.cost import useful_groups
from esmflow.plan.run_plan import GroupPlan, Plan

SCHEMA = Path(__file__).resolve().parents[3] / "workflow" / "schemas" / "config.schema.yaml"
LAPTOP = Given(cores=8, jobs=None, gpus=4, memory_mb=16_000)


def configured(**config):
    return validated({"model": "esm2_t6_8M_UR50D", "threads": 1, **config}, SCHEMA)


def decided(folder, given=LAPTOP, device="cpu", residues=1000, **config):
    # A file that changes while Snakemake reads its configuration is not looked at twice.
    file = folder / f"{residues}.faa"
    file.write_text(">a\n" + "M" * residues + "\n")
    plan = folder / "results" / "plan" / "plan.json"
    return decide_groups(configured(**config), device, given, plan, [str(file)])


@pytest.mark.parametrize(
    ("seconds", "at_once", "groups"),
    [
        *((0, 4, 1), (29, 4, 1), (59, 4, 1), (60, 4, 2), (119, 4, 3), (120, 4, 4), (4 * 3600, 4, 4)),
        *((4 * 3600 + 1, 4, 8), (10 * 3600, 1, 10), (1e12, 3, 10_000), (1e6, 1_000_000, 10_000)),
    ],
)
def test_little_work_is_one_job_and_long_work_has_every_slot_busy_with_jobs_of_an_hour_at_most(
    seconds, at_once, groups
):
    assert useful_groups(seconds, at_once) == groups


def test_a_few_sequences_are_one_job_whatever_is_given(tmp_path):
    assert decided(tmp_path).number == 1
    assert decided(tmp_path, Given(None, 100, None, 1e6), "cuda").number == 1
    # A number in the configuration is that number.
    assert decided(tmp_path, groups=4) == Groups(4)


def test_a_human_proteome_keeps_two_gpus_busy(tmp_path):
    two = Given(cores=8, jobs=None, gpus=2, memory_mb=64_000)
    config = {"model": "esm2_t33_650M_UR50D", "max_residues": 1022}
    assert decided(tmp_path, two, "cuda", 11_400_000, **config).number == 2


def test_a_table_of_variants_is_work_by_its_size(tmp_path):
    table = tmp_path / "variants.tsv"
    table.write_text("id\tvariant\n" + "P84927\tA42G\n" * 40_000)
    assert decided(tmp_path).number == 1
    assert decided(tmp_path, variants=str(table)).number == 4


@pytest.mark.parametrize(
    ("given", "device", "config", "groups"),
    [
        (LAPTOP, "cpu", {}, 4),
        (Given(2, None, 4, 16_000), "cpu", {}, 2),
        (Given(8, None, None, 16_000), "cpu", {}, 8),
        (Given(8, None, 0, 16_000), "cpu", {}, 8),
        (Given(16, None, 4, 16_000), "cuda", {"gpus_per_job": 2}, 2),
        (Given(4, None, 8, 16_000), "cuda", {"threads": 2}, 2),
        # On a cluster cores are the scheduler's; gpu limits the whole run.
        (Given(None, 100, None, 16_000), "cuda", {}, 20),
        (Given(1, 100, 3, 16_000), "cuda", {}, 3),
    ],
)
def test_work_of_ten_minutes_is_cut_into_what_can_run_at_once(tmp_path, given, device, config, groups):
    # 750,000 residues by the file's size, at 15 million operations each.
    work = decided(tmp_path, residues=1_000_000).work
    tflops = work / (10.01 * 60) / 1e12
    assert decided(tmp_path, given, device, 1_000_000, device_tflops=tflops, **config).number == groups


def finish_run(folder, groups, work):
    Plan(fingerprint="f", records=1, groups=(GroupPlan(),) * groups, work=work).write(
        folder / "results" / "plan" / "plan.json"
    )
    for group in group_names(groups):
        write_json(folder / "results" / "embed" / f"group-{group}" / "run.json", {})


def test_a_run_that_is_done_stays_as_it_was_cut_until_there_is_other_work(tmp_path):
    slow = {"device_tflops": decided(tmp_path).work / 10_000 / 1e12}
    two = Given(2, None, 2, 16_000)
    before = decided(tmp_path, two, **slow)
    finish_run(tmp_path, before.number, before.work)
    assert decided(tmp_path, Given(8, None, 7, 16_000), **slow) == before
    assert decided(tmp_path, **slow, residues=2000).number != before.number
    # What is not done is cut anew for what is given now.
    (tmp_path / "results" / "embed" / f"group-{group_names(before.number)[0]}" / "run.json").unlink()
    assert decided(tmp_path, Given(8, None, 7, 16_000), **slow).number % 7 == 0
    assert decided(tmp_path, two, **slow) == before


@pytest.mark.parametrize(
    ("given", "device", "config", "threads"),
    [
        (LAPTOP, "cpu", {}, 2),
        (Given(2, None, 4, 16_000), "cpu", {}, 1),
        (Given(8, None, None, 16_000), "cpu", {}, 1),
        # 650M in fp32 takes more than 3 GB: two of them, with four cores each.
        (Given(8, None, None, 8_000), "cpu", {"model": "esm2_t33_650M_UR50D"}, 4),
        (LAPTOP, "cuda", {}, 2),
        (Given(None, 100, None, 16_000), "cpu", {}, 1),
        (LAPTOP, "cpu", {"threads": 3}, 3),
    ],
)
def test_threads_use_the_cores_that_jobs_leave(tmp_path, monkeypatch, given, device, config, threads):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    (tmp_path / "a.faa").write_text(">a\nMKV\n")
    chosen = configured(**{"threads": "auto", **config})
    assert resolve_threads(chosen, device, given, [str(tmp_path / "a.faa")]) == threads
    monkeypatch.setenv("OMP_NUM_THREADS", "5,2")
    assert resolve_threads(chosen, device, given, [str(tmp_path / "a.faa")]) == config.get("threads", 5)
