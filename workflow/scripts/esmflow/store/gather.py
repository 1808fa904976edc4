"""Read segments: find sequences in many of them by digest, gather their vectors, and read single ones."""

from __future__ import annotations

import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from threading import Lock

import numpy as np

from esmflow.arrays import Array
from esmflow.store.digests import DigestIndex, halves
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
    """Finds sequences in a set of segments by digest, and reads them. Takes 28 bytes of memory for each sequence.

    Every segment is opened first, `threads` at a time, and under `check` read through. Raises SegmentError if any is
    missing or damaged, only after all were looked at, so that one more run mends all of them.
    """

    def __init__(self, store: Store, names: Sequence[str], threads: int = 1, *, check: bool) -> None:
        self.names = list(names)
        self.shapes: dict[Array, tuple[tuple[int, ...], np.dtype]] = {}
        """Of each array, the shape of one of its rows and the type of its values."""
        self._store = store
        self._threads = threads
        self._check = check
        self._open: OrderedDict[int, Segment] = OrderedDict()
        self._opening = Lock()
        contents = self._read_all()
        self.precisions = [content.precision for content in contents]
        self._checksums = [content.checksum for content in contents]
        sizes = [len(content.lengths) for content in contents]
        pieces = {name: [getattr(content, name) for content in contents] for name in ("high", "low", "lengths")}
        del contents
        pieces["segments"] = [np.full(size, number, np.int32) for number, size in enumerate(sizes)]
        pieces["rows"] = [np.arange(size, dtype=np.int32) for size in sizes]
        self.digests = DigestIndex.of(pieces)

    def _read_all(self) -> list[_Content]:
        # A second thread reads ahead while one compares checksums.
        with ThreadPoolExecutor(max(2, self._threads)) as pool:
            contents = list(pool.map(self._read_content, self.names))
        lost = [name for name, content in zip(self.names, contents, strict=True) if content is None]
        if lost:
            more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
            raise SegmentError(f"{self._store.path(lost[0])}{more}: missing, or damaged and set aside")
        return [content for content in contents if content is not None]

    def _read_content(self, name: str) -> _Content | None:
        segment = self._store.find(name, check=self._check)
        if segment is None:
            return None
        self.shapes.update(
            {Array.named(name): (array.shape[1:], array.dtype) for name, array in segment.arrays.items()}
        )
        lengths = np.array(segment.lengths, np.int32)
        return _Content(segment.precision, _checksum(segment), *halves(segment.digests), lengths)

    def locate(self, digests: np.ndarray) -> Location:
        """digests: uint8 `[N, 16]`."""
        places = self.digests.find(digests)
        columns = {"segments": -1, "rows": -1, "lengths": 0}
        return Location(*(self.digests.values(name, places, missing) for name, missing in columns.items()))

    def segment(self, number: int) -> Segment:
        """One segment, mapped; the ones used last are kept open. From any thread.

        Raises SegmentError if it is gone, or was replaced by one of other sequences.
        """
        with self._opening:
            if number not in self._open:
                segment = self._store.read(self.names[number])
                if _checksum(segment) != self._checksums[number]:
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
        shape, dtype = self.shapes[array]
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


def read_rows(store: Store, places: Sequence[tuple[str, int]], array: Array) -> Iterator[tuple[int, np.ndarray]]:
    """Reads single sequences, given by segment and row: yields the number of each and its values, mapped from the file.

    They are `[D]` for a pooled array, else the sequence's rows (see `Array.rows`). Segment by segment,
    so each is opened once. Raises SegmentError if one is missing or damaged.
    """
    for name, numbers in groupby(sorted(range(len(places)), key=places.__getitem__), lambda number: places[number][0]):
        segment = store.read(name)
        offsets = array.offsets(segment.lengths)
        for number in numbers:
            row = places[number][1]
            values = segment.arrays[array.name][offsets[row] : offsets[row + 1]]
            yield number, values[0] if array.is_pooled else values


@dataclass(frozen=True)
class _Content:
    """What the index keeps of a segment. high, low: uint64 `[N]`, the halves of the digests; lengths: int32 `[N]`."""

    precision: str
    checksum: int
    high: np.ndarray
    low: np.ndarray
    lengths: np.ndarray


def _checksum(segment: Segment) -> int:
    """Of the digests: the rows of a segment that another run replaced are known by it, or are other sequences'."""
    return zlib.crc32(np.ascontiguousarray(segment.digests).data)


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
