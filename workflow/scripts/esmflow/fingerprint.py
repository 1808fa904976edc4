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

    checkpoint: the converted checkpoint's content digest. precision: as configured, `auto` being the card's own best.
    long_sequences, max_residues: what is done with long sequences; max_residues is None where it does not matter.
    """

    checkpoint: str
    layers: tuple[int, ...]
    include: tuple[str, ...]
    engine: str
    precision: str
    long_sequences: str
    max_residues: int | None
    invalid_residues: str
    method_version: int = METHOD_VERSION

    def digest(self) -> str:
        """32 hexadecimal characters, equal for equal fields only."""
        canonical = json.dumps(asdict(self), sort_keys=True)
        return hashlib.blake2b(canonical.encode(), digest_size=16).hexdigest()
