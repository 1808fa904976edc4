"""Find sequences in many segments by digest, and gather their vectors."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock

import numpy as np

from esmflow.arrays import Array
from esmflow.store.digests import halves
from esmflow.store.segments import Segment, SegmentError, Store
from esmflow.store.tensor_file import forget_pages

# Each is an open file, of which a process may have a thousand.
_OPEN_SEGMENTS = 256
# Rows that are copied together: little enough to stay in a processor's cache from the segment to their place.
_COPIED_BYTES = 1 << 19


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

    Every segment is read through first, `threads` at a time. Raises SegmentError if any is missing or damaged, only
    after all were looked at, so that one more run mends all of them.
    """

    def __init__(self, store: Store, names: Sequence[str], threads: int = 1) -> None:
        self.names = list(names)
        self.shapes: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
        """Of each array, the shape of one of its rows and the type of its values."""
        self._store = store
        self._threads = threads
        self._open: OrderedDict[int, Segment] = OrderedDict()
        self._opening = Lock()
        contents = self._read_through()
        self.precisions = [content.precision for content in contents]
        self._high = _join([content.high for content in contents], np.uint64)
        order = np.argsort(self._high)
        self._high = self._high[order]
        # One after the other, so that few copies live at once.
        self._low = _join([content.low for content in contents], np.uint64)[order]
        self._lengths = _join([content.lengths for content in contents], np.int32)[order]
        self._sizes = [len(content.high) for content in contents]
        del contents
        self._segments = np.repeat(np.arange(len(self._sizes), dtype=np.int32), self._sizes)[order]
        self._rows = _join([np.arange(size, dtype=np.int32) for size in self._sizes], np.int32)[order]

    def _read_through(self) -> list[_Content]:
        # A second thread reads ahead while one compares checksums.
        with ThreadPoolExecutor(max(2, self._threads)) as pool:
            contents = list(pool.map(self._read_content, self.names))
        lost = [name for name, content in zip(self.names, contents, strict=True) if content is None]
        if lost:
            more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
            raise SegmentError(f"{self._store.path(lost[0])}{more}: missing, or damaged and set aside")
        return [content for content in contents if content is not None]

    def _read_content(self, name: str) -> _Content | None:
        segment = self._store.find(name)
        if segment is None:
            return None
        self.shapes.update({key: (array.shape[1:], array.dtype) for key, array in segment.arrays.items()})
        return _Content(segment.precision, *halves(segment.digests), np.array(segment.lengths, np.int32))

    def locate(self, digests: np.ndarray) -> Location:
        """digests: uint8 `[N, 16]`."""
        segments, rows = np.full(len(digests), -1, np.int32), np.full(len(digests), -1, np.int32)
        lengths = np.zeros(len(digests), np.int32)
        if len(self._high) == 0 or len(digests) == 0:
            return Location(segments, rows, lengths)
        high, low = halves(digests)
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
        """One segment, mapped; the ones used last are kept open. From any thread.

        Raises SegmentError if it is gone, or was replaced by one that holds more or fewer sequences.
        """
        with self._opening:
            if number not in self._open:
                segment = self._store.read(self.names[number])
                if len(segment) != self._sizes[number]:
                    path = self._store.path(self.names[number])
                    raise SegmentError(f"{path}: another run replaced it meanwhile; run the same command again")
                self._open[number] = segment
            self._open.move_to_end(number)
            while len(self._open) > _OPEN_SEGMENTS:
                self._open.popitem(last=False)
            return self._open[number]

    def gather(
        self, location: Location, array: Array, convert: Callable[[np.ndarray], np.ndarray] | None = None
    ) -> np.ndarray:
        """The values of sequences in the order in which `location` has them, each of which must be somewhere.

        Returns `[N, D]` for a pooled array, else the sequences' rows end to end (see `Array.rows`).
        convert: changes the type of a pooled array's values, as they are read.
        """
        shape, dtype = self.shapes[array.name]
        if convert is not None:
            dtype = convert(np.empty((0, *shape), dtype)).dtype
        starts = array.offsets(location.lengths)
        gathered = np.empty((starts[-1], *shape), dtype)
        groups = _by_segment(location)

        def copy(mine: np.ndarray) -> None:
            segment = self.segment(int(location.segments[mine[0]]))
            if array.is_pooled:
                _copy_rows(segment.arrays[array.name], location.rows[mine], gathered, mine, convert)
            else:
                _copy_spans(segment, array, location.rows[mine], gathered, starts[mine])
            forget_pages(segment.arrays[array.name])

        with ThreadPoolExecutor(self._threads) as pool:
            for _ in pool.map(copy, groups):
                pass
        return gathered


@dataclass(frozen=True)
class _Content:
    """What the index keeps of a segment. high, low: uint64 `[N]`, the halves of the digests; lengths: int32 `[N]`."""

    precision: str
    high: np.ndarray
    low: np.ndarray
    lengths: np.ndarray


def _join(parts: list[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate([*parts, np.empty(0, dtype)])


def _by_segment(location: Location) -> list[np.ndarray]:
    """For each segment that is needed the positions in `location` of what is in it, in the order of its rows."""
    if not len(location.segments):
        return []
    # One key is sorted several times as fast as two.
    order = np.argsort(location.segments.astype(np.int64) << 32 | location.rows)
    return np.split(order, np.flatnonzero(np.diff(location.segments[order])) + 1)


def _copy_rows(
    values: np.ndarray,
    rows: np.ndarray,
    target: np.ndarray,
    places: np.ndarray,
    convert: Callable[[np.ndarray], np.ndarray] | None,
) -> None:
    """Copies rows `rows` of `values` to rows `places` of `target`."""
    together = max(1, _COPIED_BYTES * len(values) // max(values.nbytes, 1))
    # Used again and again: new memory would cost as much as copying into it.
    taken = np.empty((min(together, len(rows)), *values.shape[1:]), values.dtype)
    for start in range(0, len(rows), together):
        part = slice(start, start + together)
        copied = taken[: len(rows[part])]
        # With the default mode, NumPy would copy to a buffer first, in case that a number is out of bounds.
        np.take(values, rows[part], axis=0, out=copied, mode="clip")
        target[places[part]] = copied if convert is None else convert(copied)


def _copy_spans(segment: Segment, array: Array, rows: np.ndarray, target: np.ndarray, places: np.ndarray) -> None:
    """Copies all that each sequence has in an array of a segment to where its place in `target` begins."""
    begins = array.offsets(segment.lengths)[rows]
    counts = array.rows(segment.lengths[rows])
    for at, begin, count in zip(places.tolist(), begins.tolist(), counts.tolist()):
        target[at : at + count] = segment.arrays[array.name][begin : begin + count]
