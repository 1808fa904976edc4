"""Plan a run: read every input once, deduplicate, and deal the unique sequences to shard groups of equal cost."""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from esmflow.inputs.readers import input_tasks
from esmflow.inputs.records import RecordBlock
from esmflow.inputs.residues import ResiduePolicy
from esmflow.inputs.sheet import InputFile
from esmflow.plan.cost import CostModel, Workload
from esmflow.plan.dealing import Dealer
from esmflow.plan.read_ahead import run_in_order
from esmflow.plan.record_table import RecordTable
from esmflow.plan.run_plan import GroupPlan
from esmflow.plan.spot_check import Candidates, write_candidates
from esmflow.store.lookup import StoredSequences

log = logging.getLogger(__name__)

# Sequences wait in memory until this many residues have been read; each such window is dealt as a whole.
WINDOW_RESIDUES = 200_000_000
# With several workers in a job: enough that one slow shard does not leave the others idle at the end.
SHARDS_PER_WORKER = 4

# Rejected records that are written to the log; the table has them all.
_REJECTIONS_LOGGED = 1000

# Less than this is read sooner than a process is started.
BYTES_PER_PROCESS = 200_000_000

File = TypeVar("File")


@dataclass
class PlanSummary:
    """What planning found: counts of records and the groups' shares.

    valid: the records that are not rejected; to_embed: the sequences that have to be computed. id_bytes, text_bytes: of
    all records' ids, and of all their texts: id, description, file and sample.
    """

    records: int = 0
    rejected: int = 0
    duplicates: int = 0
    held: int = 0
    held_segments: list[str] = field(default_factory=list)
    groups: list[GroupPlan] = field(default_factory=list)
    valid: Workload = field(default_factory=Workload)
    to_embed: Workload = field(default_factory=Workload)
    id_bytes: int = 0
    text_bytes: int = 0


def assign_files_round_robin(files: Sequence[File], groups: int) -> list[list[File]]:
    """Deals whole files to groups in order: `[a, b, c, d, e]` over 2 gives `[[a, c, e], [b, d]]`."""
    if groups < 1:
        raise ValueError(f"groups: {groups} is not a positive number")
    return [list(files[g::groups]) for g in range(groups)]


def plan(
    inputs: Sequence[InputFile],
    records_path: str | os.PathLike[str],
    group_folders: Sequence[str | os.PathLike[str]],
    *,
    cost_model: CostModel,
    policy: ResiduePolicy,
    assignment: str = "balanced",
    shard_residues: int = 1_000_000,
    workers: int = 1,
    stored: StoredSequences | None = None,
    candidates_path: str | os.PathLike[str] | None = None,
    processes: int = 1,
) -> PlanSummary:
    """Reads every input once, streaming, and writes one row for each record and the shards of each group.

    `workers` of one job share a group: it is cut into shards small enough to keep all of them busy to the end.
    `processes` work at once where there is enough to read.
    The sequences that the store has already (`stored`) are not planned.
    `assignment` is `balanced` (each window of sequences is dealt, dearest first, to the group with the least cost so
    far) or `round_robin` (whole files, in order). `candidates_path` is where the sequences go that the certificate may
    compute again: some of all, and some of those that are planned. Raises OSError when an input does not exist or the
    disk is full.
    """
    truncated_at = cost_model.long.truncated_at
    summary = PlanSummary(valid=Workload(truncated_at), to_embed=Workload(truncated_at))
    candidates = Candidates()
    group_of_file = {
        file.path: group
        for group, files in enumerate(assign_files_round_robin(inputs, len(group_folders)))
        for file in files
    }
    dealer = Dealer(
        [Path(folder) for folder in group_folders],
        cost_model.cost,
        shard_residues=shard_residues,
        fewest_shards=workers * SHARDS_PER_WORKER if workers > 1 else 1,
        window_residues=WINDOW_RESIDUES,
        stored=stored,
        to_embed=summary.to_embed,
    )
    with RecordTable(records_path) as table, dealer:
        tasks = ((file, task) for file in inputs for task in input_tasks(file.path, policy))
        for file, block in run_in_order(tasks, _useful_processes(inputs, processes)):
            lengths = block.lengths[block.valid()]
            table.add_block(file.sample, block)
            _log_rejected(block, summary.rejected)
            summary.records += len(block)
            summary.rejected += len(block.reasons)
            summary.valid.add(lengths)
            texts = block.ids.nbytes + block.descriptions.nbytes
            summary.id_bytes += block.ids.nbytes
            summary.text_bytes += texts + len(block) * (len(file.path) + len(file.sample))
            group = group_of_file[file.path] if assignment == "round_robin" else None
            candidates.offer_block(block.digests, block.residues, lengths)
            dealer.take(block.digests, block.residues, lengths, group)
    if candidates_path is not None:
        write_candidates(Path(candidates_path), candidates, dealer.candidates)
    summary.duplicates, summary.held = dealer.duplicates, dealer.stored
    summary.held_segments, summary.groups = sorted(dealer.stored_segments), dealer.groups
    unique = sum(group.sequences for group in summary.groups)
    log.info(
        "%d records: %d rejected, %d repeat a sequence, %d are in the store, %d sequences to embed in %d groups",
        *(summary.records, summary.rejected, summary.duplicates, summary.held, unique, len(summary.groups)),
    )
    return summary


def _useful_processes(inputs: Sequence[InputFile], processes: int) -> int:
    """How many read: one of all, which deals and writes, does not read unless it is the only one.

    No more than have enough to read, since starting one takes a while.
    """
    size = sum(os.path.getsize(file.path) for file in inputs)
    return max(1, min(processes - 1, size // BYTES_PER_PROCESS))


def _log_rejected(block: RecordBlock, before: int) -> None:
    """Logs the rejected records of a block, of which `before` others have been rejected before it."""
    room = max(0, _REJECTIONS_LOGGED - before)
    for record in itertools.islice(block.rejected(), room):
        where = f"{record.file}, record {record.position} ({record.id or 'no id'})"
        log.info("rejected %s: %s: %s", where, record.reason, record.detail)
    if 0 < room < len(block.reasons):
        log.info("further rejected records are not logged here; the manifest has them all")
