"""A two-dimensional map of embeddings: principal components of the vectors of sampled records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from esmflow.arrays import PER_LAYER, Array
from esmflow.report.manifest_counts import SampledRecord
from esmflow.store.gather import read_rows
from esmflow.store.segments import Store

FEWEST = 3
# A map for each of more outputs than this would be too much of one page.
MOST_MAPS = 4
# As little of the points as this may lie far from all others and stand at the edge of the frame.
_FEW = 0.05


@dataclass(frozen=True)
class EmbeddingMap:
    """Points of sampled records: fp32 `[N, 2]`. explained: the share of the variance on each of the two axes."""

    array: Array
    points: np.ndarray
    explained: tuple[float, float]

    @property
    def framed(self) -> np.ndarray:
        """The points, with those that lie far from all others moved to the edge: they would squeeze the rest."""
        # Tukey's far out: three times the middle half's width beyond it.
        low, high = np.quantile(self.points, (0.25, 0.75), axis=0)
        framed = np.clip(self.points, low - 3 * (high - low), high + 3 * (high - low))
        moved = (framed != self.points).any(axis=1).sum()
        return framed if moved <= max(1, _FEW * len(framed)) else self.points

    @property
    def moved(self) -> int:
        """How many points of `framed` are not where they belong."""
        return int((self.framed != self.points).any(axis=1).sum())


def map_arrays(arrays: Sequence[Array]) -> list[Array]:
    """The arrays that maps are made of, the last layer's mean first: pooled ones, else means of per-residue ones."""
    of_kinds = ([array for array in arrays if array.kind == kind] for kind in PER_LAYER)
    *pooled, per_residue = (sorted(of_kind, reverse=True) for of_kind in of_kinds)
    return ([array for of_kind in pooled for array in of_kind] or per_residue)[:MOST_MAPS]


def embedding_map(store: Store, sample: Sequence[SampledRecord], array: Array) -> EmbeddingMap:
    """Projects the vectors of at least three records on their first two principal components."""
    vectors = sampled_vectors(store, sample, array)
    vectors -= vectors.mean(axis=0)
    # scikit-learn would take longer to import than this takes. The product is of one array, in its own precision: of a
    # symmetric matrix half is computed.
    variances, directions = np.linalg.eigh((vectors.T @ vectors).astype(np.float64))
    directions = directions[:, :-3:-1]
    # Of the two directions of an axis always the same one.
    directions *= np.sign(directions[np.abs(directions).argmax(axis=0), (0, 1)])
    total = max(float(variances.sum()), np.finfo(float).tiny)
    first, second = (float(share) / total for share in variances[:-3:-1])
    return EmbeddingMap(array, (vectors @ directions).astype(np.float32), (first, second))


def sampled_vectors(store: Store, sample: Sequence[SampledRecord], array: Array) -> np.ndarray:
    """One vector for each record, the mean over its residues for an array that has one for each: fp32 `[N, D]`."""
    vectors: list[np.ndarray] = [np.empty(0)] * len(sample)
    for i, values in read_rows(store, [(record.segment, record.row) for record in sample], array):
        vectors[i] = values.astype(np.float32) if array.is_pooled else values.mean(axis=0, dtype=np.float32)
    return np.stack(vectors)
