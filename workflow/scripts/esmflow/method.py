"""The fingerprint: the digest of everything that changes a number. Embeddings of different fingerprints never mix."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, TypeVar

from esmflow.arrays import Outputs

if TYPE_CHECKING:
    import numpy as np

# Raised by hand when the arithmetic of an engine, or the normalisation of sequences, changes.
METHOD_VERSION = 1


Residues = TypeVar("Residues", int, "np.ndarray")


@dataclass(frozen=True)
class LongSequences:
    """What is done with sequences of more than `max_residues`: they are truncated, or embedded in overlapping windows.

    max_residues: None where sequences are embedded whole, however long. window_overlap: residues that neighbouring
    windows share; None where there are no windows. Raises ValueError unless 0 <= window_overlap < max_residues.

    Every method takes residue counts, as a number or an array of them, and answers with the same.
    """

    max_residues: int | None = None
    window_overlap: int | None = None

    def __post_init__(self) -> None:
        if self.window_overlap is not None and not 0 <= self.window_overlap < (self.max_residues or 0):
            raise ValueError(
                f"window_overlap: {self.window_overlap} must be at least 0 and less than max_residues, "
                f"{self.max_residues}"
            )

    @classmethod
    def configured(cls, config: Mapping[str, Any]) -> LongSequences:
        """As a configuration has it. Raises ValueError for windows that are impossible."""
        policy = config["long_sequences"]
        return cls(
            config["max_residues"] if policy in ("truncate", "window") else None,
            config["window_overlap"] if policy == "window" else None,
        )

    @property
    def windows(self) -> bool:
        """Whether long sequences are embedded in windows, so that no residue is lost."""
        return self.window_overlap is not None

    @property
    def truncated_at(self) -> int | None:
        """After how many residues sequences are cut off; None where no residue is lost."""
        return None if self.windows else self.max_residues

    def is_cut(self, residues: Any) -> Any:
        """Whether a sequence is truncated or embedded in windows."""
        return residues > (math.inf if self.max_residues is None else self.max_residues)

    def embedded(self, residues: Residues) -> Residues:
        """How many residues of a sequence are embedded. What is in two windows counts once."""
        return residues if self.truncated_at is None else _at_most(residues, self.truncated_at)

    def piece_length(self, residues: Residues) -> Residues:
        """How many residues go through the model at a time: all pieces of a sequence are of one length."""
        return residues if self.max_residues is None else _at_most(residues, self.max_residues)

    def number_of_pieces(self, residues: Residues) -> Residues | int:
        """How many pieces of a sequence go through the model."""
        if self.max_residues is None or self.window_overlap is None:
            return 1
        beyond = residues - _at_most(residues, self.max_residues)
        return 1 - -beyond // (self.max_residues - self.window_overlap)

    def pieces(self, residues: int) -> list[tuple[int, int]]:
        """Where each piece of one sequence begins and ends.

        Windows of w residues with overlap o begin at 0, w - o, 2 (w - o), …; the last is moved back to end with the
        sequence.
        """
        length = self.piece_length(residues)
        if self.max_residues is None or self.window_overlap is None or residues <= length:
            return [(0, length)]
        last = residues - length
        return [(begin, begin + length) for begin in (*range(0, last, length - self.window_overlap), last)]


EMBED_WHOLE = LongSequences()
"""Every sequence whole, however long."""


def _at_most(residues: Residues, limit: int) -> Residues:
    # The array's own method: the rules import this module, in environments without NumPy.
    return min(residues, limit) if isinstance(residues, int) else residues.clip(max=limit)


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

    def holds(self, other: Fingerprint) -> bool:
        """Whether all that `other` keeps of a sequence is among what this one keeps, computed in the same way.

        It may be true of those embeddings only that were computed in fp32: see `only_fp32_is_alike`.
        """
        rows_alike = "per_residue" not in other.include or self.per_residue_precision == other.per_residue_precision
        alike = replace(
            other, layers=self.layers, include=self.include, per_residue_precision=self.per_residue_precision
        )
        if self.only_fp32_is_alike(other):
            alike = replace(alike, arithmetic=self.arithmetic)
        return self == alike and rows_alike and set(other.outputs.arrays()) <= set(self.outputs.arrays())

    def only_fp32_is_alike(self, other: Fingerprint) -> bool:
        """Whether the engine has changed between this and `other` in what it does in 16 bits."""
        return (self.arithmetic, other.arithmetic) == (_PACKED_AT_FIRST, _PACKED_NOW)

    def differences(self, other: Fingerprint) -> list[str]:
        """The keys of the configuration that differ, each with its value here and in `other`."""
        differ = {}
        for name in (field.name for field in fields(self)):
            here, there = getattr(self, name), getattr(other, name)
            if here != there:
                differ[name] = here, there
        if "engine" in differ:
            # Each has its own.
            differ.pop("arithmetic", None)
        if "long_sequences" in differ or "include" in differ:
            # Without a value where they do not matter.
            differ = {name: values for name, values in differ.items() if None not in values}
        return [
            f"{_KEYS.get(name, name)} ({_shown(here)} here, {_shown(there)} there)"
            for name, (here, there) in differ.items()
        ]

    def of_variants(self, kind: str) -> Fingerprint:
        """The fingerprint of what is computed for variants in the same way: one kind, of sequences that are cut before.

        kind: one of `variants.copies.KINDS`.
        """
        kept = replace(self, layers=(), include=(kind,), per_residue_precision=None)
        return replace(kept, long_sequences="whole", max_residues=None, window_overlap=None)

    @property
    def outputs(self) -> Outputs:
        """What is computed for every sequence."""
        return Outputs(self.layers, self.include, self.per_residue_precision or "fp32")

    @property
    def long(self) -> LongSequences:
        """What is done with long sequences."""
        return LongSequences(self.max_residues, self.window_overlap)


_KEYS = {"checkpoint": "model", "arithmetic": "the engine's arithmetic", "method_version": "esmflow's method"}


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    return value[:8] if isinstance(value, str) and len(value) == 32 else str(value)


_GELU = "GELU by tanh in bf16 and fp16 on a GPU, else by erf"
_PACKED_AT_FIRST = f"packs without padding; rotary positions in fp32; {_GELU}; auto is fp16"
_PACKED_NOW = (
    f"packs without padding; rotary positions in fp32; {_GELU}; "
    "rotated queries and keys in fp16 where products are bf16; auto is bf16"
)
_EIGHT_BITS = (
    "packs without padding; rotary positions in fp32; GELU by tanh; layers' matrix products in 8 bits by row, rotated "
    "in blocks of 64, means of typical proteins apart; the rest in fp16 on a GPU, else in fp32"
)
_REFERENCE = "fair-esm 2.0.0 on padded batches, under autocast in bf16 and fp16; rotary positions in fp32; auto is bf16"
ARITHMETIC = {
    # What is computed in fp32 and fp16 has not changed since these words were true, and neither have they.
    ("packed", "fp32"): _PACKED_AT_FIRST,
    ("packed", "fp16"): _PACKED_AT_FIRST,
    ("packed", "bf16"): _PACKED_NOW,
    ("packed", "auto"): _PACKED_NOW,
    ("packed", "int8"): _EIGHT_BITS,
    **dict.fromkeys((("reference", precision) for precision in ("auto", "bf16", "fp16", "fp32")), _REFERENCE),
}
"""How each engine computes in each precision, in words: part of the fingerprint, so a change of method changes it."""


def of_family(name: str, arithmetic: str) -> str:
    """An engine's words for another family than ESM-2, of which they spoke when there was nothing else."""
    return arithmetic if name == "ESM-2" else f"{name}: {arithmetic}"


def computing_method(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a validated configuration that changes numbers, and the method itself.

    All of it goes into the fingerprint. A rule that has it as a parameter runs again when any of it changes.
    """
    # Without `gaps`: a digest is of what that leaves of a sequence, so a vector is never found under another one.
    long = LongSequences.configured(config)
    return {
        "layers": config["layers"],
        "include": config["include"],
        "per_residue_precision": config["per_residue_precision"],
        "engine": config["engine"],
        "arithmetic": ARITHMETIC[config["engine"], config["precision"]],
        "precision": config["precision"],
        "long_sequences": config["long_sequences"],
        "max_residues": long.max_residues,
        "window_overlap": long.window_overlap,
        "invalid_residues": config["invalid_residues"],
        "method_version": METHOD_VERSION,
    }
