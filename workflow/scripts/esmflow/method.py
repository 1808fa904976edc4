"""The fingerprint: the digest of everything that changes a number. Embeddings of different fingerprints never mix."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

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


ARITHMETIC = {
    "packed": "packs without padding; rotary positions in fp32; GELU by tanh in bf16 and fp16 on a GPU, else by erf; "
    "auto is fp16",
    "reference": "fair-esm 2.0.0 on padded batches, under autocast in bf16 and fp16; rotary positions in fp32; "
    "auto is bf16",
}
"""How each engine computes, in words: part of the fingerprint, so a change of method is a change of fingerprint."""


def computing_method(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a validated configuration that changes numbers, and the method itself.

    All of it goes into the fingerprint. A rule that has it as a parameter runs again when any of it changes.
    """
    # Without `gaps`: a digest is of what that leaves of a sequence, so a vector is never found under another one.
    cut = config["long_sequences"] in ("truncate", "window")
    return {
        "layers": config["layers"],
        "include": config["include"],
        "per_residue_precision": config["per_residue_precision"],
        "engine": config["engine"],
        "arithmetic": ARITHMETIC[config["engine"]],
        "precision": config["precision"],
        "long_sequences": config["long_sequences"],
        "max_residues": config["max_residues"] if cut else None,
        "window_overlap": config["window_overlap"] if config["long_sequences"] == "window" else None,
        "invalid_residues": config["invalid_residues"],
        "method_version": METHOD_VERSION,
    }
