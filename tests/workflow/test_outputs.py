"""Everything that `include`, `long_sequences` and `engine` offer, through a whole run."""

from __future__ import annotations

import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from esmflow.arrays import Outputs
from esmflow.engine.fair_esm import ReferenceEngine
from esmflow.method import LongSequences

PROTEINS = 6


def read(run, array):
    with h5py.File(run.results / "embeddings" / array / "embeddings.h5") as file:
        offsets = file["offsets"][:] if "offsets" in file else None
        return list(file["ids"].asstr()[:]), file["embeddings"][:], offsets


def marks(run, column):
    return pq.read_table(run.results / "manifest.parquet")[column].to_pylist()


def reference(checkpoint, sequence, include, layers=(6,)):
    engine = ReferenceEngine.load(str(checkpoint), Outputs(layers, include), "fp32", "cpu")
    return engine.fetch(engine.launch(engine.prepare([sequence])))


def error(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("engine", ["packed", "reference"])
def test_residues_and_contacts_come_out_as_fair_esm_computes_them(small_run, short_proteins, real_checkpoint, engine):
    include = ["mean", "per_residue", "contacts"]
    run = small_run(PROTEINS, groups=1, include=include, per_residue_precision="fp16", engine=engine)
    run.succeed()
    ids, rows, row_offsets = read(run, "per_residue_layer6")
    _, maps, map_offsets = read(run, "contacts")
    assert rows.dtype == np.float16
    assert len(ids) == PROTEINS
    loaded = {
        array: torch.load(run.results / "embeddings" / array / "pt" / "part0_ESM.pt", weights_only=True)["data"]
        for array in ("per_residue_layer6", "contacts")
    }
    for i, (_, sequence) in enumerate(short_proteins[:PROTEINS]):
        expected = reference(real_checkpoint, sequence, ("per_residue", "contacts"))
        n = len(sequence)
        mine = rows[row_offsets[i] : row_offsets[i + 1]]
        assert error(mine.astype(np.float32), expected["per_residue_layer6"]) < 1e-3
        contacts = maps[map_offsets[i] : map_offsets[i + 1]].reshape(n, n)
        assert error(contacts, expected["contacts"].reshape(n, n)) < 1e-4
        assert np.array_equal(loaded["per_residue_layer6"][i].numpy(), mine)
        assert np.array_equal(loaded["contacts"][i].numpy(), contacts)


def test_windows_cover_long_proteins_and_truncation_is_marked(small_run, short_proteins, real_checkpoint):
    run = small_run(PROTEINS, groups=1, long_sequences="window", max_residues=60, window_overlap=20)
    run.succeed()
    _, windowed, _ = read(run, "mean_layer6")
    long = [len(sequence) > 60 for _, sequence in short_proteins[:PROTEINS]]
    assert marks(run, "windowed") == long
    assert not any(marks(run, "truncated"))
    for i, (_, sequence) in enumerate(short_proteins[:PROTEINS]):
        total, times = np.zeros((len(sequence), 320)), np.zeros((len(sequence), 1))
        for start, _ in LongSequences(60, 20).pieces(len(sequence)):
            piece = sequence[start : start + 60]
            total[start : start + 60] += reference(real_checkpoint, piece, ("per_residue",))["per_residue_layer6"]
            times[start : start + 60] += 1
        assert error(windowed[i], (total / times).mean(axis=0)) < 1e-5

    run.configure(long_sequences="truncate")
    run.succeed()
    _, truncated, _ = read(run, "mean_layer6")
    assert marks(run, "truncated") == long
    assert not any(marks(run, "windowed"))
    expected = [reference(real_checkpoint, s[:60], ("mean",))["mean_layer6"][0] for _, s in short_proteins[:PROTEINS]]
    assert error(truncated, np.array(expected)) < 1e-5


def test_logits_of_a_checkpoint_without_a_head_are_refused_before_a_gpu_is_used(small_run, real_model_folder):
    run = small_run(2, groups=1, model=real_model_folder, include=["logits"])
    ended = run.run()
    assert ended.returncode == 1
    assert "logits cannot be had: the checkpoint has no language model head" in ended.stdout
    assert not (run.results / "plan").exists()


def test_embeddings_are_what_the_configuration_asks_for_whatever_was_done_to_the_folder(quick_run):
    run = quick_run(PROTEINS, groups=1, formats=["h5", "esm"])
    run.succeed()
    embeddings = run.results / "embeddings"
    (embeddings / "notes.txt").write_text("mine")
    run.configure(formats=["h5"])
    run.succeed()
    # Once is enough.
    assert "Nothing to be done" in run.succeed("-n")
    (embeddings / "mean_layer2" / "embeddings.h5").unlink()
    run.succeed()
    assert len(read(run, "mean_layer2")[0]) == PROTEINS
    assert not (embeddings / "notes.txt").exists()
    assert "Nothing to be done" in run.succeed()
