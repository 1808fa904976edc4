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
    of_layers = [
        "mean_layer0",
        "bos_layer0",
        "per_residue_layer0",
        "mean_layer12",
        "bos_layer12",
        "per_residue_layer12",
    ]
    assert OUTPUTS.names() == [*of_layers, "contacts", "logits"]
    assert (Array.named("mean_layer12").kind, Array.named("mean_layer12").layer) == ("mean", 12)
    assert Array.named("contacts").layer is None


def test_rows_are_counted_by_what_an_array_holds():
    lengths = np.array([3, 5])
    counts = {name: Array.named(name).rows(lengths).tolist() for name in ("mean_layer0", "logits", "contacts")}
    assert counts == {"mean_layer0": [1, 1], "logits": [3, 5], "contacts": [9, 25]}
    assert Array("per_residue", 1).offsets(lengths).tolist() == [0, 3, 8]
    assert Array("mean", 1).offsets(np.array([], np.int64)).tolist() == [0]


def test_only_arrays_of_one_row_a_sequence_are_pooled():
    assert {array.kind for array in OUTPUTS.arrays() if array.is_pooled} == {"mean", "bos"}


def test_a_row_takes_as_many_bytes_as_its_values():
    sizes = {array.kind: OUTPUTS.row_bytes(array, 320) for array in OUTPUTS.arrays()}
    assert sizes == {"mean": 1280, "bos": 1280, "per_residue": 640, "contacts": 4, "logits": 132}
    assert VOCABULARY_SIZE == SIZE
