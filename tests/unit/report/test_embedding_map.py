"""The map's axes are the principal components of the vectors, whatever else they are."""

from __future__ import annotations

import numpy as np
import pytest

from esmflow.arrays import Array
from esmflow.method import Fingerprint
from esmflow.report.embedding_map import embedding_map
from esmflow.report.manifest_counts import SampledRecord
from esmflow.store.segments import Segment, Store


def mapped(folder, vectors):
    """The map of these vectors, as it is made of a run's."""
    method = Fingerprint("c", (6,), ("mean",), None, "packed", "", "fp32", "whole", None, None, "reject")
    store = Store(folder, method)
    store.create()
    count = len(vectors)
    digests = np.frombuffer(np.random.default_rng(0).bytes(16 * count), np.uint8).reshape(count, 16)
    store.write("a", Segment(digests, np.ones(count, np.int64), {"mean_layer6": vectors}, "fp32"))
    records = [SampledRecord("a.faa", str(n), 1, "a", n) for n in range(count)]
    return embedding_map(store, records, Array("mean", 6))


@pytest.mark.parametrize("far", [0, 100])
def test_the_axes_are_the_first_two_principal_components(tmp_path, far):
    random = np.random.default_rng(1)
    spread = np.geomspace(5, 0.01, 40)
    vectors = (far + random.normal(size=(300, 40)) * spread).astype(np.float32)
    found = mapped(tmp_path, vectors)
    centred = vectors - vectors.mean(axis=0, dtype=np.float64)
    scores, sizes, _ = np.linalg.svd(centred, full_matrices=False)
    for axis in (0, 1):
        expected = scores[:, axis] * sizes[axis]
        error = min(np.abs(found.points[:, axis] - sign * expected).max() for sign in (1, -1))
        assert error < 1e-3 * np.abs(expected).max()
        assert found.explained[axis] == pytest.approx(sizes[axis] ** 2 / (sizes**2).sum(), rel=1e-4)


def test_vectors_that_are_all_equal_lie_on_one_point(tmp_path):
    found = mapped(tmp_path, np.full((5, 8), 3.0, np.float32))
    assert np.abs(found.points).max() < 1e-6
    assert max(found.explained) <= 1
