"""What a store holds: find the segment of a sequence among all of a fingerprint's, even if it holds sixty million.

The segments are the truth. Beside them lies an index, `sequences.index`, a copy of their digests in sorted order, so
that planning need not open every segment: it is rebuilt from the segments when it is missing or damaged, and brought up
to date when segments have come or gone. A segment is read through before it is counted on.
"""

from __future__ import annotations

import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from esmflow.store import SEGMENT_SUFFIX
from esmflow.store.digests import halves
from esmflow.store.segments import Store
from esmflow.store.tensor_file import DamagedFileError, open_tensors, write_tensors

log = logging.getLogger(__name__)

INDEX_FORMAT = "esmflow-index-1"
INDEX_NAME = "sequences.index"


@dataclass(frozen=True)
class _Index:
    """The digests of all segments. One entry for each sequence of each segment, in order of `high`.

    stamps: size and modification time (nanoseconds) of each segment by name; in this order they are numbered.
    high, low: uint64 `[N]`, the halves of the digests. segments: int32 `[N]`, segment numbers.
    """

    stamps: dict[str, tuple[int, int]]
    high: np.ndarray
    low: np.ndarray
    segments: np.ndarray


_EMPTY = _Index({}, np.empty(0, np.uint64), np.empty(0, np.uint64), np.empty(0, np.int32))


class HeldSequences:
    """Which sequences a store holds, and in which segment. Takes 20 bytes for each sequence."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._index = _current_index(store)
        self.names = list(self._index.stamps)
        self._usable: dict[int, bool] = {}

    def __len__(self) -> int:
        return len(self._index.high)

    def find(self, digests: np.ndarray) -> np.ndarray:
        """The segment of each sequence: int32 `[N]`, its place in `names`, -1 where there is none.

        digests: uint8 `[N, 16]`. A segment is read through the first time that it would be named. If it is damaged it
        is set aside, and its sequences are no longer held.
        """
        index, found = self._index, np.full(len(digests), -1, np.int32)
        high, low = halves(digests)
        at = np.searchsorted(index.high, high)
        looking = np.arange(len(digests))
        while len(looking):
            looking = looking[at[looking] < len(index.high)]
            looking = looking[index.high[at[looking]] == high[looking]]
            numbers = index.segments[at[looking]]
            same = index.low[at[looking]] == low[looking]
            usable = [number for number in np.unique(numbers[same]) if self._is_usable(int(number))]
            here = same & np.isin(numbers, usable)
            found[looking[here]] = numbers[here]
            # Others have the same first half, or the same sequence in another segment: if any, they come next.
            looking = looking[~here]
            at[looking] += 1
        return found

    def _is_usable(self, number: int) -> bool:
        if number not in self._usable:
            self._usable[number] = self._store.find(self.names[number]) is not None
        return self._usable[number]


def _current_index(store: Store) -> _Index:
    """The index, true to the segments that are there now; written back if it was not."""
    stamps = _list_segments(store.folder)
    known = _read_index(store)
    kept = {name for name, stamp in known.stamps.items() if stamps.get(name) == stamp}
    new = [name for name in stamps if name not in kept]
    if not new and len(kept) == len(known.stamps):
        return known
    current = _updated(store, known, kept, {name: stamps[name] for name in new})
    log.info("%s: %d segments, %d of them new to its index", store.folder, len(current.stamps), len(new))
    try:
        _write_index(store, current)
    except OSError as error:
        log.info("%s: its index cannot be written (%s); planning goes on without", store.folder, error)
    return current


def _list_segments(folder: Path) -> dict[str, tuple[int, int]]:
    stamps = {}
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.endswith(SEGMENT_SUFFIX) and not entry.name.startswith("."):
                    try:
                        stat = entry.stat()
                    except FileNotFoundError:
                        continue
                    stamps[entry.name.removesuffix(SEGMENT_SUFFIX)] = (stat.st_size, stat.st_mtime_ns)
    except FileNotFoundError:
        pass
    return dict(sorted(stamps.items()))


def _updated(store: Store, known: _Index, kept: set[str], new: dict[str, tuple[int, int]]) -> _Index:
    """An index without the segments that are gone or changed, and with the new ones."""
    numbers = np.full(len(known.stamps), -1, np.int32)
    stamps: dict[str, tuple[int, int]] = {}
    for number, (name, stamp) in enumerate(known.stamps.items()):
        if name in kept:
            numbers[number] = len(stamps)
            stamps[name] = stamp
    segments = numbers[known.segments]
    stay = segments >= 0
    high, low, segments = [known.high[stay]], [known.low[stay]], [segments[stay]]
    for name, stamp in new.items():
        # Not read through here: most segments of a shared store hold nothing that this run asks for.
        segment = store.find(name, check=False)
        if segment is None:
            continue
        first, second = halves(segment.digests)
        high.append(first)
        low.append(second)
        segments.append(np.full(len(segment), len(stamps), np.int32))
        stamps[name] = stamp
    all_high = np.concatenate(high)
    # Stable sorting is quick on what is mostly sorted already.
    order = np.argsort(all_high, kind="stable")
    return _Index(stamps, all_high[order], np.concatenate(low)[order], np.concatenate(segments)[order])


def _read_index(store: Store) -> _Index:
    path = store.folder / INDEX_NAME
    try:
        with open_tensors(path) as file:
            if (file.metadata.get("format"), file.metadata.get("fingerprint")) != (INDEX_FORMAT, store.fingerprint):
                return _EMPTY
            file.check()
            # Copied: other runs replace the file, and a mapping of a replaced file is not safe on every NFS.
            arrays = {name: np.array(values) for name, values in file.mapped().items()}
    except DamagedFileError as error:
        log.warning("%s; it is built again from the segments", error)
        return _EMPTY
    except OSError:
        return _EMPTY
    stamps = {name: (size, time) for name, size, time in json.loads(file.metadata["segments"])}
    return _Index(stamps, arrays["high"], arrays["low"], arrays["segments"])


def _write_index(store: Store, index: _Index) -> None:
    listed = [(name, *stamp) for name, stamp in index.stamps.items()]
    metadata = {"format": INDEX_FORMAT, "fingerprint": store.fingerprint, "segments": json.dumps(listed)}
    tensors = {"high": index.high, "low": index.low, "segments": index.segments}
    write_tensors(store.folder / INDEX_NAME, tensors, metadata)
