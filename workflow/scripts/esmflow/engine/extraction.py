"""Sequences to embeddings through any engine, whatever a sequence or a card may do: running out of memory and
non-finite results are dealt with here, so that every sequence ends as a row or as a failure."""

from __future__ import annotations

import gc
import logging
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from esmflow.arrays import Array
from esmflow.engine.engine import Engine
from esmflow.engine.windows import join_pieces, piece_outputs
from esmflow.failures import Failure, Reason
from esmflow.inputs.residues import DIGEST_BYTES
from esmflow.method import EMBED_WHOLE, LongSequences
from esmflow.store.segments import Segment

log = logging.getLogger(__name__)

# While the device works on one batch the next is queued behind it and the one before is copied back.
_IN_FLIGHT = 2
# Batches whose tokens a second thread makes ready meanwhile.
_PREPARED_AHEAD = 2


@dataclass
class Extraction:
    """What came of a set of sequences: a segment that holds those embedded and a failure for each of the others."""

    segment: Segment
    token_budget: int
    """The budget at the end: lower than at the start if memory ran out."""


@dataclass
class _Results:
    """Results batch by batch, for residue strings known by their number. `failures` has a reason and a detail."""

    rows: list[int] = field(default_factory=list)
    arrays: dict[str, list[np.ndarray]] = field(default_factory=dict)
    failures: dict[int, tuple[Reason, str]] = field(default_factory=dict)

    def append(self, rows: Sequence[int], arrays: dict[str, np.ndarray]) -> None:
        self.rows.extend(rows)
        for name, array in arrays.items():
            self.arrays.setdefault(name, []).append(array)


def extract_esm_features(
    sequences: Sequence[tuple[bytes, str]],
    engine: Engine,
    toks_per_batch: int,
    *,
    long: LongSequences = EMBED_WHOLE,
    on_progress: Callable[[int], None] = lambda residues: None,
) -> Extraction:
    """Embeds unique sequences, given as digest and residues.

    toks_per_batch: tokens in one batch. When a batch does not fit into memory the budget is halved and the batch is cut
    anew, down to single sequences; one that does not fit alone is a failure. A sequence with a NaN or an infinity in
    any of its arrays is tried again in fp32, and is a failure if that does not mend it.
    long: what is done with long sequences; windows are put together as `esmflow.engine.windows` says.
    on_progress: told the residues of each batch as it is done.
    Errors that are not about one sequence (a CUDA fault, a damaged checkpoint) are raised.
    """
    digests = [digest for digest, _ in sequences]
    residues = [sequence[: long.embedded(len(sequence))] for _, sequence in sequences]
    windowed = [i for i, sequence in enumerate(residues) if len(long.pieces(len(sequence))) > 1]
    results = _Results()
    budget = toks_per_batch
    apart = set(windowed)
    at_once = [i for i in range(len(residues)) if i not in apart]
    if at_once:
        found, budget = _run([residues[i] for i in at_once], engine, budget, on_progress)
        results.append([at_once[row] for row in found.rows], {n: np.concatenate(a) for n, a in found.arrays.items()})
        results.failures = {at_once[number]: failure for number, failure in found.failures.items()}
    if windowed:
        budget = _run_windows(results, residues, windowed, engine, budget, long, on_progress)
    failures = [Failure(digests[i].hex(), *results.failures[i]) for i in sorted(results.failures)]
    return Extraction(_segment(results, engine.precision, digests, residues, failures), budget)


