"""What embed jobs ask the scheduler for: guessed before there is a plan, from the plan when they are scheduled."""

from __future__ import annotations

import re

from workflow_run import PROJECT

from esmflow.checkpoint.models import guess_model
from esmflow.config.configuration import validated
from esmflow.config.job_estimates import estimate_job, guess_work, job_settings


def shown(printed):
    """`runtime` of the embed job in what Snakemake prints."""
    return int(re.search(r"resources: .*gpu=1, .*runtime=(\d+)", printed)[1])


def estimated(run, plan):
    config = validated(run.config, PROJECT / "workflow/schemas/config.schema.yaml")
    work = guess_work(0, 1, plan, [run.folder / "part0.faa"])
    model = guess_model(str(run.config["model"]), run.results / "model" / "model.json")
    return estimate_job(work, model, job_settings(config, "cpu")).runtime_minutes(1)


def test_runtime_is_guessed_for_a_dry_run_and_that_of_the_new_plan_when_the_job_is_scheduled(quick_run):
    # A machine so slow that every residue shows.
    run = quick_run(8, groups=1, device_tflops=1e-8)
    plan = run.results / "plan" / "plan.json"
    guess = shown(run.succeed("-n"))
    assert guess == estimated(run, "no plan yet")

    first = shown(run.succeed())
    assert first == estimated(run, plan)
    assert 0.5 < guess / first < 2

    # The old plan is still there when this run begins.
    with open(run.folder / "part0.faa", "a") as handle:
        handle.write("".join(f">more{n}\n{'MKVLAAGIVGLLLAQWERTYDE' * (n + 1)}\n" for n in range(3)))
    second = shown(run.succeed())
    assert second == estimated(run, plan)
    assert second < first
