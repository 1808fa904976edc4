"""Segments: immutable files of embeddings, one for each finished shard; and the store, the folder they are in.

A segment is a `.safetensors` file with the tensors `digests` (uint8 `[N, 16]`), `lengths` (int64 `[N]`, residues
embedded) and one tensor for each output: pooled ones `[N, D]`, per-residue ones `[sum of lengths, D]`, `logits`
`[sum of lengths, 33]`, `contacts` `[sum of squared lengths]`. Its metadata
names the fingerprint, the precision that was used, and the shard's sequences that could not be embedded, with reasons:
a segment stands for its whole shard. It is written to a temporary name and renamed, so it is whole or it is not there.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from esmflow.digests import DIGEST_BYTES
from esmflow.engine import row_offsets
from esmflow.errors import EsmflowError
from esmflow.failures import Failure, Reason
from esmflow.files import atomic_path, write_json
from esmflow.fingerprint import Fingerprint

log = logging.getLogger(__name__)

FORMAT = "esmflow-segment-1"
SUFFIX = ".safetensors"


class SegmentError(EsmflowError):
    """A segment that cannot be used. The message names the file and what is wrong with it."""


@dataclass(frozen=True)
class Segment:
    """The content of one segment. Arrays are mapped from the file when they come from `read_segment`."""

    digests: np.ndarray
    lengths: np.ndarray
    arrays: Mapping[str, np.ndarray]
    precision: str
    failures: tuple[Failure, ...] = ()

    def __len__(self) -> int:
        return len(self.digests)

    def offsets(self, name: str) -> np.ndarray:
        """Where each sequence's rows begin in an array: int64 `[N + 1]`."""
        return row_offsets(name, self.lengths)


class Store:
    """The segments of one fingerprint in a store folder, which many runs and projects may share."""

    def __init__(self, folder: str | os.PathLike[str], fingerprint: Fingerprint) -> None:
        self.fingerprint = fingerprint.digest()
        self.folder = Path(folder) / self.fingerprint
        self.description = fingerprint

    def create(self) -> None:
        """Makes the folder, with a file that says in words what the fingerprint stands for."""
        self.folder.mkdir(parents=True, exist_ok=True)
        description = self.folder / "fingerprint.json"
        if not description.exists():
            write_json(description, self.description.__dict__)

    def path(self, name: str) -> Path:
        """Where the segment of this name is, or would be."""
        return self.folder / f"{name}{SUFFIX}"

    def names(self) -> list[str]:
        """The names of all segments, sorted."""
        return sorted(path.stem for path in self.folder.glob(f"*{SUFFIX}"))

    def write(self, name: str, segment: Segment) -> Path:
        """Commits a segment, atomically. Returns its path."""
        tensors = {"digests": segment.digests, "lengths": segment.lengths, **segment.arrays}
        metadata = {
            "format": FORMAT,
            "fingerprint": self.fingerprint,
            "precision": segment.precision,
            "failures": json.dumps([(f.digest, f.reason.value, f.detail) for f in segment.failures]),
        }
        with atomic_path(self.path(name)) as temporary:
            save_file({key: np.ascontiguousarray(value) for key, value in tensors.items()}, temporary, metadata)
        return self.path(name)

    def read(self, name: str) -> Segment:
        """Maps a segment. Raises SegmentError if it is missing, truncated, or of another fingerprint."""
        return read_segment(self.path(name), self.fingerprint)

    def find(self, name: str) -> Segment | None:
        """The segment of this name if it is there and whole; one that is damaged is said to be and counts as absent."""
        if not self.path(name).exists():
            return None
        try:
            return self.read(name)
        except SegmentError as error:
            log.warning("%s; it will be computed again", error)
            return None

    def held_digests(self) -> dict[str, np.ndarray]:
        """The digests in every usable segment: uint8 `[N, 16]` by segment name."""
        held = {}
        for name in self.names():
            try:
                held[name] = np.array(self.read(name).digests)
            except SegmentError as error:
                log.warning("%s; its sequences will be computed again", error)
        return held


def read_segment(path: Path, fingerprint: str) -> Segment:
    """Maps one segment file. Raises SegmentError if it is missing, truncated, or of another fingerprint."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as handle:
            header_size = int.from_bytes(handle.read(8), "little")
            if not 0 < header_size <= size - 8:
                raise SegmentError(f"{path}: truncated")
            header = json.loads(handle.read(header_size))
    except OSError as error:
        raise SegmentError(f"{path}: cannot be read ({error})") from error
    except ValueError as error:
        raise SegmentError(f"{path}: not a segment ({error})") from error
    metadata = header.pop("__metadata__", {})
    if metadata.get("format") != FORMAT or metadata.get("fingerprint") != fingerprint:
        raise SegmentError(f"{path}: not a segment of fingerprint {fingerprint}")
    if size != 8 + header_size + max(entry["data_offsets"][1] for entry in header.values()):
        raise SegmentError(f"{path}: truncated")
    # The library reads whole tensors into memory; mapping lets collect take single rows of segments of any size.
    arrays = {key: _mapped(path, 8 + header_size, entry) for key, entry in header.items()}
    digests, lengths = arrays.pop("digests"), arrays.pop("lengths")
    if digests.shape != (len(lengths), DIGEST_BYTES):
        raise SegmentError(f"{path}: its digests have shape {digests.shape}")
    failures = tuple(Failure(d, Reason(reason), detail) for d, reason, detail in json.loads(metadata["failures"]))
    return Segment(digests, lengths, arrays, metadata["precision"], failures)


_DTYPES = {"F32": np.float32, "F16": np.float16, "U8": np.uint8, "I64": np.int64}


def _mapped(path: Path, data_start: int, entry: dict) -> np.ndarray:
    begin, end = entry["data_offsets"]
    dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
    if begin == end:
        return np.empty(shape, dtype)
    return np.memmap(path, dtype, "r", data_start + begin, shape)
