"""Segments: immutable files of embeddings, one for each finished shard; and the store, the folder they are in.

A segment is a tensor file with the tensors `digests` (uint8 `[N, 16]`), `lengths` (int64 `[N]`, residues embedded) and
one tensor for each output: pooled vectors `[N, D]`, `pseudo_perplexity` `[N]`, per-residue ones `[sum of lengths, D]`,
`logits` `[sum of lengths, 33]`, `entropy` `[sum of lengths]`, `contacts` `[sum of squared lengths]`, `attention`
`[sum of (length + 2)², heads]`. Its metadata names the fingerprint, the precision that was used, and the shard's
sequences that could not be embedded, with reasons: a segment stands for its whole shard. What is damaged is set aside
under another name and counts as absent.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Collection, Mapping, Set
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from esmflow.arrays import Array
from esmflow.errors import EsmflowError
from esmflow.failures import Failure, Reason
from esmflow.files import LEFT_OVER_SECONDS, from_json, open_to_others, read_json, write_json
from esmflow.inputs.residues import DIGEST_BYTES
from esmflow.method import Fingerprint
from esmflow.store import SEGMENT_SUFFIX
from esmflow.store.tensor_file import DamagedFileError, open_tensors, write_tensors

log = logging.getLogger(__name__)

FORMAT = "esmflow-segment-2"
# Writing a segment takes seconds: a temporary file that nobody has touched for a day is a killed writer's.


class SegmentError(EsmflowError):
    """A segment that cannot be used. The message names the file and what is wrong with it."""


class DamagedSegmentError(SegmentError):
    """A segment whose content is not what was written, or that is in the wrong place."""


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
        return Array.named(name).offsets(self.lengths)

    def sequences(self) -> set[bytes]:
        """The digests of the shard that it stands for: of its sequences and of those that have failed."""
        return {*map(bytes, self.digests), *(bytes.fromhex(failure.digest) for failure in self.failures)}


class Store:
    """The segments of one fingerprint in a store folder, which many runs and projects may share."""

    def __init__(self, folder: str | os.PathLike[str], fingerprint: Fingerprint) -> None:
        self.fingerprint = fingerprint.digest()
        self.folder = Path(folder) / self.fingerprint
        self.description = fingerprint

    def create(self) -> None:
        """Makes the folder, with a file that says in words what the fingerprint stands for."""
        if not self.folder.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            open_to_others(self.folder)
        description = self.folder / "fingerprint.json"
        if not description.exists():
            write_json(description, self.description.__dict__)
        self._remove_left_overs()

    def path(self, name: str) -> Path:
        """Where the segment of this name is, or would be."""
        return self.folder / f"{name}{SEGMENT_SUFFIX}"

    def names(self) -> list[str]:
        """The names of all segments, sorted."""
        return sorted(path.stem for path in self.folder.glob(f"*{SEGMENT_SUFFIX}"))

    def write(self, name: str, segment: Segment) -> Path:
        """Commits a segment, atomically. Returns its path.

        One that is there already stays, whole as it is, if it lacks nothing: another run may have it open, which not
        every network file system forgives.
        """
        there = self.find(name, check=True, of=segment.sequences())
        if there is not None and (not there.failures or len(there) > len(segment)):
            log.info("%s: written meanwhile by another run; kept", self.path(name))
            return self.path(name)
        metadata = {
            "format": FORMAT,
            "fingerprint": self.fingerprint,
            "precision": segment.precision,
            "failures": json.dumps([(f.digest, f.reason.value, f.detail) for f in segment.failures]),
        }
        tensors = {"digests": segment.digests, "lengths": segment.lengths, **segment.arrays}
        write_tensors(self.path(name), tensors, metadata)
        return self.path(name)

    def others(self) -> list[Store]:
        """The stores of other fingerprints in the same folder, as far as they say what they are."""
        found = []
        for description in sorted(self.folder.parent.glob("*/fingerprint.json")):
            with suppress(OSError, ValueError, TypeError, KeyError):
                other = Store(self.folder.parent, read_fingerprint(description.parent))
                if other.folder == description.parent != self.folder:
                    found.append(other)
        return found

    def take_over(self, name: str, other: Store) -> bool:
        """Writes a segment of a store that holds more, with what this one keeps. False if it cannot be read."""
        wanted = self.description.outputs.names()
        try:
            segment = read_segment(other.path(name), other.fingerprint, arrays=wanted)
        except SegmentError as error:
            log.warning("%s; its sequences will be computed again", error)
            return False
        if segment.precision != "fp32" and other.description.only_fp32_is_alike(self.description):
            return False
        self.create()
        self.write(name, replace(segment, arrays={array: segment.arrays[array] for array in wanted}))
        return True

    def read(self, name: str, *, check: bool = False) -> Segment:
        """Maps a segment. Raises SegmentError if it is missing, truncated, or of another fingerprint.

        The digests are always compared with their checksum, all else only under `check`, which reads the whole file.
        """
        return read_segment(self.path(name), self.fingerprint, check=check)

    def find(self, name: str, *, check: bool, of: Set[bytes] | None = None) -> Segment | None:
        """The segment of this name if it is there and whole, as `read` checks it. One that is damaged is set aside.

        of: the digests of the shard that it must stand for; under the name of another it is as good as damaged.
        """
        path = self.path(name)
        try:
            return self._read_of(path, check, of)
        except DamagedSegmentError as error:
            log.warning("%s; its sequences will be computed again", error)
            self._set_aside(path, of)
        except SegmentError as error:
            if path.exists():
                log.warning("%s; its sequences will be computed again", error)
        return None

    def _read_of(self, path: Path, check: bool, of: Set[bytes] | None) -> Segment:
        segment = read_segment(path, self.fingerprint, check=check)
        if of is not None and segment.sequences() != of:
            raise DamagedSegmentError(f"{path}: holds other sequences than those it is named after")
        return segment

    def _set_aside(self, path: Path, of: Set[bytes] | None) -> None:
        """Renames a damaged segment, so that it is never looked at again but can still be examined."""
        aside = path.with_name(f"{path.name}.damaged-{time.strftime('%Y%m%dT%H%M%S')}")
        try:
            os.rename(path, aside)
            # Another run may have noticed too, and have put a new segment there just before the rename.
            self._read_of(aside, True, of)
            os.rename(aside, path)
        except FileNotFoundError:
            pass
        except DamagedSegmentError:
            log.warning("set aside as %s", aside)
        except (OSError, SegmentError) as error:
            log.warning("%s could not be set aside: %s", path, error)

    def _remove_left_overs(self) -> None:
        for path in self.folder.glob(".*.part"):
            try:
                if time.time() - path.stat().st_mtime > LEFT_OVER_SECONDS:
                    path.unlink()
            except OSError:
                continue


def read_fingerprint(folder: Path) -> Fingerprint:
    """What the segments in a folder of a store were computed with, as the run wrote it down."""
    return from_json(Fingerprint, read_json(folder / "fingerprint.json"))


def read_segment(path: Path, fingerprint: str, *, check: bool = False, arrays: Collection[str] = ()) -> Segment:
    """Maps one segment file. Raises SegmentError if it is missing, truncated, or of another fingerprint.

    check: read it through, and compare everything with its checksum; else the digests, and these arrays, which must be
    there.
    """
    try:
        with open_tensors(path) as file:
            metadata = file.metadata
            if metadata.get("format") != FORMAT or metadata.get("fingerprint") != fingerprint:
                raise DamagedSegmentError(f"{path}: not a segment of fingerprint {fingerprint}")
            file.check(None if check else ("digests", "lengths", *arrays))
            tensors = file.mapped()
    except OSError as error:
        raise SegmentError(f"{path}: cannot be read ({error})") from error
    except DamagedFileError as error:
        raise DamagedSegmentError(str(error)) from error
    digests, lengths = tensors.pop("digests"), tensors.pop("lengths")
    if digests.shape != (len(lengths), DIGEST_BYTES):
        raise DamagedSegmentError(f"{path}: its digests have shape {digests.shape}")
    failures = tuple(Failure(d, Reason(reason), detail) for d, reason, detail in json.loads(metadata["failures"]))
    return Segment(digests, lengths, tensors, metadata["precision"], failures)
