"""A run that was killed whole goes on where it was, and what is shared is not computed again."""

from __future__ import annotations

import json
import os
import signal

import h5py
import numpy as np
from workflow_run import wait_until


def vectors(run):
    with h5py.File(run.results / "embeddings" / "mean_layer6" / "embeddings.h5") as file:
        return dict(zip(file["ids"].asstr()[:], file["embeddings"][:]))


def test_after_sigkill_of_everything_in_the_middle_of_a_group_no_finished_shard_is_computed_again(small_run):
    run = small_run(100, groups=2, shard_residues=1500, folder="killed")
    process = run.start()
    wait_until(lambda: len(run.segments()) >= 3, what="three segments")
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    committed = {path.stem for path in run.segments()}
    written_at = {path.stem: path.stat().st_mtime_ns for path in run.segments()}

    run.succeed("--unlock")
    run.succeed()
    groups = run.groups()
    assert {name for group in groups for name in group["segments_reused"]} == committed
    assert committed.isdisjoint(name for group in groups for name in group["segments_written"])
    assert {path.stem: path.stat().st_mtime_ns for path in run.segments() if path.stem in committed} == written_at
    assert run.summary()["embedded"] == 100
    assert not list(run.results.rglob("*.part"))

    undisturbed = small_run(100, groups=2, shard_residues=1500, folder="undisturbed")
    undisturbed.succeed()
    expected, found = vectors(undisturbed), vectors(run)
    assert list(found) == list(expected)
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


def test_a_new_file_costs_only_its_own_sequences(small_run):
    run = small_run(12, files=3, groups=2)
    all_samples = (run.folder / "samples.tsv").read_text()
    (run.folder / "samples.tsv").write_text("".join(all_samples.splitlines(keepends=True)[:3]))
    run.succeed()
    assert sum(group["sequences"] for group in run.groups()) == 8
    (run.folder / "samples.tsv").write_text(all_samples)
    run.succeed()
    assert sum(group["sequences"] for group in run.groups()) == 4
    assert json.loads((run.results / "plan" / "plan.json").read_text())["held"] == 8
    assert run.summary()["embedded"] == 12


def test_a_changed_layer_or_precision_never_reuses_an_old_vector(small_run):
    run = small_run(4, groups=1)
    run.succeed()
    for change in ({"layers": [3]}, {"layers": [-1], "include": ["bos"]}, {"include": ["mean"], "precision": "fp32"}):
        run.configure(**change)
        run.succeed()
        assert run.groups()[0]["sequences"] == 4
        assert run.groups()[0]["segments_reused"] == []


def test_more_groups_than_sequences_finish_and_the_empty_ones_take_no_slot(small_run):
    run = small_run(2, groups=5)
    run.succeed()
    busy = [group for group in run.groups() if group["workers"]]
    assert len(run.groups()) == 5
    assert len(busy) == 2
    assert run.summary()["embedded"] == 2
