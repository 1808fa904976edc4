"""Plan a run: read every input once, deduplicate, and deal the unique sequences to shard groups of equal cost."""

from __future__ import annotations

import heapq
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np

from esmflow.checkpoints import ModelDimensions
from esmflow.digests import sequence_digest
from esmflow.fasta import Record, ResiduePolicy, read_records
from esmflow.records import RecordTable
from esmflow.shards import list_shards, write_shard

log = logging.getLogger(__name__)

# Sequences wait in memory until this many residues have been read; each such window is dealt as a whole.
WINDOW_RESIDUES = 200_000_000

File = TypeVar("File")


@dataclass(frozen=True)
class InputFile:
    """One FASTA file of the sample sheet."""

    sample: str
    path: str


@dataclass(frozen=True)
class CostModel:
    """Estimated work of one sequence, in floating-point operations.

    For t tokens, L layers of width D: the matrix products take 24·D²·t in each layer (q, k, v and output projection
    8·D²·t, feed-forward 16·D²·t) and attention 4·D·t² (scores and weighted values), counting a multiply-add as two.
    """

    dimensions: ModelDimensions
    max_residues: int | None = None

    def cost(self, residues: int) -> float:
        """Operations for a sequence of this many residues, after truncation to `max_residues`, with cls and eos."""
        if self.max_residues is not None:
            residues = min(residues, self.max_residues)
        tokens = residues + 2
        width = self.dimensions.hidden
        return self.dimensions.layers * (24.0 * width * width * tokens + 4.0 * width * tokens * tokens)


@dataclass
class GroupPlan:
    """What one shard group was dealt."""

    shards: int = 0
    sequences: int = 0
    residues: int = 0
    cost: float = 0.0


@dataclass
class PlanSummary:
    """What planning found: counts of records and the groups' shares."""

    records: int = 0
    rejected: int = 0
    duplicates: int = 0
    held: int = 0
    held_segments: list[str] = field(default_factory=list)
    groups: list[GroupPlan] = field(default_factory=list)


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
    held: dict[str, np.ndarray] | None = None,
) -> PlanSummary:
    """Reads every input once, streaming, and writes one row for each record and the shards of each group.

    `held` gives the digests (uint8 `[N, 16]`) that the store's segments hold already: those sequences are not planned.
    `assignment` is `balanced` (each window of sequences is dealt, dearest first, to the group with the least cost so
    far) or `round_robin` (whole files, in order). Raises OSError when an input does not exist or the disk is full.
    """
    summary = PlanSummary(groups=[GroupPlan() for _ in group_folders])
    dealer = _Dealer(summary.groups, [Path(folder) for folder in group_folders], cost_model, shard_residues)
    held_in = {row.tobytes(): name for name, digests in (held or {}).items() for row in digests}
    used_segments: set[str] = set()
    seen: set[bytes] = set()
    group_of_file = {
        file.path: group
        for group, files in enumerate(assign_files_round_robin(inputs, len(group_folders)))
        for file in files
    }
    with RecordTable(records_path) as table:
        for file in inputs:
            group = group_of_file[file.path] if assignment == "round_robin" else None
            for record in read_records(file.path, policy):
                summary.records += 1
                digest = None if record.reason else sequence_digest(record.sequence)
                table.add(file.sample, record, digest)
                if digest is None:
                    summary.rejected += 1
                    log.info("rejected %s", _describe(record))
                elif digest in seen:
                    summary.duplicates += 1
                elif digest in held_in:
                    seen.add(digest)
                    summary.held += 1
                    used_segments.add(held_in[digest])
                else:
                    seen.add(digest)
                    dealer.take(digest, record.sequence, group)
    dealer.deal()
    summary.held_segments = sorted(used_segments)
    unique = sum(group.sequences for group in summary.groups)
    log.info(
        "%d records: %d rejected, %d repeat a sequence, %d are in the store, %d sequences to embed in %d groups",
        *(summary.records, summary.rejected, summary.duplicates, summary.held, unique, len(summary.groups)),
    )
    return summary


def _describe(record: Record) -> str:
    return f"{record.file}, record {record.position} ({record.id or 'no id'}): {record.reason}: {record.detail}"


class _Dealer:
    """Holds a window of sequences and deals it to groups and shards when it is full."""

    def __init__(
        self, groups: list[GroupPlan], folders: list[Path], cost_model: CostModel, shard_residues: int
    ) -> None:
        self._groups = groups
        self._folders = folders
        self._cost = cost_model.cost
        self._shard_residues = shard_residues
        # A group's share of a window should fill at least one shard, however many groups there are.
        self._window_residues = max(WINDOW_RESIDUES, shard_residues * len(groups))
        self._window: list[tuple[bytes, str, int | None]] = []
        self._residues = 0
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
            for left_over in list_shards(folder):
                left_over.unlink()

    def take(self, digest: bytes, sequence: str, group: int | None) -> None:
        """Adds a sequence; `group` is set when the assignment is fixed."""
        self._window.append((digest, sequence, group))
        self._residues += len(sequence)
        if self._residues >= self._window_residues:
            self.deal()

    def deal(self) -> None:
        """Deals the window, dearest sequences first, each to the group with the least cost so far."""
        # The digest settles ties, so a plan does not depend on the order of the input.
        self._window.sort(key=lambda item: (-len(item[1]), item[0]))
        shares: list[list[tuple[bytes, str]]] = [[] for _ in self._groups]
        loads = [(group.cost, number) for number, group in enumerate(self._groups)]
        heapq.heapify(loads)
        for digest, sequence, fixed in self._window:
            cost = self._cost(len(sequence))
            if fixed is None:
                load, number = loads[0]
                heapq.heapreplace(loads, (load + cost, number))
            else:
                number = fixed
            group = self._groups[number]
            group.cost += cost
            group.sequences += 1
            group.residues += len(sequence)
            shares[number].append((digest, sequence))
        self._window.clear()
        self._residues = 0
        for number, share in enumerate(shares):
            self._write_shards(number, share)

    def _write_shards(self, number: int, share: list[tuple[bytes, str]]) -> None:
        """Cuts a group's share into shards that each see the same mix of lengths."""
        if not share:
            return
        shards = -(-sum(len(sequence) for _, sequence in share) // self._shard_residues)
        for first in range(min(shards, len(share))):
            group = self._groups[number]
            write_shard(self._folders[number] / f"shard-{group.shards:05d}.fasta", share[first::shards])
            group.shards += 1
