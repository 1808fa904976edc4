"""The nearest of many vectors, exactly, by their cosine."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import numpy as np


class Neighbours:
    """Vectors `[N, D]` to search. With FAISS where it is installed, else with scikit-learn."""

    def __init__(self, vectors: np.ndarray) -> None:
        unit = _unit(vectors)
        self.width = unit.shape[1]
        self._search: Any
        if find_spec("faiss"):
            import faiss

            self._search = faiss.IndexFlatIP(unit.shape[1])
            self._search.add(unit)
        else:
            from sklearn.neighbors import NearestNeighbors

            self._search = NearestNeighbors(algorithm="brute", metric="cosine").fit(unit)

    def of(self, vector: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Cosines and rows of the k nearest to a vector `[D]`, the nearest first."""
        query = _unit(vector[None])
        if hasattr(self._search, "search"):
            cosines, rows = self._search.search(query, k)
            return cosines[0], rows[0]
        distances, rows = self._search.kneighbors(query, n_neighbors=k)
        return 1 - distances[0], rows[0]


def _unit(vectors: np.ndarray) -> np.ndarray:
    values = np.asarray(vectors, np.float32)
    return np.ascontiguousarray(values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-30))
