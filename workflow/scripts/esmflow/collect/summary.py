"""`summary.json`: what came of a run, in figures. Needs nothing but Python."""

from __future__ import annotations

from dataclasses import dataclass, field

from esmflow.files import JsonFile


@dataclass(frozen=True, kw_only=True)
class Summary(JsonFile):
    """What came of a run's records, and how fast.

    reasons: records without an embedding, by why. duplicates: records that share the embedding of an equal one before
    them. computed_sequences, computed_residues: what the embed jobs computed; seconds, residues_per_second: while
    embedding, see `Speed`. formats, arrays: what was written. versions: of what computes and writes numbers.
    """

    records: int
    embedded: int
    failed: int
    rejected: int
    reasons: dict[str, int] = field(default_factory=dict)
    truncated: int = 0
    windowed: int = 0
    duplicates: int = 0
    computed_sequences: int = 0
    computed_residues: int = 0
    seconds: float = 0.0
    residues_per_second: float | None = None
    seconds_with_start_up: float = 0.0
    residues_per_second_with_start_up: float | None = None
    groups_with_failures: tuple[str, ...] = ()
    formats: tuple[str, ...] = ()
    arrays: tuple[str, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class VariantSummary(JsonFile):
    """What became of the rows of a table of variants: `variants.json`. reasons: of those without a score."""

    rows: int
    scored: int
    reasons: dict[str, int] = field(default_factory=dict)

    def line(self) -> str:
        """In a few words."""
        reasons = ", ".join(f"{count:,} × {reason}" for reason, count in self.reasons.items())
        without = f", {self.rows - self.scored:,} without a score ({reasons})" if reasons else ""
        return f"{self.rows:,}: {self.scored:,} scored{without}"
