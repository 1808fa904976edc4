"""Find sequences in many segments by digest, and gather their vectors."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from esmflow.digests import DIGEST_BYTES
from esmflow.engine import is_pooled
from esmflow.segments import Segment, SegmentError, Store

_OPEN_SEGMENTS = 256


@dataclass(frozen=True)
class Location:
    """Where the embeddings of a block of records are: segment numbers and rows, -1 where there is none."""

    segments: np.ndarray
    rows: np.ndarray


class SegmentIndex:
    """Finds sequences in a set of segments by digest. Takes 28 bytes of memory for each sequence.

    Every segment is read through first. Raises SegmentError if any is missing or damaged, only after all were looked
    at, so that one more run mends all of them.
    """

    def __init__(self, store: Store, names: Sequence[str]) -> None:
        lost = [name for name in names if store.find(name) is None]
        if lost:
            more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
            raise SegmentError(f"{store.path(lost[0])}{more}: missing, or damaged and set aside")
        self.names = list(names)
        self.precisions: list[str] = []
        self._store = store
        self._open: OrderedDict[int, Segment] = OrderedDict()
        digests, segments, rows = [np.empty((0, DIGEST_BYTES), np.uint8)], [], []
        for number, name in enumerate(self.names):
            segment = store.read(name)
            self.precisions.append(segment.precision)
            digests.append(np.array(segment.digests))
            segments.append(np.full(len(segment), number, np.int32))
            rows.append(np.arange(len(segment), dtype=np.int64))
        high, low = _halves(np.concatenate(digests))
        order = np.lexsort((low, high))
        self._high, self._low = high[order], low[order]
        self._segments = np.concatenate([*segments, np.empty(0, np.int32)])[order]
        self._rows = np.concatenate([*rows, np.empty(0, np.int64)])[order]

    def locate(self, digests: np.ndarray) -> Location:
        """digests: uint8 `[N, 16]`."""
        segments, rows = np.full(len(digests), -1, np.int32), np.full(len(digests), -1, np.int64)
        if len(self._high) == 0 or len(digests) == 0:
            return Location(segments, rows)
        high, low = _halves(digests)
        at = np.searchsorted(self._high, high)
        # Two digests may share their first half, if hardly ever: step over those whose second half differs.
        while True:
            inside = np.minimum(at, len(self._high) - 1)
            same_half = (at < len(self._high)) & (self._high[inside] == high)
            step = same_half & (self._low[inside] != low)
            if not step.any():
                break
            at = at + step
        segments[same_half] = self._segments[inside[same_half]]
        rows[same_half] = self._rows[inside[same_half]]
        return Location(segments, rows)

    def segment(self, number: int) -> Segment:
        """One segment, mapped; the ones used last are kept open."""
        if number not in self._open:
            self._open[number] = self._store.read(self.names[number])
            if len(self._open) > _OPEN_SEGMENTS:
                self._open.popitem(last=False)
        self._open.move_to_end(number)
        return self._open[number]


def _halves(digests: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    pairs = np.ascontiguousarray(digests).view(">u8").astype(np.uint64)
    return pairs[:, 0], pairs[:, 1]


def gather(index: SegmentIndex, segments: np.ndarray, rows: np.ndarray, array: str) -> tuple[np.ndarray, np.ndarray]:
    """The values of sequences given by segment number and row, in that order, and their residue counts.

    Returns `[N, D]` for a pooled array, else the sequences' rows end to end (see `engine.rows_per_sequence`); and int64
    `[N]`.
    """
    lengths = np.empty(len(rows), np.int64)
    parts: list[np.ndarray] = [np.empty(0)] * len(rows)
    pooled: np.ndarray | None = None
    for number in np.unique(segments):
        segment = index.segment(int(number))
        values = segment.arrays[array]
        mine = np.flatnonzero(segments == number)
        lengths[mine] = segment.lengths[rows[mine]]
        if is_pooled(array):
            if pooled is None:
                pooled = np.empty((len(rows), values.shape[1]), values.dtype)
            pooled[mine] = values[rows[mine]]
        else:
            offsets = segment.offsets(array)
            for i in mine:
                parts[i] = values[offsets[rows[i]] : offsets[rows[i] + 1]]
    return (np.concatenate(parts) if pooled is None else pooled), lengths
