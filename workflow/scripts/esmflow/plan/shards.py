"""Shards: FASTA files of unique sequences whose ids are digests. Written by planning, read by embed jobs."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from esmflow.errors import EsmflowError
from esmflow.files import atomic_path
from esmflow.inputs.residues import DIGEST_BYTES, sequence_digest
from esmflow.method import Fingerprint


class ShardError(EsmflowError):
    """A shard that is not as it was written. The message names the file and says what to do."""

    mendable = False


def write_shard(path: Path, sequences: Iterable[tuple[bytes, str]]) -> None:
    """Writes unique sequences as FASTA, their hexadecimal digests as ids."""
    with atomic_path(path) as temporary, open(temporary, "w", encoding="ascii") as handle:
        handle.writelines(f">{digest.hex()}\n{sequence}\n" for digest, sequence in sequences)


def add_to_shard(path: Path, digests: np.ndarray, sequences: pa.LargeBinaryArray) -> None:
    """Adds to a shard what `write_shard` would write, from columns: digests, uint8 `[N, 16]`, and their residues.

    A shard that is not there is begun. Not flushed to disk: a plan of thousands of shards would wait for the disk
    thousands of times, and `read_shard` notices what a power failure cut.
    """
    hexadecimal = digests.tobytes().hex().encode()
    width = 2 * DIGEST_BYTES
    headers = np.empty((len(digests), 1 + width), np.uint8)
    headers[:, 0] = ord(">")
    headers[:, 1:] = np.frombuffer(hexadecimal, np.uint8).reshape(-1, width)
    offsets = np.arange(0, headers.size + 1, 1 + width, dtype=np.int64)
    column = pa.LargeBinaryArray.from_buffers(
        pa.large_binary(), len(digests), [None, pa.py_buffer(offsets), pa.py_buffer(headers)]
    )
    binary = pa.large_binary()
    lines = pc.binary_join_element_wise(column, sequences, pa.scalar(b"", binary), pa.scalar(b"\n", binary))
    with open(path, "ab") as handle:
        handle.write(memoryview(lines.buffers()[2])[: lines.nbytes] if len(lines) else b"")


def read_shard(path: str | os.PathLike[str]) -> Iterator[tuple[bytes, str]]:
    """Reads what `write_shard` wrote: digest and residues. Raises ShardError when they do not belong together."""
    with open(path, encoding="ascii") as handle:
        for header in handle:
            sequence = next(handle, "").strip()
            if header[1:].strip() != sequence_digest(sequence).hex():
                raise ShardError(f"{path}: damaged at {header.strip()[:40]}; run again with --forcerun plan")
            yield bytes.fromhex(header[1:].strip()), sequence


EMBEDDED = "shard"
"""What shards of sequences to embed are called; those for variants are called by what is computed of them."""


def list_shards(folder: str | os.PathLike[str], of: str = "*") -> list[Path]:
    """The shards of a group, in order, or those that are called `of`; none for an empty group."""
    return sorted(Path(folder).glob(f"{of}-*.fasta"), key=lambda path: (_called(path) != EMBEDDED, path.name))


def shard_fingerprint(shard: str | os.PathLike[str], run: Fingerprint) -> Fingerprint:
    """Under which fingerprint the results of a shard are stored: that of the run, or one for variants."""
    return run if _called(shard) == EMBEDDED else run.of_variants(_called(shard))


def _called(shard: str | os.PathLike[str]) -> str:
    return Path(shard).name.rpartition("-")[0]


def shard_name(digests: Iterable[bytes]) -> str:
    """The name of the segment that holds these sequences: a digest of theirs, so equal shards are one segment."""
    hasher = hashlib.blake2b(digest_size=16)
    for digest in sorted(digests):
        hasher.update(digest)
    return hasher.hexdigest()
