"""Find sequences in many segments by digest, and gather their vectors."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from esmflow.digests import DIGEST_BYTES
from esmflow.engine import is_pooled, row_offsets, rows_per_sequence
from esmflow.segments import Segment, SegmentError, Store

# Mapped segments count as memory, and each array as an open file: those used last are kept, up to these limits.
_OPEN_ARRAYS = 256
_OPEN_BYTES = 256 << 20


@dataclass(frozen=True)
class Location:
    """Where the embeddings of a block of records are: segment numbers and rows, -1 where there is none.

    lengths: residues embedded, 0 where there is none.
    """

    segments: np.ndarray
    rows: np.ndarray
    lengths: np.ndarray

    def __getitem__(self, part: slice | np.ndarray) -> Location:
        return Location(self.segments[part], self.rows[part], self.lengths[part])


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
        self.shapes: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
        """Of each array, the shape of one of its rows and the type of its values."""
        self._store = store
        self._open: OrderedDict[int, Segment] = OrderedDict()
        high, low, segments, rows, lengths = [], [], [], [], []
        for number, name in enumerate(self.names):
            segment = store.read(name)
            self.precisions.append(segment.precision)
            self.shapes.update({key: (array.shape[1:], array.dtype) for key, array in segment.arrays.items()})
            halves = _halves(segment.digests)
            high.append(halves[0])
            low.append(halves[1])
            segments.append(np.full(len(segment), number, np.int32))
            rows.append(np.arange(len(segment), dtype=np.int32))
            lengths.append(np.array(segment.lengths, np.int32))
        self._high = _join(high, np.uint64)
        order = np.argsort(self._high)
        self._high = self._high[order]
        # One after the other, so that few copies live at once.
        self._low = _join(low, np.uint64)[order]
        self._segments = _join(segments, np.int32)[order]
        self._rows = _join(rows, np.int32)[order]
        self._lengths = _join(lengths, np.int32)[order]

    def locate(self, digests: np.ndarray) -> Location:
        """digests: uint8 `[N, 16]`."""
        segments, rows = np.full(len(digests), -1, np.int32), np.full(len(digests), -1, np.int32)
        lengths = np.zeros(len(digests), np.int32)
        if len(self._high) == 0 or len(digests) == 0:
            return Location(segments, rows, lengths)
        high, low = _halves(digests)
        # Searching in order finds the next one near the last one: several times faster in a large index.
        order = np.argsort(high)
        at = np.empty(len(high), np.int64)
        at[order] = np.searchsorted(self._high, high[order])
        # Two digests may share their first half, if hardly ever: step over those whose second half differs.
        while True:
            inside = np.minimum(at, len(self._high) - 1)
            same_half = (at < len(self._high)) & (self._high[inside] == high)
            step = same_half & (self._low[inside] != low)
            if not step.any():
                break
            at = at + step
        found = inside[same_half]
        segments[same_half] = self._segments[found]
        rows[same_half] = self._rows[found]
        lengths[same_half] = self._lengths[found]
        return Location(segments, rows, lengths)

    def segment(self, number: int) -> Segment:
        """One segment, mapped; the ones used last are kept open."""
        if number not in self._open:
            self._open[number] = self._store.read(self.names[number])
        self._open.move_to_end(number)
        while len(self._open) > 1 and self._is_full():
            self._open.popitem(last=False)
        return self._open[number]

    def _is_full(self) -> bool:
        arrays = [array.nbytes for segment in self._open.values() for array in segment.arrays.values()]
        return len(arrays) > _OPEN_ARRAYS or sum(arrays) > _OPEN_BYTES


def _halves(digests: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    pairs = np.ascontiguousarray(digests).reshape(-1, DIGEST_BYTES).view(">u8").astype(np.uint64)
    return np.ascontiguousarray(pairs[:, 0]), np.ascontiguousarray(pairs[:, 1])


def _join(parts: list[np.ndarray], dtype: type) -> np.ndarray:
    joined = np.concatenate([*parts, np.empty(0, dtype)])
    parts.clear()
    return joined


def gather(
    index: SegmentIndex,
    location: Location,
    array: str,
    convert: Callable[[np.ndarray], np.ndarray] | None = None,
) -> np.ndarray:
    """The values of sequences in the order in which `location` has them, each of which must be somewhere.

    Returns `[N, D]` for a pooled array, else the sequences' rows end to end (see `engine.rows_per_sequence`).
    convert: changes the type of values, as they are read.
    """
    shape, dtype = index.shapes[array]
    if convert is not None:
        dtype = convert(np.empty(0, dtype)).dtype
    starts = row_offsets(array, location.lengths)
    gathered = np.empty((starts[-1], *shape), dtype)
    for segment, mine in _by_segment(index, location):
        rows, values = location.rows[mine], segment.arrays[array].view(np.ndarray)
        if is_pooled(array):
            taken = values[rows]
            gathered[mine] = taken if convert is None else convert(taken)
            continue
        begins = segment.offsets(array)[rows]
        counts = rows_per_sequence(array, location.lengths[mine])
        for at, begin, count in zip(starts[mine].tolist(), begins.tolist(), counts.tolist()):
            taken = values[begin : begin + count]
            gathered[at : at + count] = taken if convert is None else convert(taken)
    return gathered


def _by_segment(index: SegmentIndex, location: Location) -> Iterator[tuple[Segment, np.ndarray]]:
    """Each segment that is needed, and the positions in `location` of what is in it, in the order of its rows."""
    order = np.lexsort((location.rows, location.segments))
    numbers = location.segments[order]
    cuts = np.flatnonzero(np.diff(numbers)) + 1
    for mine in np.split(order, cuts):
        if len(mine):
            yield index.segment(int(location.segments[mine[0]])), mine
