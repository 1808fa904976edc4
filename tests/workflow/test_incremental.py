"""Runs that follow a finished run: what is new is computed, what is lost is computed again, all else is reused."""

from __future__ import annotations

import json
import shutil

import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from made_up import proteins

UNIQUE = proteins(400, 5, 30, seed=11)


@pytest.fixture
def run(small_run):
    """A thousand records in three files, of which 400 are unique, embedded by two groups."""
    run = small_run(0, groups=2, shard_residues=2000, precision="fp32")
    sequences = [*UNIQUE, *UNIQUE[:200], *UNIQUE[100:300], *UNIQUE[200:400]]
    write(run, {f"part{number}.faa": sequences[number::3] for number in range(3)})
    run.succeed()
    return run


def write(run, files):
    for name, sequences in files.items():
        text = "".join(f">{name}_{n} of {len(sequences)}\n{s}\n" for n, s in enumerate(sequences))
        (run.folder / name).write_text(text)
    listed = [*(line.split("\t")[1] for line in (run.folder / "samples.tsv").read_text().splitlines()[1:]), *files]
    run.write_samples({name.removesuffix(".faa"): name for name in dict.fromkeys(listed)})


def vectors(run):
    with h5py.File(run.results / "embeddings" / "mean_layer6" / "embeddings.h5") as file:
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


def test_groups_budget_and_formats_change_nothing_that_was_computed_but_an_engine_does(run):
    before, segments = vectors(run), stamps(run)
    for change in ({"groups": 1, "batch_tokens": 500}, {"groups": 3, "formats": ["h5"], "threads": 2}):
        run.configure(**change)
        run.succeed()
        assert len(run.groups()) >= run.config["groups"]
        assert sum(computed(run)) == 0
        assert stamps(run) == segments
        assert run.summary()["embedded"] == 1000
        ids, found = vectors(run)
        assert ids == before[0]
        assert np.array_equal(found, before[1])
    run.configure(engine="reference", groups=1)
    run.succeed()
    assert json.loads((run.results / "plan" / "plan.json").read_text())["held"] == 0
    assert {path: stamp for path, stamp in stamps(run).items() if path in segments} == segments
    assert len(stamps(run)) > len(segments)


def test_what_is_lost_from_the_store_is_computed_again_by_the_same_command(run):
    assert "Nothing to be done" in run.succeed()
    before = vectors(run)
    shutil.rmtree(run.results / "store")
    run.configure(formats=["h5"])
    printed = run.run("-n").stdout
    assert "rule plan:" in printed
    run.succeed()
    assert sum(computed(run)) == 400
    assert np.array_equal(vectors(run)[1], before[1])
    assert "Nothing to be done" in run.succeed()

    # A bit flips, and only collecting has anything to do: it says so, and the same command mends it.
    flipped, *others = run.segments()
    content = bytearray(flipped.read_bytes())
    content[len(content) // 2] ^= 4
    flipped.write_bytes(content)
    untouched = {path: path.stat().st_mtime_ns for path in others}
    run.configure(formats=["h5", "pt"])
    ended = run.run()
    assert ended.returncode == 1
    assert "The same command again computes their sequences anew" in ended.stdout
    run.succeed()
    lost = pq.read_table(run.results / "manifest.parquet")["segment"].to_pylist().count(flipped.stem)
    assert 0 < sum(computed(run)) < 400
    assert lost >= 0
    assert {path: path.stat().st_mtime_ns for path in others} == untouched
    assert len(list(flipped.parent.glob(f"{flipped.name}.damaged-*"))) == 1
    assert vectors(run)[0] == before[0]
    assert np.allclose(vectors(run)[1], before[1], atol=1e-5)


def test_weights_overwritten_in_place_and_inputs_replaced_by_older_ones_are_noticed(small_run, real_model_folder):
    run = small_run(4, groups=1)
    shutil.copytree(real_model_folder, run.folder / "model")
    run.configure(model="model")
    run.succeed()
    _, first = vectors(run)

    old = run.folder / "old.faa"
    old.write_text((run.folder / "part0.faa").read_text().replace("L", "I"))
    shutil.copystat(run.folder / "model" / "config.json", old)
    old.rename(run.folder / "part0.faa")
    run.succeed()
    assert computed(run) == [4]
    _, second = vectors(run)
    assert not np.allclose(first, second)

    weights = torch.load(run.folder / "model" / "pytorch_model.bin", weights_only=True)
    weights["esm.encoder.emb_layer_norm_after.bias"] += 1
    torch.save(weights, run.folder / "model" / "pytorch_model.bin")
    run.succeed()
    assert computed(run) == [4]
    assert np.allclose(vectors(run)[1], second + 1, atol=1e-5)
