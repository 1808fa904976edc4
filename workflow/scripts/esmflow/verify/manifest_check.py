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
from esmflow.store.digests import halves
from esmflow.store.gather import SegmentIndex
from esmflow.store.segments import Store
from esmflow.verify.read_back import Sampled

_COLUMNS = ["sample", "file", "record", "id", "length", "digest", "precision", "segment", "row"]
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

    Takes 28 bytes of memory for each sequence. Raises SegmentError when a segment is missing or damaged.
    """
    index = SegmentIndex(store, _segment_names(manifest), check=False)
    check = ManifestCheck()
    in_file: Counter[str] = Counter()
    wanted, _ = halves(np.frombuffer(b"".join(candidates), np.uint8))
    for batch in _embedded(manifest):
        digests = np.frombuffer(bytes.fromhex("".join(batch["digest"].to_pylist())), np.uint8)
        digests = digests.reshape(-1, DIGEST_BYTES)
        lengths = store.description.long.embedded(batch["length"].to_numpy())
        wrong = np.flatnonzero(_stored_lengths(index, digests, batch) != lengths)
        check.misplaced += len(wrong)
        for i in wrong[: _LISTED - len(check.examples)]:
            check.examples.append("{file}, record {record} ({id})".format(**batch.slice(i, 1).to_pylist()[0]))

        files = batch["file"].to_pylist()
        for i in np.flatnonzero(np.isin(halves(digests)[0], wanted)):
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


def _segment_names(manifest: str | os.PathLike[str]) -> list[str]:
    """The segments that a manifest names, sorted."""
    names: set[str | None] = set()
    for batch in pq.ParquetFile(manifest).iter_batches(columns=["segment"]):
        names.update(pc.unique(batch["segment"]).to_pylist())
    return sorted(name for name in names if name is not None)


def _stored_lengths(index: SegmentIndex, digests: np.ndarray, batch: pa.Table) -> np.ndarray:
    """The residues of each record's row in the store: int32 `[N]`, -1 where the row is not that of its digest."""
    number = {name: number for number, name in enumerate(index.names)}
    # Through plain strings: a dictionary may hold names that no row here has.
    encoded = batch["segment"].cast(pa.string()).combine_chunks().dictionary_encode()
    segments = np.array([number[name] for name in encoded.dictionary.to_pylist()], np.int32)[encoded.indices.to_numpy()]
    rows, columns = batch["row"].to_numpy(), index.digests.columns

    def is_named(asked: np.ndarray, places: np.ndarray) -> np.ndarray:
        return (columns["segments"][places] == segments[asked]) & (columns["rows"][places] == rows[asked])

    return index.digests.values("lengths", index.digests.find(digests, is_named))


def _embedded(manifest: str | os.PathLike[str]) -> Iterator[pa.Table]:
    for batch in pq.ParquetFile(manifest).iter_batches(columns=_COLUMNS):
        table = pa.Table.from_batches([batch])
        embedded = table.filter(table["row"].is_valid())
        if len(embedded):
            yield embedded
