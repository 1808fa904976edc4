"""Check for every record that its row in the manifest and the row of the store that it points to belong together."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from esmflow.inputs.residues import DIGEST_BYTES
from esmflow.store.segments import Store
from esmflow.verify.read_back import Sampled

_COLUMNS = ["file", "record", "id", "length", "digest", "precision", "segment", "row"]
_LISTED = 10


@dataclass
class ManifestCheck:
    """What was found.

    records: embedded ones, all of which were checked. misplaced: how many point to a row of another sequence, or of
    another length; `examples` names the first of them. located: by digest, the first record of each candidate.
    """

    records: int = 0
    misplaced: int = 0
    examples: list[str] = field(default_factory=list)
    located: dict[bytes, Sampled] = field(default_factory=dict)


def check_manifest(manifest: str | os.PathLike[str], store: Store, candidates: Mapping[bytes, str]) -> ManifestCheck:
    """Compares, for every embedded record, digest and length in the manifest with those in the store.

    Takes 24 bytes of memory for each sequence. Raises SegmentError when a segment is missing or damaged.
    """
    rows = _StoredRows(store, manifest)
    check = ManifestCheck()
    in_file: Counter[str] = Counter()
    wanted = np.array([_first_half(digest) for digest in candidates], np.uint64)
    for batch in _embedded(manifest):
        digests = np.frombuffer(bytes.fromhex("".join(batch["digest"].to_pylist())), np.uint8)
        digests = digests.reshape(-1, DIGEST_BYTES)
        lengths = store.description.long.embedded(batch["length"].to_numpy())
        wrong = np.flatnonzero(~rows.hold(batch["segment"], batch["row"].to_numpy(), digests, lengths))
        check.misplaced += len(wrong)
        for i in wrong[: _LISTED - len(check.examples)]:
            check.examples.append("{file}, record {record} ({id})".format(**batch.slice(i, 1).to_pylist()[0]))

        files = batch["file"].to_pylist()
        halves = np.ascontiguousarray(digests).view(np.uint64)[:, 0]
        for i in np.flatnonzero(np.isin(halves, wanted)):
            digest = digests[i].tobytes()
            if digest in candidates and digest not in check.located:
                row = batch.slice(i, 1).to_pylist()[0]
                check.located[digest] = Sampled(
                    **{**row, "digest": digest.hex()},
                    sequence=candidates[digest],
                    position=check.records + int(i),
                    position_in_file=in_file[files[i]] + files[:i].count(files[i]),
                )
        in_file.update(files)
        check.records += len(files)
    return check


class _StoredRows:
    """Digest and length of every row of the segments that a manifest names."""

    def __init__(self, store: Store, manifest: str | os.PathLike[str]) -> None:
        names: set[str] = set()
        for batch in pq.ParquetFile(manifest).iter_batches(columns=["segment"]):
            names.update(pc.unique(batch["segment"]).to_pylist())
        segments = [(name, store.read(name)) for name in sorted(names - {None})]
        self._sizes = {name: len(segment) for name, segment in segments}
        self._starts = {}
        start = 0
        for name, segment in segments:
            self._starts[name] = start
            start += len(segment)
        self._digests = np.concatenate([np.empty((0, DIGEST_BYTES), np.uint8), *(s.digests for _, s in segments)])
        self._lengths = np.concatenate([np.empty(0, np.int64), *(s.lengths for _, s in segments)])

    def hold(self, segments: pa.ChunkedArray, rows: np.ndarray, digests: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Whether each of these rows is there and has this digest and this length: bool `[N]`."""
        # Through plain strings: a dictionary may hold names that no row here has.
        encoded = segments.cast(pa.string()).combine_chunks().dictionary_encode()
        names = encoded.dictionary.to_pylist()
        codes = encoded.indices.to_numpy()
        starts = np.array([self._starts[name] for name in names], np.int64)[codes]
        inside = (rows >= 0) & (rows < np.array([self._sizes[name] for name in names], np.int64)[codes])
        at = np.where(inside, starts + rows, 0)
        return inside & (self._digests[at] == digests).all(axis=1) & (self._lengths[at] == lengths)


def _embedded(manifest: str | os.PathLike[str]) -> Iterator[pa.Table]:
    for batch in pq.ParquetFile(manifest).iter_batches(columns=_COLUMNS):
        table = pa.Table.from_batches([batch])
        embedded = table.filter(table["row"].is_valid())
        if len(embedded):
            yield embedded


def _first_half(digest: bytes) -> np.uint64:
    return np.frombuffer(digest, np.uint64)[0]
