"""A two-dimensional map of embeddings: principal components of the vectors of sampled records."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from esmflow.arrays import Array
from esmflow.report.manifest_counts import SampledRecord
from esmflow.store.segments import Store

FEWEST = 3


@dataclass(frozen=True)
class EmbeddingMap:
    """Points of sampled records: fp32 `[N, 2]`. explained: the share of the variance on each of the two axes."""

    array: Array
    points: np.ndarray
    explained: tuple[float, float]


def map_array(arrays: Sequence[Array]) -> Array | None:
    """The array that a map is made of: the last layer's mean, else bos, else the mean over per-residue vectors."""
    for kind in ("mean", "bos", "per_residue"):
        of_kind = [array for array in arrays if array.kind == kind]
        if of_kind:
            return max(of_kind)
    return None


def embedding_map(store: Store, sample: Sequence[SampledRecord], array: Array) -> EmbeddingMap:
    """Projects the vectors of at least three records on their first two principal components."""
    # Takes a second to import, which only this needs.
    from sklearn.decomposition import PCA

    vectors = sampled_vectors(store, sample, array)
    components = PCA(2, svd_solver="randomized" if min(vectors.shape) > 500 else "full", random_state=0)
    points = components.fit_transform(vectors)
    first, second = (float(share) for share in components.explained_variance_ratio_)
    return EmbeddingMap(array, points.astype(np.float32), (first, second))


def sampled_vectors(store: Store, sample: Sequence[SampledRecord], array: Array) -> np.ndarray:
    """One vector for each record, read row by row from mapped segments: fp32 `[N, D]`."""
    by_segment: dict[str, list[int]] = defaultdict(list)
    for i, record in enumerate(sample):
        by_segment[record.segment].append(i)
    vectors: np.ndarray | None = None
    for name, members in by_segment.items():
        segment = store.read(name)
        values = segment.arrays[array.name]
        if vectors is None:
            vectors = np.empty((len(sample), values.shape[1]), np.float32)
        rows = np.array([sample[i].row for i in members])
        if array.is_pooled:
            vectors[members] = values[rows]
        else:
            offsets = array.offsets(segment.lengths)
            for i, row in zip(members, rows):
                vectors[i] = values[offsets[row] : offsets[row + 1]].mean(axis=0, dtype=np.float32)
    assert vectors is not None
    return vectors