def _run(
    residues: Sequence[str], engine: Engine, budget: int, on_progress: Callable[[int], None]
) -> tuple[_Results, int]:
    """Runs residue strings through an engine, batch by batch. Returns the results and the budget at the end."""
    results = _Results()
    lengths = [len(r) for r in residues]
    waiting = deque(engine.batches(lengths, budget))
    prepared: deque[tuple[list[int], Future]] = deque()
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
            results.failures[batch[0]] = (Reason.OUT_OF_MEMORY, detail)
            on_progress(lengths[batch[0]])
            return
        # Another batch that was in flight may have halved it already.
        if budget == cut_with:
            budget = max(budget // 2, 1)
        log.warning("out of memory with %d sequences in a batch; budget is now %d tokens", len(batch), budget)
        again = [index for later in (batch, *(b for b, _ in prepared), *waiting) for index in later]
        prepared.clear()
        waiting.clear()
        waiting.extend([again[i] for i in cut] for cut in engine.batches([lengths[i] for i in again], budget))

    def finish(batch: list[int], launched: object) -> None:
        arrays = _unless_out_of_memory(lambda: engine.fetch(launched))
        if isinstance(arrays, str):
            out_of_memory(batch, arrays)
            return
        _accept(results, batch, arrays, engine, residues)
        on_progress(sum(lengths[i] for i in batch))

    def launch(batch: list[int], tokens: Future) -> None:
        launched = _unless_out_of_memory(lambda: engine.launch(tokens.result()))
        if isinstance(launched, str):
            out_of_memory(batch, launched)
        else:
            in_flight.append((batch, launched))

    with ThreadPoolExecutor(1, thread_name_prefix="prepare") as preparing:
        while waiting or prepared or in_flight:
            while waiting and len(prepared) < _PREPARED_AHEAD:
                batch = waiting.popleft()
                prepared.append((batch, preparing.submit(engine.prepare, [residues[i] for i in batch])))
            if prepared and len(in_flight) < _IN_FLIGHT:
                launch(*prepared.popleft())
            elif in_flight:
                finish(*in_flight.popleft())
    return results, budget


def _run_windows(
    results: _Results,
    residues: Sequence[str],
    windowed: Iterable[int],
    engine: Engine,
    budget: int,
    long: LongSequences,
    on_progress: Callable[[int], None],
) -> int:
    """Embeds long sequences in overlapping windows and appends them to `results`. Returns the budget at the end."""
    windows = {i: long.pieces(len(residues[i])) for i in windowed}
    owners = [(i, start) for i, mine in windows.items() for start, _ in mine]
    pieces = [residues[i][start:end] for i, mine in windows.items() for start, end in mine]
    # Residues of a sequence count when all of its windows are done; until then 0 is a sign of life.
    found, budget = _run(
        pieces, engine.with_outputs(piece_outputs(engine.outputs)), budget, lambda residues: on_progress(0)
    )
    by_piece: dict[tuple[int, int], dict[str, np.ndarray]] = {}
    piece_lengths = np.array([len(pieces[number]) for number in found.rows], np.int64)
    for name, parts in found.arrays.items():
        array, offsets = np.concatenate(parts), Array.named(name).offsets(piece_lengths)
        for at, number in enumerate(found.rows):
            by_piece.setdefault(owners[number], {})[name] = array[offsets[at] : offsets[at + 1]]
    failed = {owners[number][0]: failure for number, failure in found.failures.items()}
    for i, mine in windows.items():
        if i in failed:
            results.failures[i] = failed[i]
        else:
            starts = [start for start, _ in mine]
            joined = join_pieces(engine.outputs, len(residues[i]), starts, [by_piece[i, start] for start in starts])
            results.append([i], joined)
        on_progress(len(residues[i]))
    return budget


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
    results: _Results, batch: list[int], arrays: dict[str, np.ndarray], engine: Engine, residues: Sequence[str]
) -> None:
    """Takes over a batch's rows; those with a NaN or an infinity are computed again in fp32, one by one."""
    lengths = np.array([len(residues[i]) for i in batch], np.int64)
    finite = np.ones(len(batch), bool)
    for name, array in arrays.items():
        finite &= _finite_sequences(name, array, lengths)
    if finite.all():
        results.append(batch, arrays)
        return
    results.append([i for i, good in zip(batch, finite) if good], _select(arrays, finite, lengths))
    for index in (i for i, good in zip(batch, finite) if not good):
        _retry_in_fp32(results, index, residues[index], engine)


def _retry_in_fp32(results: _Results, index: int, sequence: str, engine: Engine) -> None:
    def compute() -> dict[str, np.ndarray]:
        exact = engine.at_full_precision()
        return exact.fetch(exact.launch(exact.prepare([sequence])))

    alone = _unless_out_of_memory(compute)
    if isinstance(alone, str):
        detail = f"NaN or infinity in {engine.precision}, and no memory to embed it in fp32: {alone}"
        results.failures[index] = (Reason.OUT_OF_MEMORY, detail)
    elif all(np.isfinite(array).all() for array in alone.values()):
        log.info("%d residues gave NaN or infinity in %s; embedded in fp32", len(sequence), engine.precision)
        results.append([index], alone)
    else:
        results.failures[index] = (Reason.NON_FINITE, f"NaN or infinity in {engine.precision} and in fp32")


def _finite_sequences(name: str, array: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """For each sequence of a batch, whether all of its values are finite."""
    rows = np.isfinite(array).reshape(len(array), -1).all(axis=1)
    return np.logical_and.reduceat(rows, Array.named(name).offsets(lengths)[:-1])


def _select(arrays: dict[str, np.ndarray], keep: np.ndarray, lengths: np.ndarray) -> dict[str, np.ndarray]:
    return {name: array[np.repeat(keep, Array.named(name).rows(lengths))] for name, array in arrays.items()}


def _segment(
    results: _Results, precision: str, digests: Sequence[bytes], residues: Sequence[str], failures: Sequence[Failure]
) -> Segment:
    """The embedded sequences, in the order in which they were computed."""
    rows = results.rows
    return Segment(
        digests=np.frombuffer(b"".join(digests[i] for i in rows), np.uint8).reshape(len(rows), DIGEST_BYTES),
        lengths=np.array([len(residues[i]) for i in rows], np.int64),
        arrays={name: np.concatenate(parts) for name, parts in results.arrays.items()} if rows else {},
        precision=precision,
        failures=tuple(failures),
    )
