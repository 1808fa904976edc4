"""The two engines behind one interface: they agree on everything that can be asked for, however it is batched."""

from __future__ import annotations

import made_up
import numpy as np
import pytest

from esmflow.arrays import INCLUDE, Outputs
from esmflow.checkpoint.models import ModelDimensions, check_heads
from esmflow.engine import load_engine
from esmflow.engine.extraction import extract_esm_features
from esmflow.method import LongSequences

SEQUENCES = made_up.with_digests(["MKVLAAGIVG", "M", "ACDEFGHIKLMNPQRSTVWY" * 3, "UZBOXACDEF", "GG"])
ENGINES = ("packed", "reference")
OUTPUTS = Outputs((0, 1, 2), INCLUDE)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return made_up.write_converted(tmp_path_factory.mktemp("made_up") / "model.safetensors", made_up.random_model())


def embed(engine, budget, **options):
    """Every array of every sequence, by digest."""
    segment = extract_esm_features(SEQUENCES, engine, budget, **options).segment
    found = {}
    for name, values in segment.arrays.items():
        offsets = segment.offsets(name)
        for i, digest in enumerate(segment.digests):
            found[digest.tobytes(), name] = values[offsets[i] : offsets[i + 1]]
    return found


@pytest.mark.parametrize("budget", [12, 70, 4096])
def test_both_engines_give_the_same_arrays_however_they_are_batched(checkpoint, budget):
    expected = embed(load_engine("reference", str(checkpoint), OUTPUTS, "fp32", "cpu"), 4096)
    for name in ENGINES:
        found = embed(load_engine(name, str(checkpoint), OUTPUTS, "fp32", "cpu"), budget)
        assert found.keys() == expected.keys()
        assert len(found) == len(SEQUENCES) * len(OUTPUTS.names())
        for key, values in found.items():
            assert values.shape == expected[key].shape
            assert np.allclose(values, expected[key], rtol=1e-4, atol=1e-5), key


@pytest.mark.parametrize("name", ENGINES)
def test_windows_through_an_engine_leave_short_sequences_as_they_are_and_cover_the_long(checkpoint, name):
    outputs = Outputs((2,), tuple(kind for kind in INCLUDE if kind not in ("contacts", "logits")))
    engine = load_engine(name, str(checkpoint), outputs, "fp32", "cpu")
    told = []
    whole = embed(engine, 100)
    found = embed(engine, 100, long=LongSequences(20, 5), on_progress=told.append)
    assert sum(told) == sum(len(sequence) for _, sequence in SEQUENCES)
    for digest, sequence in SEQUENCES:
        for array in outputs.names():
            same = np.allclose(found[digest, array], whole[digest, array], rtol=1e-4, atol=1e-5)
            assert same == (len(sequence) <= 20)
        rows = found[digest, "per_residue_layer2"]
        assert rows.shape == (len(sequence), 32)
        for kind in ("mean", "max", "std"):
            pooled = getattr(rows, kind)(axis=0, keepdims=True)
            assert np.allclose(found[digest, f"{kind}_layer2"], pooled, rtol=1e-4, atol=1e-5)
        assert found[digest, "entropy"].shape == (len(sequence),)


@pytest.mark.parametrize("name", ENGINES)
def test_per_residue_arrays_in_fp16_are_the_fp32_ones_rounded(checkpoint, name):
    outputs = [Outputs((2,), ("mean", "per_residue"), kind) for kind in ("fp32", "fp16")]
    full, half = (embed(load_engine(name, str(checkpoint), each, "fp32", "cpu"), 100) for each in outputs)
    for (digest, array), values in half.items():
        if array.startswith("per_residue"):
            assert values.dtype == np.float16
            assert np.allclose(values, full[digest, array], rtol=1e-3, atol=1e-4)
        else:
            assert values.dtype == np.float32


def test_a_head_that_is_missing_is_an_error_with_a_remedy():
    bare = ModelDimensions(6, 320, 20, has_lm_head=False, has_contact_head=False)
    check_heads(["mean", "bos", "per_residue"], bare)
    with pytest.raises(ValueError, match=r"include: contacts .*contact-regression.pt"):
        check_heads(["contacts"], bare)
    with pytest.raises(ValueError, match=r"include: logits cannot .*no language model head"):
        check_heads(["logits"], bare)
    with pytest.raises(ValueError, match=r"include: entropy and pseudo_perplexity cannot .*leave entropy and .* out"):
        check_heads(["mean", "pseudo_perplexity", "entropy"], bare)
