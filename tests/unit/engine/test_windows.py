"""Windows: every residue is covered, and the parts are joined as the scheme says."""

from __future__ import annotations

import numpy as np
import pytest

from esmflow.arrays import LOG_LIKELIHOOD, Outputs
from esmflow.engine.windows import join_pieces, piece_outputs
from esmflow.method import LongSequences


def test_residues_are_averaged_over_their_windows_and_the_mean_counts_each_once():
    starts = [start for start, _ in LongSequences(4, 3).pieces(5)]
    assert starts == [0, 1]
    pieces = [
        {"per_residue_layer2": np.array([[0], [2], [4], [6]], np.float16), "bos_layer2": np.array([[10]], np.float32)},
        {"per_residue_layer2": np.array([[4], [4], [4], [9]], np.float16), "bos_layer2": np.array([[20]], np.float32)},
    ]
    outputs = Outputs((2,), ("mean", "bos", "per_residue"))
    joined = join_pieces(outputs, 5, starts, pieces)
    assert joined["per_residue_layer2"].ravel().tolist() == [0, 3, 4, 5, 9]
    assert joined["mean_layer2"].tolist() == [[pytest.approx(21 / 5)]]
    assert joined["bos_layer2"].tolist() == [[15]]
    types = {name: str(array.dtype) for name, array in joined.items()}
    assert types == {"mean_layer2": "float32", "bos_layer2": "float32", "per_residue_layer2": "float16"}


def test_maxima_deviations_and_scores_are_of_the_whole_sequence_and_no_mean_of_those_of_the_windows():
    outputs = Outputs((2,), ("max", "std", "entropy", "pseudo_perplexity"))
    assert piece_outputs(outputs) == Outputs((2,), ("per_residue", "entropy", LOG_LIKELIHOOD))
    rows, own = np.array([[0], [2], [4], [6]], np.float32), np.log(np.array([0.5, 0.5, 0.25, 0.125], np.float32))
    first = {"per_residue_layer2": rows, "entropy": rows[:, 0], LOG_LIKELIHOOD: own}
    last = {"per_residue_layer2": rows + 2, "entropy": rows[:, 0], LOG_LIKELIHOOD: own}
    joined = join_pieces(outputs, 5, [0, 1], [first, last])
    # Residues have 0, (2 + 2) / 2, 4, 6 and 8.
    assert joined["max_layer2"].tolist() == [[8]]
    assert joined["std_layer2"].tolist() == [[pytest.approx(np.std([0, 2, 4, 6, 8]))]]
    assert joined["entropy"].tolist() == [0, 1, 3, 5, 6]
    by_residue = [own[0], own[:2].mean(), own[1:3].mean(), own[2:].mean(), own[3]]
    assert joined["pseudo_perplexity"].tolist() == [pytest.approx(np.exp(-np.mean(by_residue)))]
    assert {str(values.dtype) for values in joined.values()} == {"float32"}


def test_only_what_is_needed_of_a_piece_is_computed():
    assert piece_outputs(Outputs((1, 2), ("mean",))) == Outputs((1, 2), ("per_residue",))
    assert piece_outputs(Outputs((1,), ("bos", "mean"), "fp16")) == Outputs((1,), ("bos", "per_residue"), "fp16")
