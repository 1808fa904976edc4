"""`plan.json`: what planning found and dealt, read by every step after it. Needs nothing but Python."""

from __future__ import annotations

from dataclasses import dataclass, field

from esmflow.files import JsonFile
from esmflow.plan.cost import Workload


@dataclass
class GroupPlan:
    """What one shard group was dealt. residues: those that will be embedded."""

    shards: int = 0
    sequences: int = 0
    residues: int = 0
    cost: float = 0.0

    def __add__(self, other: GroupPlan) -> GroupPlan:
        return GroupPlan(
            self.shards + other.shards,
            self.sequences + other.sequences,
            self.residues + other.residues,
            self.cost + other.cost,
        )


@dataclass(frozen=True)
class PlannedVariants:
    """What there is to compute for the variants of a run.

    rows: of the table; unscored: those that cannot be scored. proteins, places: different ones, of the others. stored:
    how many of their masked copies the store had. work: what is to be computed, by kind; see `variants.copies.KINDS`.
    """

    rows: int = 0
    unscored: int = 0
    proteins: int = 0
    places: int = 0
    stored: int = 0
    work: dict[str, Workload] = field(default_factory=dict)


@dataclass(frozen=True)
class DiskForecast:
    """Bytes that a run will write: to the store, and to the results by format, and for the tables."""

    segments: int = 0
    formats: dict[str, int] = field(default_factory=dict)
    tables: int = 0

    @property
    def results(self) -> int:
        """Everything but the segments."""
        return sum(self.formats.values()) + self.tables


@dataclass(frozen=True, kw_only=True)
class Plan(JsonFile):
    """The plan of a run.

    checkpoint_stamp: the converted checkpoint's size and time when it was read in full; see `check_unchanged`.
    stored, stored_segments: sequences that the store had, and the segments that have them. groups: what each was dealt.
    valid: the records that are not rejected; to_embed: the sequences that have to be computed. id_bytes, text_bytes: of
    all records' ids, and of all their texts: id, description, file and sample. work: operations that the number of
    groups was decided for, 0 where the configuration says it.
    """

    fingerprint: str
    checkpoint_stamp: tuple[int, ...] | None = None
    records: int
    rejected: int = 0
    duplicates: int = 0
    stored: int = field(default=0, metadata={"key": "held"})
    stored_segments: tuple[str, ...] = field(default=(), metadata={"key": "held_segments"})
    groups: tuple[GroupPlan, ...]
    work: float = 0.0
    valid: Workload = field(default_factory=Workload)
    to_embed: Workload = field(default_factory=Workload)
    id_bytes: int = 0
    text_bytes: int = 0
    variants: PlannedVariants = field(default_factory=PlannedVariants)
    disk_forecast: DiskForecast = field(default_factory=DiskForecast)
