"""`esmflow.embed`: the numbers of the engine for a few sequences, and sentences for those that it cannot take."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from made_up import relative_error

import esmflow
from esmflow.config.configuration import ConfigurationError


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="module")
def sequences(golden):
    return [str(sequence) for sequence in golden["sequences"] if len(sequence) < 120]


def test_vectors_are_those_of_transformers_in_the_order_that_was_given(golden, sequences, real_model_folder, cache):
    chosen = [str(sequence) in sequences for sequence in golden["sequences"]]
    found = esmflow.embed([*sequences, sequences[0].lower()], model=real_model_folder, device="cpu")
    assert relative_error(found[:-1], golden["mean_layer6"][chosen]) < 1e-4
    np.testing.assert_array_equal(found[-1], found[0])
    # Converted once, for the calls that follow.
    assert len(list(cache.glob("esmflow/*.safetensors"))) == 1


@pytest.mark.parametrize(("kind", "shape"), [("per_residue", (6, 320)), ("contacts", (6, 6))])
def test_a_dict_gives_a_dict_with_what_is_asked_for(real_model_folder, kind, shape):
    found = esmflow.embed({"a": "MKVLAA", "b": "GIVEQCC"}, model=real_model_folder, kind=kind, device="cpu")
    assert list(found) == ["a", "b"]
    assert found["a"].shape == shape


def test_attention_maps_of_short_sequences(real_model_folder):
    (maps,) = esmflow.embed(["MKVLAA"], model=real_model_folder, kind="attention", device="cpu", max_residues=64)
    assert maps.shape == (20, 8, 8)
    np.testing.assert_allclose(maps.sum(-1), 1, atol=1e-5)
    with pytest.raises(ConfigurationError, match="up to 256"):
        esmflow.embed(["MKVLAA"], model=real_model_folder, kind="attention", device="cpu")


def test_other_layers_and_other_iterables(real_model_folder, golden, sequences):
    number = list(golden["sequences"]).index(sequences[0])
    (found,) = esmflow.embed((s for s in sequences[:1]), model=real_model_folder, layer=3, device="cpu")
    assert relative_error(found, golden["mean_layer3"][number]) < 1e-4


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["MKV", "MK1V", ""], r"sequence 1: '1' at residue 3 \(invalid_residue: .*\); sequence 2: no residues"),
        ({"gene": "ACGT" * 20}, r"gene: 80 letters, all of them A, C, G, T, U or N \(nucleotide_sequence: translate"),
        ("MKV", "give a list of sequences"),
        ([], "there is no sequence"),
        ([7], "sequence 0: a int is no text"),
    ],
)
def test_what_is_no_sequence_is_said_of_each(real_model_folder, given, message):
    with pytest.raises(esmflow.SequencesError, match=message):
        esmflow.embed(given, model=real_model_folder)


def test_settings_are_those_of_the_configuration(real_model_folder):
    with pytest.raises(ConfigurationError, match="did you mean 650M"):
        esmflow.embed(["MKV"], model="651M")
    with pytest.raises(ConfigurationError, match="did you mean mean"):
        esmflow.embed(["MKV"], model=real_model_folder, kind="average")
    with pytest.raises(esmflow.SequencesError, match="groups is about runs"):
        esmflow.embed(["MKV"], model=real_model_folder, groups=3)
    replaced = {"invalid_residues": "replace_with_x", "device": "cpu"}
    found = esmflow.embed(["MJV", "MXV"], model=real_model_folder, **replaced)
    np.testing.assert_array_equal(found[0], found[1])


def test_what_is_cut_off_is_said(real_model_folder):
    options = {"model": real_model_folder, "max_residues": 5, "device": "cpu"}
    with pytest.warns(UserWarning, match="1 sequence of more than 5 residues cut there"):
        cut = esmflow.embed(["MKVLAGG", "MKVLA"], **options)
    np.testing.assert_allclose(cut[0], cut[1], rtol=1e-5, atol=1e-6)
    with pytest.raises(esmflow.SequencesError, match=r"7 residues; the limit is 5 \(too_long"):
        esmflow.embed(["MKVLAGG"], **options, long_sequences="reject")


def test_importing_esmflow_loads_nothing_else():
    code = "import sys, esmflow; print([name for name in sys.modules if name.startswith(('esmflow.', 'numpy'))])"
    paths = {"PYTHONPATH": next(path for path in sys.path if path.endswith("workflow/scripts"))}
    assert subprocess.run([sys.executable, "-c", code], env=paths, capture_output=True, text=True).stdout == "[]\n"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        esmflow.nothing  # noqa: B018
    assert {"embed", "open"} <= set(dir(esmflow))
