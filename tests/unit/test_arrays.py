"""Arrays by their names: what they hold and where each sequence's rows are."""

from __future__ import annotations

import numpy as np
import pytest

from esmflow.arrays import INCLUDE, VOCABULARY_SIZE, Array, Outputs
from esmflow.inputs.residues import SIZE

OUTPUTS = Outputs((0, 12), INCLUDE, "fp16")


@pytest.mark.parametrize("array", OUTPUTS.arrays(), ids=str)
def test_an_array_is_told_from_its_name(array):
    assert Array.named(array.name) == array


def test_names_are_those_of_old_stores():
    of_layers = [f"{kind}_layer{layer}" for layer in (0, 12) for kind in ("mean", "bos", "max", "std", "per_residue")]
    assert OUTPUTS.names() == [*of_layers, "contacts", "logits", "entropy", "pseudo_perplexity"]
    assert (Array.named("mean_layer12").kind, Array.named("mean_layer12").layer) == ("mean", 12)
    assert Array.named("contacts").layer is None


def test_rows_are_counted_by_what_an_array_holds():
    lengths = np.array([3, 5])
    counts = {array.kind: array.rows(lengths).tolist() for array in OUTPUTS.arrays()}
    assert counts["contacts"] == [9, 25]
    assert [counts[kind] for kind in ("per_residue", "logits", "entropy")] == [[3, 5]] * 3
    assert [counts[kind] for kind in ("mean", "bos", "max", "std", "pseudo_perplexity")] == [[1, 1]] * 5
    assert Array("per_residue", 1).offsets(lengths).tolist() == [0, 3, 8]
    assert Array("mean", 1).offsets(np.array([], np.int64)).tolist() == [0]


def test_only_arrays_of_one_row_a_sequence_are_pooled():
    vectors = {array.kind for array in OUTPUTS.arrays() if array.is_vector}
    assert vectors == {"mean", "bos", "max", "std"}
    assert {array.kind for array in OUTPUTS.arrays() if array.is_pooled} == {*vectors, "pseudo_perplexity"}


def test_a_row_takes_as_many_bytes_as_its_values():
    sizes = {array.kind: OUTPUTS.row_bytes(array, 320) for array in OUTPUTS.arrays()}
    vectors = dict.fromkeys(("mean", "bos", "max", "std"), 1280)
    numbers = dict.fromkeys(("contacts", "entropy", "pseudo_perplexity"), 4)
    assert sizes == vectors | numbers | {"per_residue": 640, "logits": 132}
    assert VOCABULARY_SIZE == SIZE
