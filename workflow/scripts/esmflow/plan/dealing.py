"""Deal unique sequences to shard groups of equal cost, a window of them at a time, and write each group's shards."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from esmflow.inputs.residues import DIGEST_BYTES
from esmflow.plan.cost import Workload
from esmflow.plan.run_plan import GroupPlan
from esmflow.plan.shards import EMBEDDED, add_to_shard, list_shards
from esmflow.plan.spot_check import Candidates
from esmflow.store.digests import DigestIndex, first_of_each, halves
from esmflow.store.lookup import StoredSequences
from esmflow.threads import Background

# A window of which less than this is left without repeats waits and is dealt together with the next one.
_FULL = 7 / 8


@dataclass(frozen=True)
class _Window:
    """Sequences that wait to be dealt.

    digests: uint8 `[N, 16]`. residues: their letters end to end. lengths: int64 `[N]`. groups: int32 `[N]`, -1 where
    the cost is to decide.
    """

    digests: np.ndarray
    residues: bytearray | pa.Buffer
    lengths: np.ndarray
    groups: np.ndarray

    def __len__(self) -> int:
        return len(self.lengths)

    def sequences(self) -> pa.LargeBinaryArray:
        """The sequences: a view, not a copy."""
        offsets = np.concatenate(([0], np.cumsum(self.lengths)))
        buffers = [None, pa.py_buffer(offsets), pa.py_buffer(self.residues)]
        return pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(self), buffers)

    def keep(self, rows: np.ndarray) -> _Window:
        """Some of the sequences, given by their row numbers."""
        residues = self.sequences().take(pa.array(rows)).buffers()[2] or pa.py_buffer(b"")
        return _Window(self.digests[rows], residues, self.lengths[rows], self.groups[rows])

    def followed_by(self, other: _Window) -> _Window:
        """The sequences of both."""
        return _Window(
            np.concatenate((self.digests, other.digests)),
            bytearray().join((self.residues, other.residues)),
            np.concatenate((self.lengths, other.lengths)),
            np.concatenate((self.groups, other.groups)),
        )


class Dealer:
    """Takes sequences, leaves out those that came before or that the store has, and deals the others to groups.

    Each group gets `least_cost` at least, unless it is the only one: with little to do, the last ones stay empty.
    A group's share of a window is cut into `fewest_shards` at least, smaller than `shard_residues` if need be. Shards
    that it does not fill are gone on with in the next window: with thousands of groups a share is small.
    stored: what the store has. to_embed: what is dealt is added to it. called: what the shards are called.
    Sequences wait until `window_residues` have come; memory grows with that, and by 16 bytes for each different
    sequence. Windows are dealt in one thread and shards written in another, while the next window fills. Use it in a
    `with` block, whose end deals what is left; only then are the counts complete.
    """

    def __init__(
        self,
        folders: Sequence[Path],
        cost: Callable[[np.ndarray], np.ndarray],
        *,
        least_cost: float = 0.0,
        shard_residues: int,
        fewest_shards: int = 1,
        window_residues: int,
        stored: StoredSequences | None,
        to_embed: Workload,
        called: str = EMBEDDED,
    ) -> None:
        self.groups = [GroupPlan() for _ in folders]
        # How many of a group's last shards have room, and the residues in them.
        self._filling = [(0, 0)] * len(folders)
        self.duplicates = 0
        self.stored = 0
        self.stored_segments: set[str] = set()
        # Of what is dealt: among all candidates there might be none of a few new sequences.
        self.candidates = Candidates()
        self._folders = folders
        self._cost = cost
        self._least_cost = least_cost
        self._shard_residues = shard_residues
        self._fewest_shards = fewest_shards
        self._window_residues = window_residues
        self._to_embed = to_embed
        self._stored = stored
        self._called = called
        self._seen = DigestIndex()
        self._dealing = Background()
        self._writing = Background()
        # Sequences that are known to be new, and are too few to be dealt.
        self._left: _Window | None = None
        self._start_window()
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
            for left_over in list_shards(folder, called):
                left_over.unlink()

    def __enter__(self) -> Dealer:
        return self

    def __exit__(self, *error: Any) -> None:
        with self._writing, self._dealing:
            if error[0] is None:
                self._dealing.run(self._settle, self._end_window(), True)

    def take(self, digests: np.ndarray, residues: bytes, lengths: np.ndarray, group: int | None) -> None:
        """Adds sequences that lie end to end, with their digests, uint8 `[N, 16]`; `group` if that is fixed."""
        ends = np.cumsum(lengths)
        start, taken = 0, 0
        while start < len(lengths):
            room = self._window_residues - len(self._residues)
            end = int(np.searchsorted(ends, taken + room)) + 1
            upto = int(ends[min(end, len(ends)) - 1])
            self._residues += residues[taken:upto]
            self._digests.append(digests[start:end])
            self._lengths.append(lengths[start:end])
            self._fixed.append(np.full(len(lengths[start:end]), -1 if group is None else group, np.int32))
            start, taken = end, upto
            if len(self._residues) >= self._window_residues:
                self._dealing.run(self._settle, self._end_window())

    def _start_window(self) -> None:
        self._residues = bytearray()
        self._digests = [np.empty((0, DIGEST_BYTES), np.uint8)]
        self._lengths = [np.empty(0, np.int64)]
        self._fixed = [np.empty(0, np.int32)]

    def _end_window(self) -> _Window:
        """What has been taken since the last window; the next one begins."""
        window = _Window(
            np.concatenate(self._digests), self._residues, np.concatenate(self._lengths), np.concatenate(self._fixed)
        )
        self._start_window()
        return window

    def _settle(self, window: _Window, last: bool = False) -> None:
        """Leaves repeats and what is stored out of a window, then deals it, or lets it wait if little is left of it."""
        first = first_of_each(window.digests)
        first = first[self._seen.find(window.digests[first]) < 0]
        self._seen = self._seen.merged(DigestIndex(*halves(window.digests[first])))
        self.duplicates += len(window) - len(first)
        segments = np.full(len(first), -1, np.int32)
        if self._stored is not None:
            segments = self._stored.find(window.digests[first])
            self.stored_segments.update(self._stored.names[n] for n in np.unique(segments[segments >= 0]))
        self.stored += int((segments >= 0).sum())
        rows = first[segments < 0]
        if self._left is not None:
            window = self._left.followed_by(window.keep(rows))
            rows = np.arange(len(window))
        if last or window.lengths[rows].sum() >= _FULL * self._window_residues:
            self._left = None
            self._deal(window, rows)
        else:
            self._left = window.keep(rows)

    def _deal(self, window: _Window, rows: np.ndarray) -> None:
        """Deals these sequences of a window, dearest first, each to the group with the least cost so far."""
        # The digest settles ties, so a plan does not depend on the order of the input.
        order = rows[first_of_each(window.digests[rows])]
        order = order[np.argsort(-window.lengths[order], kind="stable")]
        self._to_embed.add(window.lengths[order])
        self.candidates.offer_block(window.digests, window.residues, window.lengths, order)
        costs, embedded = self._cost(window.lengths[order]), self._to_embed.embedded(window.lengths[order])
        groups = window.groups[order]
        if np.any(groups < 0):
            groups = self._least_loaded(costs)
        # Sorted once: a look through all sequences for each of thousands of groups would take far longer.
        of_group = np.split(
            np.argsort(groups, kind="stable"), np.cumsum(np.bincount(groups, minlength=len(self.groups)))
        )
        shards: list[tuple[Path, np.ndarray]] = []
        for number, mine in enumerate(of_group[:-1]):
            if len(mine):
                group = self.groups[number]
                group.sequences += len(mine)
                group.residues += int(embedded[mine].sum())
                group.cost += float(costs[mine].sum())
                shards += self._cut(number, order[mine], int(window.lengths[order[mine]].sum()))
        self._writing.run(_write_shards, window, shards)

    def _cut(self, number: int, share: np.ndarray, residues: int) -> list[tuple[Path, np.ndarray]]:
        """Cuts a group's share of a window into shards, each of which sees the same mix of lengths."""
        group = self.groups[number]
        count, filled = self._filling[number]
        if filled + residues > count * self._shard_residues:
            count, filled = max(-(-residues // self._shard_residues), self._fewest_shards), 0
            count = min(count, len(share))
            group.shards += count
        self._filling[number] = (count, filled + residues)
        first = group.shards - count
        paths = [self._folders[number] / f"{self._called}-{first + i:05d}.fasta" for i in range(min(count, len(share)))]
        return [(path, share[i::count]) for i, path in enumerate(paths)]

    def _least_loaded(self, costs: np.ndarray) -> np.ndarray:
        """The group of each sequence, given by its cost, when each goes to the group with the least cost so far."""
        loads = [(group.cost, number) for number, group in enumerate(self.groups)]
        if self._least_cost:
            everything = sum(group.cost for group in self.groups) + float(costs.sum())
            loads = loads[: max(1, int(everything / self._least_cost))]
        heapq.heapify(loads)
        groups = []
        for cost in costs.tolist():
            load, number = loads[0]
            heapq.heapreplace(loads, (load + cost, number))
            groups.append(number)
        return np.array(groups, np.int32)


def _write_shards(window: _Window, shards: Sequence[tuple[Path, np.ndarray]]) -> None:
    sequences = window.sequences()
    for path, rows in shards:
        add_to_shard(path, window.digests[rows], sequences.take(pa.array(rows)))
