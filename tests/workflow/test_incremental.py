"""Runs that follow a finished run: what is new is computed, what is lost is computed again, all else is reused."""

from __future__ import annotations

import os
import re
import shutil

import h5py
import numpy as np
import pytest
from made_up import proteins
from safetensors.numpy import load_file
from workflow_run import WorkflowRun

UNIQUE = proteins(400, 5, 30, seed=11)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, made_up_model):
    """A thousand records in three files, of which 400 are unique, embedded by two groups."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    shutil.copytree(made_up_model.parent, folder / "model")
    run = WorkflowRun(
        folder, "model/made_up.pt", groups=2, shard_residues=2000, precision="fp32", slot_lock_folder="slots"
    )
    sequences = [*UNIQUE, *UNIQUE[:200], *UNIQUE[100:300], *UNIQUE[200:400]]
    write(run, {f"part{number}.faa": sequences[number::3] for number in range(3)})
    run.succeed()
    return run


@pytest.fixture
def run(finished, tmp_path):
    """The finished run, in a folder of its own."""
    shutil.copytree(finished.folder, tmp_path / "run")
    return WorkflowRun(tmp_path / "run", **finished.config)


def write(run, files):
    for name, sequences in files.items():
        text = "".join(f">{name}_{n} of {len(sequences)}\n{s}\n" for n, s in enumerate(sequences))
        (run.folder / name).write_text(text)
    run.write_samples({name.removesuffix(".faa"): name for name in files})


def vectors(run):
    with h5py.File(run.results / "embeddings" / "mean_layer2" / "embeddings.h5") as file:
        return file["ids"].asstr()[:].tolist(), file["embeddings"][:]


def computed(run) -> list[int]:
    """Sequences that each group put through the model; a group without a worker loaded none."""
    groups = run.groups()
    assert all(bool(group["workers"]) == (group["model_load_seconds"] is not None) for group in groups)
    return [group["sequences"] for group in groups]


def stamps(run):
    return {path: path.stat().st_mtime_ns for path in run.segments()}


def test_of_a_thousand_records_400_go_through_the_model_and_then_only_what_is_new(run):
    assert sum(computed(run)) == 400
    assert run.summary()["embedded"] == run.summary()["records"] == 1000
    ids, first = vectors(run)
    assert len(ids) == len(first) == 1000
    assert len(np.unique(first, axis=0)) == 400
    segments = stamps(run)

    # One file more, one renamed, one record edited, the order changed.
    new = proteins(9, 20, 25, seed=12)
    write(run, {"new.faa": new})
    edited = (run.folder / "part1.faa").read_text().splitlines()
    edited[1] = edited[1][::-1] + "WWW"
    (run.folder / "part1.faa").write_text("\n".join(edited) + "\n")
    (run.folder / "part2.faa").rename(run.folder / "renamed.faa")
    run.write_samples({"new": "new.faa", "renamed": "renamed.faa", "part0": "part0.faa", "part1": "part1.faa"})
    run.succeed()
    assert sum(computed(run)) == 10
    assert min(computed(run)) > 0
    assert {path: stamp for path, stamp in stamps(run).items() if path in segments} == segments
    assert run.summary()["embedded"] == 1009
    again = dict(zip(*vectors(run)))
    kept = [i for i, name in enumerate(ids) if name != "part1.faa_0"]
    assert all(np.array_equal(again[ids[i]], first[i]) for i in kept)

    # One file less, another touched: nothing is computed, no model is loaded, no segment is written.
    segments = stamps(run)
    (run.folder / "part0.faa").touch()
    run.write_samples({"new": "new.faa", "part0": "part0.faa", "part1": "part1.faa"})
    run.succeed()
    assert computed(run) == [0, 0]
    assert [group["workers"] for group in run.groups()] == [[], []]
    assert stamps(run) == segments
    (run.folder / "part0.faa").touch()
    assert "Nothing to be done" in run.succeed()


def test_fewer_groups_another_budget_and_another_format_reuse_every_vector(run):
    before, segments = vectors(run), stamps(run)
    run.configure(groups=1, batch_tokens=500, threads=2, shard_residues=100, formats=["h5"])
    run.succeed()
    (group, *_) = run.groups()
    assert (group["group"], group["sequences"], group["workers"]) == ("0", 0, [])
    assert stamps(run) == segments
    assert run.summary()["embedded"] == 1000
    ids, found = vectors(run)
    assert ids == before[0]
    assert np.array_equal(found, before[1])


def test_what_is_lost_from_the_store_is_computed_again_by_the_same_command(run):
    before = vectors(run)
    shutil.rmtree(run.results / "store")
    run.configure(formats=["h5"])
    run.succeed()
    assert sum(computed(run)) == 400
    assert np.array_equal(vectors(run)[1], before[1])
    assert "Nothing to be done" in run.succeed()

    # A bit flips, and only collecting has anything to do: it says so, and the same command mends it.
    flipped, *others = run.segments()
    lost = len(load_file(flipped)["digests"])
    content = bytearray(flipped.read_bytes())
    content[len(content) // 2] ^= 4
    flipped.write_bytes(content)
    untouched = {path: path.stat().st_mtime_ns for path in others}
    run.configure(formats=["h5", "pt"])
    ended = run.run()
    assert ended.returncode == 1
    assert "Nothing to be done" not in run.run("-n").stdout
    assert "The same command again computes their sequences anew" in ended.stdout
    run.succeed()
    assert sum(computed(run)) == lost
    assert {path: path.stat().st_mtime_ns for path in others} == untouched
    assert len(list(flipped.parent.glob(f"{flipped.name}.damaged-*"))) == 1
    assert vectors(run)[0] == before[0]
    assert np.allclose(vectors(run)[1], before[1], atol=1e-5)


def would_run(run) -> list[str]:
    """The rules in the table that a dry run prints."""
    return re.findall(r"^(\w+) +\d+$", run.run("-n").stdout, re.MULTILINE)


def test_results_that_a_failed_step_took_away_are_made_again(run):
    assert would_run(run) == []
    (run.results / "manifest.parquet").unlink()
    assert "collect" in would_run(run)


def test_inputs_replaced_by_older_ones_and_weights_overwritten_in_place_are_noticed(run):
    assert would_run(run) == []
    part = run.folder / "part0.faa"
    content, stamp = part.read_text(), part.stat().st_mtime_ns
    part.write_text(content.replace("L", "I"))
    os.utime(part, ns=(stamp - 10**12, stamp - 10**12))
    assert "plan" in would_run(run)
    assert "model" not in would_run(run)
    part.write_text(content)
    os.utime(part, ns=(stamp, stamp))
    assert would_run(run) == []
    weights = run.folder / "model" / "made_up.pt"
    content, stamp = weights.read_bytes(), weights.stat().st_mtime_ns
    middle = len(content) // 2
    weights.write_bytes(content[:middle] + bytes(4) + content[middle + 4 :])
    assert "model" in would_run(run)
    # As `cp -p` leaves it: other weights, no larger, and older than what was made of them.
    os.utime(weights, ns=(stamp - 10**12, stamp - 10**12))
    assert "model" in would_run(run)
    weights.write_bytes(content)
    os.utime(weights, ns=(stamp, stamp))
    assert would_run(run) == []
