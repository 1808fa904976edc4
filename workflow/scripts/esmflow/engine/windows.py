"""Embed sequences longer than a model's window piece by piece, without losing a residue.

The scheme: a sequence is cut into the pieces of `LongSequences.pieces`. Each piece is embedded as a sequence of its
own, with its own cls and eos. What a residue has is the mean of what it has in all pieces that hold it: its vector, its
entropy, its log-likelihood. `mean`, `max`, `std` and `pseudo_perplexity` are made of these over the whole sequence, as
they are of one that is not cut, so that every residue counts once; `bos` is the mean of the pieces'.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from esmflow.arrays import LOG_LIKELIHOOD, POOLED, Outputs

_MADE_OF = {**dict.fromkeys(POOLED, "per_residue"), "bos": "bos", "pseudo_perplexity": LOG_LIKELIHOOD}
"""Of each kind that pools, what it is made of."""


def piece_outputs(outputs: Outputs) -> Outputs:
    """What must be computed of each piece, to make `outputs` of the whole."""
    include = dict.fromkeys(_MADE_OF.get(kind, kind) for kind in outputs.include)
    return Outputs(outputs.layers, tuple(include), outputs.per_residue)


def join_pieces(
    outputs: Outputs, residues: int, starts: Sequence[int], pieces: Sequence[Mapping[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """The arrays of a whole sequence from those of its pieces, given in the order of `starts`.

    pieces: the arrays of `piece_outputs` of each, rows `[w, …]`, `bos` `[1, D]`. Returns arrays as an engine does for a
    batch of one.
    """
    joined: dict[str, np.ndarray] = {}
    for part in piece_outputs(outputs).arrays():
        of_pieces = [piece[part.name] for piece in pieces]
        # fp64, so that the order of the pieces does not matter to the last bit kept.
        if part.is_pooled:
            joined[part.name] = np.stack(of_pieces).mean(axis=0, dtype=np.float64).astype(np.float32)
            continue
        by_residue = _by_residue(residues, starts, of_pieces)
        for array in outputs.arrays():
            if (_MADE_OF.get(array.kind, array.kind), array.layer) == (part.kind, part.layer):
                dtype = of_pieces[0].dtype if array == part else np.float32
                joined[array.name] = (by_residue if array == part else _pooled(array.kind, by_residue)).astype(dtype)
    return {name: joined[name] for name in outputs.names()}


def _by_residue(residues: int, starts: Sequence[int], of_pieces: Sequence[np.ndarray]) -> np.ndarray:
    """The mean of each residue's rows in all pieces that hold it, fp64."""
    total = np.zeros((residues, *of_pieces[0].shape[1:]), np.float64)
    times = np.zeros(residues, np.float64)
    for start, values in zip(starts, of_pieces, strict=True):
        total[start : start + len(values)] += values
        times[start : start + len(values)] += 1
    return (total.T / times).T


def _pooled(kind: str, by_residue: np.ndarray) -> np.ndarray:
    """`[1, …]` of `[residues, …]`."""
    if kind == "pseudo_perplexity":
        return np.exp(-by_residue.mean(keepdims=True))
    return getattr(by_residue, kind)(axis=0, keepdims=True)
