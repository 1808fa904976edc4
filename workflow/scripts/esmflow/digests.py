"""The digest by which a sequence is known everywhere."""

from __future__ import annotations

import hashlib

DIGEST_BYTES = 16


def sequence_digest(sequence: str) -> bytes:
    """The 16-byte BLAKE2b digest of normalised residues."""
    return hashlib.blake2b(sequence.encode("ascii"), digest_size=DIGEST_BYTES).digest()
