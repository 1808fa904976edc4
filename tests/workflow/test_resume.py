"""A run that was killed goes on where it was, and ends as one that was not."""

from __future__ import annotations

import pytest
from kill_at_random import kill_at_random

# Workers, supervisors and Snakemake alone are killed in test_slots.
TARGETS = ("everything", "collect", "plan")


@pytest.mark.timeout(1200)
def test_after_kills_at_random_moments_the_next_run_ends_with_the_same_outputs_and_repeats_no_finished_work(
    tmp_path, made_up_model
):
    trials = kill_at_random(tmp_path / "run", 3, seed=2, proteins=60, targets=TARGETS, model=made_up_model, groups=1)
    assert all(trial.hit for trial in trials)
    assert sum(trial.computed_again for trial in trials) == 0


def test_more_groups_than_sequences_finish_and_the_empty_ones_take_no_slot(quick_run):
    run = quick_run(1, groups=3)
    run.succeed()
    assert sorted(bool(group["workers"]) for group in run.groups()) == [False, False, True]
    assert run.summary()["embedded"] == 1
