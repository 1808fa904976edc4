"""Sequences to embeddings through any engine, whatever a sequence or a card may do: running out of memory and
non-finite results are dealt with here, so that every sequence ends as a row or as a failure."""

from __future__ import annotations

import itertools
import logging
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from esmflow.arrays import Array
from esmflow.engine.engine import Engine
from esmflow.engine.memory import release_memory, unless_out_of_memory
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

    def by_number(self, residues: Sequence[str]) -> dict[int, dict[str, np.ndarray]]:
        """The rows of each string, array by array."""
        lengths = np.array([len(residues[number]) for number in self.rows], np.int64)
        found: dict[int, dict[str, np.ndarray]] = {number: {} for number in self.rows}
        for name, parts in self.arrays.items():
            for number, rows in zip(
                self.rows, np.split(np.concatenate(parts), Array.named(name).offsets(lengths)[1:-1])
            ):
                found[number][name] = rows
        return found


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
    at_once = sorted(set(range(len(residues))) - set(windowed))
    run = _Run(residues, at_once, engine, toks_per_batch, on_progress)
    run.complete()
    if windowed:
        run.embed_in_windows(windowed, long)
    failures = [Failure(digests[i].hex(), *failure) for i, failure in sorted(run.results.failures.items())]
    return Extraction(_segment(run.results, engine.precision, digests, residues, failures), run.budget)


