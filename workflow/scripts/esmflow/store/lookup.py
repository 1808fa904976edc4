"""Which sequences a store has: find the segment of one among all of a fingerprint's, even if there are sixty million.

The segments are the truth. Beside them lies an index, `sequences.index`, a copy of their digests in sorted order, so
that planning need not open every segment: it is rebuilt from the segments when it is missing or damaged, and brought up
to date when segments have come or gone. A segment is read through before it is counted on. What another fingerprint's
segments hold with more layers or kinds than are asked for is taken over from them, and nothing is computed.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from esmflow.store import SEGMENT_SUFFIX
from esmflow.store.digests import DigestIndex, halves
from esmflow.store.segments import Store
from esmflow.store.tensor_file import DamagedFileError, open_tensors, write_tensors

log = logging.getLogger(__name__)

INDEX_FORMAT = "esmflow-index-1"
INDEX_NAME = "sequences.index"


@dataclass(frozen=True)
class _Index:
    """The digests of all segments, in a column `segments` the number of each one's segment.

    stamps: size and modification time (nanoseconds) of each segment by name; in this order they are numbered.
    """

    stamps: dict[str, tuple[int, int]]
    digests: DigestIndex


_EMPTY = _Index({}, DigestIndex(columns={"segments": np.empty(0, np.int32)}))


class StoredSequences:
    """Which sequences a store has, and in which segment. Takes 20 bytes of memory for each sequence.

    use: makes sure of a segment, by its name, before it is counted on.
    """

    def __init__(self, store: Store, use: Callable[[str], bool] | None = None) -> None:
        self._use = use or (lambda name: store.find(name, check=True) is not None)
        index = _current_index(store)
        self.names = list(index.stamps)
        self._digests = index.digests
        self._usable: dict[int, bool] = {}
        self._wider = []
        if use is None:
            wider = [other for other in store.others() if other.description.holds(store.description)]
            self._wider = [StoredSequences(other, partial(store.take_over, other=other)) for other in wider]

    def __len__(self) -> int:
        return len(self._digests)

    def find(self, digests: np.ndarray) -> np.ndarray:
        """The segment of each sequence: int32 `[N]`, its place in `names`, -1 where there is none.

        digests: uint8 `[N, 16]`. A segment is read through the first time that it would be named. If it is damaged it
        is set aside, and its sequences count as not stored, unless another segment has them too.
        """
        found = self._digests.values("segments", self._digests.find(digests, self._are_usable))
        for wider in self._wider:
            missing = np.flatnonzero(found < 0)
            there = wider.find(digests[missing])
            for number in np.unique(there[there >= 0]).tolist():
                found[missing[there == number]] = len(self.names)
                self.names.append(wider.names[number])
        return found

    def _are_usable(self, _: np.ndarray, places: np.ndarray) -> np.ndarray:
        numbers = self._digests.columns["segments"][places]
        return np.isin(numbers, [number for number in np.unique(numbers) if self._is_usable(int(number))])

    def _is_usable(self, number: int) -> bool:
        if number not in self._usable:
            self._usable[number] = self._use(self.names[number])
        return self._usable[number]


def stored_otherwise(store: Store, digests: np.ndarray) -> tuple[int, list[str]] | None:
    """How many of these sequences a store has under another fingerprint, and the keys that differ; None if it has none.

    Of several fingerprints the one that differs in the fewest keys. digests: uint8 `[N, 16]`.
    """
    others = [(store.description.differences(other.description), other) for other in store.others()]
    for keys, other in sorted(others, key=lambda pair: len(pair[0])):
        if count := int((_current_index(other).digests.find(digests) >= 0).sum()):
            return count, keys
    return None


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
    segments = numbers[known.digests.columns["segments"]]
    stay = segments >= 0
    staying = DigestIndex(known.digests.high[stay], known.digests.low[stay], {"segments": segments[stay]})
    pieces: dict[str, list[np.ndarray]] = {"high": [], "low": [], "segments": []}
    for name, stamp in new.items():
        # Not read through here: most segments of a shared store have nothing that this run asks for.
        segment = store.find(name, check=False)
        if segment is None:
            continue
        columns = (*halves(segment.digests), np.full(len(segment), len(stamps), np.int32))
        for pieces_of_column, column in zip(pieces.values(), columns, strict=True):
            pieces_of_column.append(column)
        stamps[name] = stamp
    return _Index(stamps, staying.merged(DigestIndex.of(pieces)))


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
    return _Index(stamps, DigestIndex(arrays["high"], arrays["low"], {"segments": arrays["segments"]}))


def _write_index(store: Store, index: _Index) -> None:
    listed = [(name, *stamp) for name, stamp in index.stamps.items()]
    metadata = {"format": INDEX_FORMAT, "fingerprint": store.fingerprint, "segments": json.dumps(listed)}
    tensors = {"high": index.digests.high, "low": index.digests.low, **index.digests.columns}
    write_tensors(store.folder / INDEX_NAME, tensors, metadata)
