"""The fingerprint: the digest of everything that changes a number. Embeddings of different fingerprints never mix."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass

# Raised by hand when the arithmetic of an engine, or the normalisation of sequences, changes.
METHOD_VERSION = 1


@dataclass(frozen=True)
class Fingerprint:
    """What an embedding depends on besides its sequence.

    checkpoint: the converted checkpoint's content digest. arithmetic: how the engine computes, in words.
    precision: as configured, `auto` being the card's own best.
    per_residue_precision, max_residues, window_overlap: None where they do not matter.
    """

    checkpoint: str
    layers: tuple[int, ...]
    include: tuple[str, ...]
    per_residue_precision: str | None
    engine: str
    arithmetic: str
    precision: str
    long_sequences: str
    max_residues: int | None
    window_overlap: int | None
    invalid_residues: str
    method_version: int = METHOD_VERSION

    def digest(self) -> str:
        """32 hexadecimal characters, equal for equal fields only."""
        canonical = json.dumps(asdict(self), sort_keys=True)
        return hashlib.blake2b(canonical.encode(), digest_size=16).hexdigest()
