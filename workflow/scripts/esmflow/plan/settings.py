"""What the plan step needs to know."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from esmflow.inputs.residues import ResiduePolicy
from esmflow.inputs.sheet import InputFile
from esmflow.method import Fingerprint
from esmflow.plan.cost import CostModel
from esmflow.plan.disk_forecast import WrittenFormat


@dataclass(frozen=True, kw_only=True)
class PlanSettings:
    """What to plan, and how.

    records, candidates, plan: files to write: the record table, the sequences that the certificate may compute again
    (some of all, and some of those that are planned), and `plan.json`. groups: a folder to write for each shard group.
    work: see `Plan`. least_cost: of a group's share if there are several; where there is less to do, groups stay empty.
    id_rule: what records are called, see `inputs.ids`.
    assignment: `balanced` (each window of sequences is dealt, dearest first, to the group with the least cost so far)
    or `round_robin` (whole files, in order). shard_residues: in one shard at most, unless one sequence has more.
    workers: of one job, which share a group: it is cut into shards small enough to keep all of them busy to the end.
    processes: how many work at once where there is enough to read.
    formats, pooled_precision: what the run will write. disk_check: whether the disks must have room for it.
    most_bytes_of_maps: what attention maps may take.
    number: see `plan_number`. variants: the table of variants, and a file to write that says which sequence each row is
    of; None without one.
    """

    inputs: Sequence[InputFile]
    records: str
    candidates: str
    plan: str
    groups: Sequence[str]
    work: float
    least_cost: float
    checkpoint: str
    fingerprint: Fingerprint
    store: str
    cost_model: CostModel
    policy: ResiduePolicy
    id_rule: str
    assignment: str
    shard_residues: int
    workers: int
    processes: int
    formats: Sequence[WrittenFormat]
    pooled_precision: str
    most_bytes_of_maps: float
    disk_check: bool
    number: int
    variants: tuple[str, str] | None = None
