"""Lay sequences end to end in packs of token ids: what goes through the model at once, without padding in between."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch

from esmflow.inputs.residues import CLS, EOS, MASK, MASKED, PAD, RESIDUE_TOKEN

FRAME = 2
"""Tokens that every sequence has besides its residues: cls and eos."""

QUERY_BLOCK = 64
"""Tokens of a sequence whose attention one group of a GPU's threads computes together."""

_UNKNOWN = 255
# "<" and ">" stand for cls and eos while a pack is one string, so that one table turns the whole of it into tokens.
_TOKEN = np.full(256, _UNKNOWN, dtype=np.uint8)
_TOKEN[ord("<")], _TOKEN[ord(">")] = CLS, EOS
for _residue, _token in (*RESIDUE_TOKEN.items(), (MASKED, MASK)):
    _TOKEN[ord(_residue)] = _token


@dataclass(frozen=True)
class Pack:
    """Sequences end to end, [cls] residues [eos] each, and after them a tail that only rounds the size up.

    tokens: token ids, `[T]` int32.
    positions: place of every token in its own sequence, cls at 0, `[T]` int32.
    blocks: for every block of queries, its sequence's first token, its sequence's tokens, and its first token's
        position: `[blocks, 3]` int32.
    boundaries: first token of every sequence, and T, `[S + 1]` int32. The tail counts as sequences here.
    runs: first token of every run of cls, residues and eos, and the end of the last one, `[3 B + 1]` int64.
    residue_rows: which of the T tokens are residues, `[residues]` int64.
    lengths: tokens of every sequence and of the tail's pieces, summing to T.
    residues: residues of each of the B sequences.
    masks: which of the T tokens are masks, `[M]` int64; unmasked: the share of its sequence's tokens that are none, for
        each token, `[T]` fp32. Both None where nothing is masked.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    boundaries: torch.Tensor
    blocks: torch.Tensor
    runs: torch.Tensor
    residue_rows: torch.Tensor
    lengths: tuple[int, ...]
    residues: tuple[int, ...]
    masks: torch.Tensor | None = None
    unmasked: torch.Tensor | None = None

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(self.lengths)

    def _with_tensors(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Pack:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        changed: dict[str, Any] = {n: change(value) for n, value in values.items() if isinstance(value, torch.Tensor)}
        return replace(self, **changed)

    def pinned(self) -> Pack:
        """A copy in page-locked memory, from which a GPU reads without the host waiting."""
        return self._with_tensors(torch.Tensor.pin_memory)

    def to(self, device: torch.device) -> Pack:
        """A copy on `device`; asynchronous when this pack is pinned."""
        return self._with_tensors(lambda tensor: tensor.to(device, non_blocking=True))


def fill_packs(lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """Groups sequences, given by their residue counts, into packs of at most `token_budget` tokens.

    Longest first, so that packs hold sequences of like length and a pack that does not fit the device shows at once.
    Returns indices into `lengths`. A sequence longer than the budget is a pack of its own.
    """
    packs: list[list[int]] = []
    free = 0
    for index in np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable").tolist():
        tokens = lengths[index] + FRAME
        if not packs or tokens > free:
            packs.append([])
            free = token_budget
        packs[-1].append(index)
        free -= tokens
    return packs


def padded_size(tokens: int, quantum: int) -> int:
    """Rounds a pack's tokens up to one of few sizes, at most an eighth and at most `quantum / 16` more.

    Few sizes let the device's memory be reused from pack to pack. `quantum` is the token count that fills the device's
    multiprocessors evenly; 1 pads nothing.
    """
    step = _step(tokens, quantum)
    return -(-tokens // step) * step


def full_size(token_budget: int, quantum: int) -> int:
    """The largest size up to `token_budget` that `padded_size` leaves as it is."""
    step = _step(token_budget, quantum)
    return token_budget // step * step


def _step(tokens: int, quantum: int) -> int:
    power_of_two = 1 << (tokens - 1).bit_length()
    return max(1, min(quantum, power_of_two) // 16)


def pack_sequences(sequences: Sequence[str], quantum: int = 1) -> Pack:
    """Turns residue strings, in which `MASKED` stands for a mask, into one pack, in the order given.

    Raises ValueError for a character that is not in the models' alphabet.
    """
    residues = np.array([len(sequence) for sequence in sequences], dtype=np.int64)
    tokens = _tokens(sequences, residues)
    tail = padded_size(len(tokens), quantum) - len(tokens)
    lengths = (residues + FRAME).tolist()
    longest = max(lengths)
    # Attention costs the square of a sequence's length: the tail never is the longest.
    tail_lengths = [longest] * (tail // longest) + ([tail % longest] if tail % longest else [])
    every_length = np.array(lengths + tail_lengths, dtype=np.int64)
    starts = np.concatenate(([0], np.cumsum(every_length)))
    total = int(starts[-1])
    positions = np.arange(total) - np.repeat(starts[:-1], every_length)

    first = starts[: len(sequences)]
    runs = np.empty(3 * len(sequences) + 1, dtype=np.int64)
    runs[0:-1:3], runs[1::3], runs[2::3] = first, first + 1, first + 1 + residues
    runs[-1] = len(tokens)
    is_residue = np.ones(len(tokens), dtype=bool)
    is_residue[first] = False
    is_residue[first + 1 + residues] = False

    masks = np.flatnonzero(tokens == MASK)
    masked = np.zeros(len(every_length))
    np.add.at(masked, np.searchsorted(first, masks, "right") - 1, 1)

    return Pack(
        tokens=torch.from_numpy(np.concatenate((tokens, np.full(tail, PAD, dtype=np.int32)))),
        positions=torch.from_numpy(positions.astype(np.int32)),
        boundaries=torch.from_numpy(starts.astype(np.int32)),
        blocks=torch.from_numpy(_query_blocks(starts[:-1], every_length)),
        runs=torch.from_numpy(runs),
        residue_rows=torch.from_numpy(np.flatnonzero(is_residue)),
        lengths=tuple(lengths + tail_lengths),
        residues=tuple(residues.tolist()),
        masks=torch.from_numpy(masks) if len(masks) else None,
        unmasked=torch.from_numpy((1 - masked / every_length).repeat(every_length).astype(np.float32))
        if len(masks)
        else None,
    )


def _query_blocks(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """`[blocks, 3]` int32: see `Pack.blocks`."""
    counts = -(-lengths // QUERY_BLOCK)
    sequence = np.repeat(np.arange(len(lengths)), counts)
    first_of_sequence = np.repeat(np.cumsum(counts) - counts, counts)
    positions = (np.arange(len(sequence)) - first_of_sequence) * QUERY_BLOCK
    return np.stack((starts[sequence], lengths[sequence], positions), axis=1).astype(np.int32)


def _tokens(sequences: Sequence[str], residues: np.ndarray) -> np.ndarray:
    text = f"<{'><'.join(sequences)}>".encode("latin-1", "replace")
    tokens = _TOKEN[np.frombuffer(text, dtype=np.uint8)]
    framed = np.count_nonzero(tokens == CLS) == np.count_nonzero(tokens == EOS) == len(sequences)
    if not framed or (tokens == _UNKNOWN).any() or len(tokens) != residues.sum() + FRAME * len(sequences):
        strange = sorted({c for sequence in sequences for c in sequence if c not in RESIDUE_TOKEN})
        raise ValueError(f"not residues of ESM-2's alphabet: {', '.join(map(repr, strange))}")
    return tokens.astype(np.int32)
