"""How well a stored embedding agrees with the one that was computed again, and how well it must."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

UNLIKE = 1e9
"""The relative error of what cannot be compared: an array of another shape, or with a NaN or infinity in it."""


@dataclass(frozen=True)
class Agreement:
    """One output of one sequence, found and expected, as vectors.

    relative_error: |found - expected| / |expected|. scale: by what `expected` must be multiplied to come nearest to
    `found`. nearer_to: the mistake, if any, whose result is nearer to `found` than `expected` is; share: how much of
    the distance it leaves.
    """

    cosine: float
    relative_error: float
    scale: float
    nearer_to: str | None = None
    share: float = 1.0


@dataclass(frozen=True)
class Limits:
    """How well embeddings must agree. scale: how far the median scale of an output may be from 1."""

    min_cosine: float
    max_relative_error: float
    scale: float

    def allow(self, agreement: Agreement) -> bool:
        """Whether one output of one sequence is near enough."""
        return agreement.cosine >= self.min_cosine and agreement.relative_error <= self.max_relative_error


MEDIAN_SHARE = 0.2
"""The median of the relative errors must be below this share of what a single one may be."""

LIMITS = {
    "fp32": Limits(0.99999, 0.002, 0.0002),
    "fp16": Limits(0.999, 0.03, 0.002),
    "bf16": Limits(0.99, 0.15, 0.01),
    "int8": Limits(0.98, 0.2, 0.01),
}
"""By the precision of the embedding. The worst of 500 proteins with the 8M model, pooled: cosines of 0.99998 in fp16,
0.9998 in bf16, 0.997 in int8; relative errors of 0.006, 0.02 and 0.08. The median error is 0.002, 0.004 and 0.014 (per
residue: 0.003, 0.01 and 0.026), the median scale within 0.0003 of 1."""


def compare(
    found: np.ndarray, right: np.ndarray, mistakes: Mapping[str, np.ndarray], negligible: float = 0.0
) -> Agreement:
    """Holds an embedding against the right one and against what each mistake would give; arrays of one shape each.

    Where the right one's norm is at most `negligible`, as rounding's is, one that is no farther from it is alike.
    """
    expected, vector = _flat(right), _flat(found)
    if vector.shape != expected.shape or not np.isfinite(vector).all():
        return Agreement(0.0, UNLIKE, 0.0)
    norm = float(np.linalg.norm(expected))
    if norm <= negligible:
        near = np.linalg.norm(vector - expected) <= negligible
        return Agreement(1.0, 0.0, 1.0) if near else Agreement(0.0, UNLIKE, 0.0)
    product = float(vector @ expected)
    distance = float(np.linalg.norm(vector - expected))
    length = float(np.linalg.norm(vector))
    beside = {name: float(np.linalg.norm(vector - _flat(values))) for name, values in mistakes.items()}
    nearest = min(beside, key=beside.__getitem__, default=None)
    if nearest is not None and beside[nearest] >= distance:
        nearest = None
    return Agreement(
        cosine=product / (norm * length) if length else 0.0,
        relative_error=distance / norm,
        scale=product / norm**2,
        nearer_to=nearest,
        share=1.0 if nearest is None else beside[nearest] / distance,
    )


def common_fault(agreements: Sequence[Agreement], limits: Limits) -> str | None:
    """What is wrong with one output of all sequences together, in words: too small to see in one, but not in most.

    Rounding points in any direction: it rarely brings a vector nearer to a mistake, and hardly changes its scale.
    """
    if not agreements:
        return None
    nearer = [agreement for agreement in agreements if agreement.nearer_to is not None]
    names = [agreement.nearer_to for agreement in nearer]
    mistake = None
    if 2 * len(nearer) > len(agreements):
        commonest = max(sorted(set(names), key=str), key=names.count)
        mistake = f"{len(nearer)} of {len(agreements)} vectors are nearer to {commonest} than to what is right"
        if median(agreement.share for agreement in nearer) < 0.5:
            return mistake
    scale = median(agreement.scale for agreement in agreements)
    if abs(scale - 1) > limits.scale:
        # What a scale does not explain is what makes the cosine less than 1.
        rest = median(max(0.0, 1 - a.cosine**2) ** 0.5 / max(a.relative_error, 1e-12) for a in agreements)
        if rest < 0.5 or mistake is None:
            return f"vectors are {scale:.4f} times as long as they should be (median)"
    error, allowed = median(a.relative_error for a in agreements), limits.max_relative_error * MEDIAN_SHARE
    if mistake is None and error > allowed:
        return f"the median relative error is {error:.1e}; {allowed:.1e} is what this precision may give"
    return mistake


def _flat(values: np.ndarray) -> np.ndarray:
    return np.asarray(values, np.float64).ravel()
