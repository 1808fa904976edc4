"""A two-dimensional map of embeddings: principal components of the vectors of sampled records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from esmflow.arrays import Array
from esmflow.report.manifest_counts import SampledRecord
from esmflow.store.gather import read_rows
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
    """One vector for each record, the mean over its residues for an array that has one for each: fp32 `[N, D]`."""
    vectors: list[np.ndarray] = [np.empty(0)] * len(sample)
    for i, values in read_rows(store, [(record.segment, record.row) for record in sample], array):
        vectors[i] = values.astype(np.float32) if array.is_pooled else values.mean(axis=0, dtype=np.float32)
    return np.stack(vectors)
