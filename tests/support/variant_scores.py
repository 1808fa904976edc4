"""Scores of variants by fair-esm's own arithmetic, one substitution after the other."""

from __future__ import annotations

import numpy as np
import torch


@torch.no_grad()
def as_fair_esm_scores(model, sequence: str, variant: str, longest: int | None) -> tuple[float, float]:
    """Wild-type and masked marginal: the steps of fair-esm's `examples/variant-prediction/predict.py`.

    A window is that of `get_optimal_window` in the benchmark that its authors use for long proteins.
    """
    alphabet, scores = model.alphabet, np.zeros(2)
    for part in variant.split(":"):
        before, index, after = part[0], int(part[1:-1]) - 1, part[-1]
        begin, end = optimal_window(index, len(sequence), longest or len(sequence))
        _, _, tokens = alphabet.get_batch_converter()([("protein1", sequence[begin:end])])
        masked = tokens.clone()
        masked[0, index - begin + 1] = alphabet.mask_idx
        for number, given in enumerate((tokens, masked)):
            probabilities = torch.log_softmax(model(given)["logits"], dim=-1)[0, 1 + index - begin]
            scores[number] += (probabilities[alphabet.get_idx(after)] - probabilities[alphabet.get_idx(before)]).item()
    return tuple(scores)


def optimal_window(position: int, length: int, window: int) -> tuple[int, int]:
    half = window // 2
    if length <= window:
        return 0, length
    if position < half:
        return 0, window
    if position >= length - half:
        return length - window, length
    return max(0, position - half), min(length, position + half)


def some_variants(sequence: str, count: int, seed: int) -> list[str]:
    """Substitutions of one or two residues, those at both ends among them."""
    random = np.random.default_rng(seed)
    places = [1, len(sequence), *random.integers(2, len(sequence), count).tolist()]
    single = [f"{sequence[place - 1]}{place}{random.choice(list('ACDEFGHIKLMNPQRSTVWY'))}" for place in places]
    return [*single, *(":".join(pair) for pair in zip(single[::2], single[1::2]) if pair[0] != pair[1])]
