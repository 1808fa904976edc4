"""Sequences to embeddings through any engine, whatever a sequence or a card may do: running out of memory and
non-finite results are dealt with here, so that every sequence ends as a row or as a failure."""

from __future__ import annotations

import gc
import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from esmflow.engine import Engine, row_offsets, rows_per_sequence
from esmflow.failures import Failure, Reason
from esmflow.fasta import DIGEST_BYTES
from esmflow.segments import Segment

log = logging.getLogger(__name__)

# Batches in flight: while the device works on one, the next is launched and the one before is copied back.
_IN_FLIGHT = 2


@dataclass
class Extraction:
    """What came of a set of sequences: a segment that holds those embedded and a failure for each of the others."""

    segment: Segment
    token_budget: int
    """The budget at the end: lower than at the start if memory ran out."""


@dataclass
class _Progress:
    """Results so far, batch by batch."""

    rows: list[int] = field(default_factory=list)
    arrays: dict[str, list[np.ndarray]] = field(default_factory=dict)
    failures: dict[int, Failure] = field(default_factory=dict)


def extract_esm_features(
    sequences: Sequence[tuple[bytes, str]],
    engine: Engine,
    toks_per_batch: int,
    *,
    max_residues: int | None = None,
    on_progress: Callable[[int], None] = lambda residues: None,
) -> Extraction:
    """Embeds unique sequences, given as digest and residues.

    toks_per_batch: tokens in one batch. When a batch does not fit into memory the budget is halved and the batch is cut
    anew, down to single sequences; one that does not fit alone is a failure. A sequence with a NaN or an infinity in
    any of its arrays is tried again in fp32, and is a failure if that does not mend it.
    max_residues: longer sequences are truncated to their first residues; None embeds them whole.
    on_progress: told the residues of each batch as it is done.
    Errors that are not about one sequence (a CUDA fault, a damaged checkpoint) are raised.
    """
    residues = [sequence[:max_residues] for _, sequence in sequences]
    digests = [digest for digest, _ in sequences]
    lengths = [len(r) for r in residues]
    progress = _Progress()
    budget = toks_per_batch
    waiting = deque(engine.batches(lengths, budget))
    in_flight: deque[tuple[list[int], object]] = deque()

    def out_of_memory(batch: list[int], error: str) -> None:
        nonlocal budget
        cut_with = budget
        # What is in flight holds memory too: let it finish before anything is tried again.
        while in_flight:
            finish(*in_flight.popleft())
        release_memory()
        if len(batch) == 1:
            detail = f"{lengths[batch[0]]} residues do not fit into memory alone: {error}"
            progress.failures[batch[0]] = Failure(digests[batch[0]].hex(), Reason.OUT_OF_MEMORY, detail)
            on_progress(lengths[batch[0]])
            return
        # Another batch that was in flight may have halved it already.
        if budget == cut_with:
            budget = max(budget // 2, 1)
        log.warning("out of memory with %d sequences in a batch; budget is now %d tokens", len(batch), budget)
        again = [index for later in (batch, *waiting) for index in later]
        waiting.clear()
        waiting.extend([again[i] for i in cut] for cut in engine.batches([lengths[i] for i in again], budget))

    def finish(batch: list[int], launched: object) -> None:
        arrays = _unless_out_of_memory(lambda: engine.fetch(launched))
        if isinstance(arrays, str):
            out_of_memory(batch, arrays)
            return
        _accept(progress, batch, arrays, engine, residues, digests)
        on_progress(sum(lengths[i] for i in batch))

    while waiting or in_flight:
        if waiting and len(in_flight) < _IN_FLIGHT:
            batch = waiting.popleft()
            launched = _unless_out_of_memory(lambda: engine.launch(engine.prepare([residues[i] for i in batch])))  # noqa: B023 - called at once
            if isinstance(launched, str):
                out_of_memory(batch, launched)
            else:
                in_flight.append((batch, launched))
        else:
            finish(*in_flight.popleft())
    return Extraction(_segment(progress, engine, digests, lengths), budget)


def _unless_out_of_memory(work: Callable[[], Any]) -> Any:
    """The result of `work`, or the message if memory ran out.

    A message instead of the exception, whose traceback would keep the tensors of the failed attempt alive.
    """
    try:
        return work()
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return str(error) or "out of memory"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out, on the device or on the host."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def release_memory() -> None:
    """Gives cached memory back to the device, so that what is tried next finds all of it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _accept(
    progress: _Progress,
    batch: list[int],
    arrays: dict[str, np.ndarray],
    engine: Engine,
    residues: Sequence[str],
    digests: Sequence[bytes],
) -> None:
    """Takes over a batch's rows; those with a NaN or an infinity are computed again in fp32, one by one."""
    lengths = [len(residues[i]) for i in batch]
    finite = np.ones(len(batch), bool)
    for name, array in arrays.items():
        finite &= _finite_sequences(name, array, lengths)
    if finite.all():
        _append(progress, batch, arrays)
        return
    _append(progress, [i for i, good in zip(batch, finite) if good], _select(arrays, finite, lengths))
    exact = engine.at_full_precision()
    for index in (i for i, good in zip(batch, finite) if not good):
        alone = _unless_out_of_memory(lambda: exact.fetch(exact.launch(exact.prepare([residues[index]]))))  # noqa: B023
        if isinstance(alone, str):
            detail = f"NaN or infinity in {engine.precision}, and no memory to embed it in fp32: {alone}"
            progress.failures[index] = Failure(digests[index].hex(), Reason.OUT_OF_MEMORY, detail)
        elif all(np.isfinite(array).all() for array in alone.values()):
            log.info("%s: non-finite in %s, embedded in fp32", digests[index].hex(), engine.precision)
            _append(progress, [index], alone)
        else:
            detail = f"NaN or infinity in {engine.precision} and in fp32"
            progress.failures[index] = Failure(digests[index].hex(), Reason.NON_FINITE, detail)


def _append(progress: _Progress, rows: list[int], arrays: dict[str, np.ndarray]) -> None:
    progress.rows.extend(rows)
    for name, array in arrays.items():
        progress.arrays.setdefault(name, []).append(array)


def _finite_sequences(name: str, array: np.ndarray, lengths: Sequence[int]) -> np.ndarray:
    """For each sequence of a batch, whether all of its values are finite."""
    rows = np.isfinite(array).reshape(len(array), -1).all(axis=1)
    return np.logical_and.reduceat(rows, row_offsets(name, np.array(lengths))[:-1])


def _select(arrays: dict[str, np.ndarray], keep: np.ndarray, lengths: Sequence[int]) -> dict[str, np.ndarray]:
    counts = {name: rows_per_sequence(name, np.array(lengths)) for name in arrays}
    return {name: array[np.repeat(keep, counts[name])] for name, array in arrays.items()}


def _segment(progress: _Progress, engine: Engine, digests: Sequence[bytes], lengths: Sequence[int]) -> Segment:
    """The embedded sequences, in the order in which they were computed."""
    rows = progress.rows
    return Segment(
        digests=np.frombuffer(b"".join(digests[i] for i in rows), np.uint8).reshape(len(rows), DIGEST_BYTES),
        lengths=np.array([lengths[i] for i in rows], np.int64),
        arrays={name: np.concatenate(parts) for name, parts in progress.arrays.items()} if rows else {},
        precision=engine.precision,
        failures=tuple(progress.failures[i] for i in sorted(progress.failures)),
    )
