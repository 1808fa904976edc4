"""Attention maps are those of fair-esm, whatever a sequence lies beside, and ends up with its record."""

import numpy as np
import pytest
import torch
from collected_run import CollectedRun, MadeUpRecord
from made_up import proteins, random_model, with_digests, write_converted
from made_up_families import random_esm1, write_esm1
from workflow_run import PROJECT

from esmflow.arrays import ATTENTION, Array, Outputs
from esmflow.checkpoint.convert import convert_checkpoint
from esmflow.config.configuration import ConfigurationError, validated
from esmflow.engine.extraction import extract_esm_features
from esmflow.engine.fair_esm import ReferenceEngine, padded_tokens
from esmflow.engine.packed import PackedEngine
from esmflow.plan.cost import Workload, shard_limit

LAYERS, HEADS, HIDDEN = 3, 4, 64
SEQUENCES = proteins(12, 3, 40, seed=3)
SCHEMA = PROJECT / "workflow" / "schemas" / "config.schema.yaml"


@pytest.fixture(scope="module")
def model():
    return random_model(LAYERS, HIDDEN, HEADS)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, model):
    return write_converted(tmp_path_factory.mktemp("maps") / "converted.safetensors", model)


@pytest.fixture(scope="module")
def theirs(model):
    """fair-esm's own, one sequence at a time: `[layers, heads, n + 2, n + 2]`."""
    with torch.no_grad():
        return [model(padded_tokens(model, [s]), need_head_weights=True)["attentions"][0].numpy() for s in SEQUENCES]


@pytest.mark.parametrize("engine", [PackedEngine, ReferenceEngine])
@pytest.mark.parametrize("include", [(ATTENTION,), ("mean", "contacts", ATTENTION, "logits")])
def test_the_maps_are_fair_esm_s(checkpoint, theirs, engine, include):
    outputs = Outputs((0, 1, 3), include)
    found = extract_esm_features(with_digests(SEQUENCES), engine.load(str(checkpoint), outputs, "fp32", "cpu"), 200)
    segment = found.segment
    assert not segment.failures
    assert [name for name in segment.arrays if name.startswith(ATTENTION)] == ["attention_layer1", "attention_layer3"]
    digests = [bytes(digest) for digest in segment.digests]
    for number, (digest, _) in enumerate(with_digests(SEQUENCES)):
        for layer in (1, 3):
            offsets = Array(ATTENTION, layer).offsets(segment.lengths)
            row, side = digests.index(digest), len(SEQUENCES[number]) + 2
            rows = segment.arrays[f"attention_layer{layer}"][offsets[row] : offsets[row + 1]]
            maps = rows.T.reshape(HEADS, side, side)
            assert np.abs(maps - theirs[number][layer - 1]).max() < 1e-5
            np.testing.assert_allclose(maps.sum(-1), 1, atol=1e-5)


def test_contacts_and_vectors_are_the_same_beside_maps(checkpoint):
    alone, beside = (
        extract_esm_features(
            with_digests(SEQUENCES), PackedEngine.load(str(checkpoint), Outputs((3,), include), "fp32", "cpu"), 200
        ).segment
        for include in (("mean", "contacts"), ("mean", "contacts", ATTENTION))
    )
    for name in ("mean_layer3", "contacts"):
        np.testing.assert_allclose(beside.arrays[name], alone.arrays[name], atol=1e-5)


def test_each_record_has_its_maps_in_an_archive_of_its_own(tmp_path, checkpoint, theirs):
    outputs = Outputs((1,), ("mean", ATTENTION))
    engine = PackedEngine.load(str(checkpoint), outputs, "fp32", "cpu")
    segment = extract_esm_features(with_digests(SEQUENCES), engine, 200).segment
    records = [MadeUpRecord("in/a.fasta", "twice" if n < 2 else f"p/{n}", s) for n, s in enumerate(SEQUENCES)]
    folder = CollectedRun(tmp_path, records, [segment], outputs).collect(["npz"]) / "npz" / "a"
    names = [line.split("\t")[2] for line in (folder / "index.tsv").read_text().splitlines()[1:]]
    assert names[:3] == ["twice.npz", "twice~2.npz", "p%2F2.npz"]
    for name, expected in zip(names, theirs, strict=True):
        with np.load(folder / name) as archive:
            assert sorted(archive) == ["attention_layer1", "mean_layer1"]
            assert np.abs(archive["attention_layer1"] - expected[0]).max() < 1e-5


def test_rows_and_bytes_are_counted_for_pairs_of_tokens():
    outputs, work = Outputs((0, 2), (ATTENTION,), "fp16"), Workload(50)
    lengths = np.array([3, 40, 70])
    work.add(lengths)
    (array,) = outputs.arrays()
    assert work.rows(array) == array.rows(np.minimum(lengths, 50)).sum() == 5**2 + 42**2 + 52**2
    assert outputs.row_bytes(array, 320, 20) == 80


def test_a_shard_with_maps_is_no_larger_than_a_gigabyte(model):
    from esmflow.checkpoint.models import OFFICIAL_MODELS

    big = OFFICIAL_MODELS["esm2_t33_650M_UR50D"]
    residues = shard_limit(Outputs((32, 33), (ATTENTION, "mean")), big, 256)
    assert 0.99e9 < residues / 256 * 258**2 * 20 * 4 * 2 < 1e9
    assert shard_limit(Outputs((33,), ("per_residue",)), big, 256) > 1e12


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({}, "residues (attention.max_residues): the maps of one layer of a sequence of 1022 residues take 83.9 MB"),
        ({"max_residues": 256, "long_sequences": "whole"}, "is for sequences of up to 256 residues"),
        ({"max_residues": 256, "formats": ["h5"]}, "include: attention is written as npz only"),
        ({"max_residues": 256, "formats": ["h5"], "include": ["mean", "attention"]}, "put npz into formats"),
        ({"max_residues": 256, "long_sequences": "window"}, "attention cannot be put together from windows"),
        ({"max_residues": 300}, "up to 256 residues"),
    ],
)
def test_what_would_be_too_large_or_lost_is_refused_before_the_run(given, sentence):
    with pytest.raises(ConfigurationError) as refused:
        validated({"model": "650M", "include": ["attention"], "formats": ["npz"], **given}, SCHEMA)
    assert sentence in str(refused.value)


def test_what_is_short_enough_goes_through():
    good = {"model": "650M", "include": ["attention"], "formats": ["npz"]}
    assert validated({**good, "max_residues": 256}, SCHEMA)
    assert validated({**good, "max_residues": 300, "attention": {"max_residues": 300}}, SCHEMA)


@pytest.mark.parametrize("norm_before", [True, False])
def test_maps_of_models_without_rotation_are_fair_esm_s_too(tmp_path, norm_before):
    model = random_esm1(norm_before)
    convert_checkpoint(write_esm1(tmp_path / "esm1.pt", model), tmp_path / "c.safetensors", "made up")
    engine = PackedEngine.load(str(tmp_path / "c.safetensors"), Outputs((2,), (ATTENTION,)), "fp32", "cpu")
    segment = extract_esm_features(with_digests(SEQUENCES[:1]), engine, 200).segment
    with torch.no_grad():
        # The tokens of both families are the same.
        expected = model(padded_tokens(random_model(), SEQUENCES[:1]), need_head_weights=True)["attentions"][
            0, 1
        ].numpy()
    found = segment.arrays["attention_layer2"].T.reshape(expected.shape)
    assert np.abs(found - expected).max() < 1e-5
