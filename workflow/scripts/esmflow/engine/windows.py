"""Embed sequences longer than a model's window piece by piece, without losing a residue.

The scheme: a sequence is cut into the pieces of `LongSequences.pieces`. Each piece is embedded as a sequence of its
own, with its own cls and eos. A residue's vector is the mean of its vectors in all pieces that hold it; `mean` is the
mean of these over the whole sequence, so that every residue counts once; `bos` is the mean of the pieces'.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from esmflow.arrays import Array, Outputs


def piece_outputs(outputs: Outputs) -> Outputs:
    """What must be computed of each piece, to make `outputs` of the whole."""
    include = ("bos", "per_residue") if "bos" in outputs.include else ("per_residue",)
    return Outputs(outputs.layers, include, outputs.per_residue)


def join_pieces(
    outputs: Outputs, residues: int, starts: Sequence[int], pieces: Sequence[Mapping[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """The arrays of a whole sequence from those of its pieces, given in the order of `starts`.

    pieces: `per_residue_layer{n}` `[w, D]` and, if asked for, `bos_layer{n}` `[1, D]`. Returns arrays as an engine does
    for a batch of one: `mean` and `bos` `[1, D]`, `per_residue` `[residues, D]`, in the pieces' types.
    """
    joined: dict[str, np.ndarray] = {}
    for layer in outputs.layers:
        rows = [piece[Array("per_residue", layer).name] for piece in pieces]
        # fp64, so that the order of the pieces does not matter to the last bit kept.
        total = np.zeros((residues, rows[0].shape[1]), np.float64)
        times = np.zeros((residues, 1), np.float64)
        for start, values in zip(starts, rows, strict=True):
            total[start : start + len(values)] += values
            times[start : start + len(values)] += 1
        by_residue = total / times
        for array in outputs.of_layer(layer):
            if array.kind == "per_residue":
                joined[array.name] = by_residue.astype(rows[0].dtype)
            elif array.kind == "mean":
                joined[array.name] = by_residue.mean(axis=0, keepdims=True).astype(np.float32)
            else:
                at_bos = np.stack([piece[array.name] for piece in pieces])
                joined[array.name] = at_bos.mean(axis=0, dtype=np.float64).astype(np.float32)
    return joined
