"""Shards: FASTA files of unique sequences whose ids are digests. Written by planning, read by embed jobs."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from esmflow.files import atomic_path


def write_shard(path: Path, sequences: Iterable[tuple[bytes, str]]) -> None:
    """Writes unique sequences as FASTA, their hexadecimal digests as ids."""
    with atomic_path(path) as temporary, open(temporary, "w", encoding="ascii") as handle:
        handle.writelines(f">{digest.hex()}\n{sequence}\n" for digest, sequence in sequences)


def read_shard(path: str | os.PathLike[str]) -> Iterator[tuple[bytes, str]]:
    """Reads what `write_shard` wrote: digest and residues."""
    with open(path, encoding="ascii") as handle:
        for header in handle:
            yield bytes.fromhex(header[1:].strip()), next(handle).strip()


def list_shards(folder: str | os.PathLike[str]) -> list[Path]:
    """The shards of a group, in order; none for an empty group."""
    return sorted(Path(folder).glob("shard-*.fasta"))


def shard_name(digests: Iterable[bytes]) -> str:
    """The name of the segment that holds these sequences: a digest of theirs, so equal shards are one segment."""
    hasher = hashlib.blake2b(digest_size=16)
    for digest in sorted(digests):
        hasher.update(digest)
    return hasher.hexdigest()