class _Run:
    """Residue strings on their way through an engine, batch by batch. A string is known by its number in `residues`.

    results: what came of them. budget: tokens in a batch, halved whenever memory runs out.
    """

    def __init__(
        self,
        residues: Sequence[str],
        numbers: Sequence[int],
        engine: Engine,
        budget: int,
        on_progress: Callable[[int], None],
    ) -> None:
        self.results = _Results()
        self.budget = budget
        self._residues = residues
        self._engine = engine
        self._on_progress = on_progress
        self._waiting: deque[list[int]] = deque()
        self._prepared: deque[tuple[list[int], Future]] = deque()
        self._in_flight: deque[tuple[list[int], Any]] = deque()
        self._non_finite: list[int] = []
        self._wait(numbers)

    def complete(self) -> None:
        """Embeds every string or finds out why it cannot be embedded."""
        with ThreadPoolExecutor(1, thread_name_prefix="prepare") as preparing:
            while self._waiting or self._prepared or self._in_flight:
                while self._waiting and len(self._prepared) < _PREPARED_AHEAD:
                    batch = self._waiting.popleft()
                    tokens = preparing.submit(self._engine.prepare, [self._residues[i] for i in batch])
                    self._prepared.append((batch, tokens))
                launches = self._prepared and len(self._in_flight) < _IN_FLIGHT
                too_large = self._launch() if launches else self._fetch()
                if too_large:
                    self._make_room(too_large)
        if self._non_finite:
            self._embed_in_fp32()

    def embed_in_windows(self, numbers: Sequence[int], long: LongSequences) -> None:
        """Embeds long strings in overlapping windows, and puts the windows together again."""
        windows = [(number, long.pieces(len(self._residues[number]))) for number in numbers]
        pieces = [self._residues[number][begin:end] for number, cuts in windows for begin, end in cuts]
        engine = self._engine.with_outputs(piece_outputs(self._engine.outputs))
        # Residues of a string count when all of its windows are done; until then 0 is a sign of life.
        run = _Run(pieces, range(len(pieces)), engine, self.budget, lambda residues: self._on_progress(0))
        run.complete()
        self.budget = run.budget
        found, failures = run.results.by_number(pieces), run.results.failures
        numbered = iter(range(len(pieces)))
        for number, cuts in windows:
            residues, own = len(self._residues[number]), list(itertools.islice(numbered, len(cuts)))
            failed = [piece for piece in own if piece in failures]
            if failed:
                self.results.failures[number] = failures[failed[0]]
            else:
                begins = [begin for begin, _ in cuts]
                arrays = join_pieces(self._engine.outputs, residues, begins, [found[piece] for piece in own])
                self.results.append([number], arrays)
            self._on_progress(residues)

    def _wait(self, numbers: Sequence[int]) -> None:
        """Cuts strings into batches of the present budget."""
        cuts = self._engine.batches([len(self._residues[i]) for i in numbers], self.budget)
        self._waiting.extend([numbers[i] for i in cut] for cut in cuts)

    def _launch(self) -> list[int] | None:
        """Queues the next prepared batch on the device. Returns it if memory ran out."""
        batch, tokens = self._prepared.popleft()
        launched = unless_out_of_memory(lambda: self._engine.launch(tokens.result()))
        if isinstance(launched, str):
            return batch
        self._in_flight.append((batch, launched))
        return None

    def _fetch(self) -> list[int] | None:
        """Takes over the oldest batch in flight. Returns it if memory ran out."""
        batch, launched = self._in_flight.popleft()
        arrays = unless_out_of_memory(lambda: self._engine.fetch(launched))
        if isinstance(arrays, str):
            return batch
        self._accept(batch, arrays)
        return None

    def _make_room(self, batch: list[int]) -> None:
        """Deals with a batch for which memory ran out: cut anew with half the budget, or tried alone if it is one."""
        too_large = [batch]
        # What is in flight has its share of memory: let it finish before anything is tried again.
        while self._in_flight:
            if another := self._fetch():
                too_large.append(another)
        release_memory()
        for number in (batch[0] for batch in too_large if len(batch) == 1):
            self._try_alone(number)
        again = [number for batch in too_large if len(batch) > 1 for number in batch]
        if again:
            self.budget = max(self.budget // 2, 1)
            log.warning("out of memory with %d sequences in a batch; budget is now %d tokens", len(again), self.budget)
            again += [number for batch in (*(b for b, _ in self._prepared), *self._waiting) for number in batch]
            self._prepared.clear()
            self._waiting.clear()
            self._wait(again)

    def _try_alone(self, number: int) -> None:
        """Embeds one string with nothing else under way; it has failed if there is no memory even so."""
        arrays = _embed_alone(self._engine, self._residues[number])
        if isinstance(arrays, str):
            release_memory()
            size = len(self._residues[number])
            self._fail(number, Reason.OUT_OF_MEMORY, f"{size} residues do not fit into memory alone: {arrays}")
            self._on_progress(size)
        else:
            self._accept([number], arrays)

    def _fail(self, number: int, reason: Reason, detail: str) -> None:
        self.results.failures[number] = (reason, detail)

    def _accept(self, batch: list[int], arrays: dict[str, np.ndarray]) -> None:
        """Takes over a batch's rows; strings with a NaN or an infinity are put aside, to be embedded in fp32."""
        lengths = np.array([len(self._residues[i]) for i in batch], np.int64)
        finite = np.ones(len(batch), bool)
        for name, array in arrays.items():
            finite &= _finite_sequences(name, array, lengths)
        if not finite.all():
            arrays = _select(arrays, finite, lengths)
        self.results.append([i for i, good in zip(batch, finite) if good], arrays)
        self._non_finite += [i for i, good in zip(batch, finite) if not good]
        self._on_progress(int(lengths.sum()))

    def _embed_in_fp32(self) -> None:
        """Embeds one by one what was not finite, when nothing else is on the device: fp32 weights take much memory."""
        precision = self._engine.precision

        def embed() -> dict[int, dict[str, np.ndarray] | str]:
            found = {}
            with self._engine.at_full_precision() as exact:
                for number in self._non_finite:
                    # The residues were counted before: 0 is a sign of life.
                    self._on_progress(0)
                    found[number] = _embed_alone(exact, self._residues[number])
            return found

        found = unless_out_of_memory(embed)
        for number in self._non_finite:
            alone = found if isinstance(found, str) else found[number]
            if isinstance(alone, str):
                detail = f"NaN or infinity in {precision}, and no memory to embed it in fp32: {alone}"
                self._fail(number, Reason.OUT_OF_MEMORY, detail)
            elif all(np.isfinite(array).all() for array in alone.values()):
                log.info(
                    "%d residues gave NaN or infinity in %s; embedded in fp32", len(self._residues[number]), precision
                )
                self.results.append([number], alone)
            else:
                self._fail(number, Reason.NON_FINITE, f"NaN or infinity in {precision} and in fp32")


def _embed_alone(engine: Engine, residues: str) -> dict[str, np.ndarray] | str:
    """One string's arrays, or the message if there is no memory for it."""
    return unless_out_of_memory(lambda: engine.fetch(engine.launch(engine.prepare([residues]))))


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
