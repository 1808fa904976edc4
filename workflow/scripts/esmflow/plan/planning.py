"""Plan a run: read every input once, deduplicate, and deal the unique sequences to shard groups of equal cost."""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow.parquet as pq

from esmflow.arrays import MASKED_LOGITS
from esmflow.checkpoint.file import CheckpointError, check_unchanged
from esmflow.files import atomic_path, file_stamp
from esmflow.inputs.readers import annotation_names, input_tasks
from esmflow.inputs.records import RecordBlock
from esmflow.inputs.residues import DIGEST_BYTES, sequence_digests
from esmflow.inputs.sheet import InputFile
from esmflow.logs import tell
from esmflow.method import EMBED_WHOLE
from esmflow.plan.cost import CostModel, Workload
from esmflow.plan.dealing import Dealer
from esmflow.plan.disk_forecast import check_disks, check_maps, forecast, sentence
from esmflow.plan.freshness import PlanNote, input_stamps, note_path
from esmflow.plan.read_ahead import run_in_order
from esmflow.plan.record_table import RecordTable
from esmflow.plan.run_plan import GroupPlan, Plan, PlannedVariants
from esmflow.plan.settings import PlanSettings
from esmflow.plan.shards import EMBEDDED, list_shards, read_shard
from esmflow.plan.spot_check import Candidates, write_candidates
from esmflow.store.lookup import StoredSequences, stored_otherwise
from esmflow.store.segments import Store
from esmflow.text import plural, record_name
from esmflow.variants.copies import KINDS
from esmflow.variants.table import RecordSearch, places_by_sequence, read_variants

log = logging.getLogger(__name__)

# Sequences wait in memory until this many residues have been read; each such window is dealt as a whole.
WINDOW_RESIDUES = 200_000_000
# With several workers in a job: enough that one slow shard does not leave the others idle at the end.
SHARDS_PER_WORKER = 4

# So many are scored together.
VARIANTS_PER_GROUP = 2048

# Rejected records that are written to the log; the table has them all.
_REJECTIONS_LOGGED = 1000

# Of each group.
_LOOKED_UP = 1000

# Less than this is read sooner than a process is started.
BYTES_PER_PROCESS = 200_000_000

File = TypeVar("File")


def assign_files_round_robin(files: Sequence[File], groups: int) -> list[list[File]]:
    """Deals whole files to groups in order: `[a, b, c, d, e]` over 2 gives `[[a, c, e], [b, d]]`."""
    if groups < 1:
        raise ValueError(f"groups: {groups} is not a positive number")
    return [list(files[g::groups]) for g in range(groups)]


def plan(settings: PlanSettings) -> Plan:
    """Plans a run: deals its inputs, forecasts what it will write, and writes `plan.json` and the note beside it.

    Raises what `deal_inputs` does, CheckpointError when the checkpoint is not the converted one or has no head for the
    variants, and DiskError when the disks have too little room.
    """
    inputs = input_stamps([*(file.path for file in settings.inputs), *(settings.variants or ())[:1]])
    # Read in full here, once, so that no GPU job has to as long as nobody touches the file.
    checkpoint_stamp = file_stamp(settings.checkpoint)
    check_unchanged(settings.checkpoint, settings.fingerprint.checkpoint, stamp=None)
    store = Store(settings.store, settings.fingerprint)
    if settings.variants and not settings.cost_model.dimensions.has_lm_head:
        raise CheckpointError(
            "variants: the checkpoint has no language model head, which scores are made of; use one that has, or leave "
            "variants out"
        )
    dealt = deal_inputs(settings, StoredSequences(store))
    expected = forecast(
        dealt, settings.fingerprint, settings.cost_model.dimensions, settings.formats, settings.pooled_precision
    )
    tell(sentence(expected))
    check_maps(dealt, settings.fingerprint, settings.cost_model.dimensions, settings.most_bytes_of_maps)
    if settings.disk_check:
        check_disks(expected, settings.store, Path(settings.plan).parents[1])
    _tell_what_differs(store, [digest for folder in settings.groups for digest in _first_digests(folder)])
    planned = replace(dealt, checkpoint_stamp=checkpoint_stamp, disk_forecast=expected)
    planned.write(settings.plan)
    PlanNote(settings.number, planned.fingerprint, planned.stored_segments, inputs).write(note_path(settings.plan))
    return planned


def deal_inputs(settings: PlanSettings, stored: StoredSequences | None = None) -> Plan:
    """Reads every input once, streaming, and writes one row for each record and the shards of each group.

    The sequences that the store holds already (`stored`) are not planned. The plan that is returned lacks only what has
    to do with the checkpoint and the disks. Raises OSError when an input does not exist or the disk is full.
    """
    truncated_at = settings.cost_model.long.truncated_at
    valid, to_embed = Workload(truncated_at), Workload(truncated_at)
    records = rejected = id_bytes = text_bytes = 0
    candidates = Candidates()
    search = RecordSearch(read_variants(settings.variants[0])) if settings.variants else None
    round_robin = settings.assignment == "round_robin"
    group_of_file = {
        file.path: group
        for group, files in enumerate(assign_files_round_robin(settings.inputs, len(settings.groups)))
        for file in files
    }
    dealer = _dealer(settings, settings.cost_model, stored, to_embed, EMBEDDED)
    with RecordTable(settings.records, annotation_names(settings.inputs)) as table, dealer:
        tasks = (
            (file, task)
            for file in settings.inputs
            for task in input_tasks(file.path, settings.policy, settings.id_rule)
        )
        for file, block in run_in_order(tasks, _useful_processes(settings.inputs, settings.processes)):
            lengths = block.lengths[block.valid()]
            table.add_block(file.sample, block, dict(file.annotations))
            _log_rejected(block, rejected)
            records += len(block)
            rejected += len(block.reasons)
            valid.add(lengths)
            id_bytes += block.ids.nbytes
            texts = (block.ids, block.descriptions, *block.annotations.values())
            text_bytes += sum(column.nbytes for column in texts)
            text_bytes += len(block) * (len(file.path) + len(file.sample))
            candidates.offer_block(block.digests, block.residues, lengths)
            if search:
                search.take(file.sample, block)
            dealer.take(block.digests, block.residues, lengths, group_of_file[file.path] if round_robin else None)
    variants, groups = _deal_variants(search, settings) if search else (PlannedVariants(), [])
    write_candidates(Path(settings.candidates), candidates, dealer.candidates)
    log.info(
        "%d records: %d rejected, %d repeat a sequence, %d are in the store, %d sequences to embed in %d of %d groups",
        *(records, rejected, dealer.duplicates, dealer.stored, to_embed.sequences),
        *(sum(group.sequences > 0 for group in dealer.groups), len(dealer.groups)),
    )
    return Plan(
        fingerprint=settings.fingerprint.digest(),
        records=records,
        rejected=rejected,
        duplicates=dealer.duplicates,
        stored=dealer.stored,
        stored_segments=tuple(sorted(dealer.stored_segments)),
        groups=tuple(sum(of_group, GroupPlan()) for of_group in zip(dealer.groups, *groups, strict=True)),
        work=settings.work,
        valid=valid,
        to_embed=to_embed,
        id_bytes=id_bytes,
        text_bytes=text_bytes,
        variants=variants,
    )


def _dealer(
    settings: PlanSettings, cost: CostModel, stored: StoredSequences | None, to_embed: Workload, called: str
) -> Dealer:
    return Dealer(
        [Path(folder) for folder in settings.groups],
        cost.cost,
        least_cost=settings.least_cost,
        shard_residues=settings.shard_residues,
        fewest_shards=settings.workers * SHARDS_PER_WORKER if settings.workers > 1 else 1,
        window_residues=WINDOW_RESIDUES,
        stored=stored,
        to_embed=to_embed,
        called=called,
    )


def _deal_variants(search: RecordSearch, settings: PlanSettings) -> tuple[PlannedVariants, list[list[GroupPlan]]]:
    """Writes which sequence each variant is of, and deals what has to be computed for them.

    A kind has shards of its own, which go through the model as those of sequences to embed do.
    """
    assert settings.variants
    rows = search.planned()
    with atomic_path(settings.variants[1]) as temporary:
        pq.write_table(rows, temporary, compression="zstd", row_group_size=VARIANTS_PER_GROUP)
    places = places_by_sequence(rows, settings.fingerprint.long.max_residues)
    cost = replace(settings.cost_model, long=EMBED_WHOLE)
    groups, work, stored = [], {}, {}
    for kind in KINDS:
        work[kind] = Workload()
        store = Store(settings.store, settings.fingerprint.of_variants(kind))
        with _dealer(settings, cost, StoredSequences(store), work[kind], kind) as dealer:
            for of_sequence in places.values():
                texts = [text.encode() for text in dict.fromkeys(place.text(kind) for place in of_sequence)]
                lengths = np.array([len(text) for text in texts], np.int64)
                residues = b"".join(texts)
                dealer.take(sequence_digests(residues, lengths), residues, lengths, None)
        groups.append(dealer.groups)
        stored[kind] = dealer.stored
    planned = PlannedVariants(
        rows=len(rows),
        unscored=len(rows) - rows["reason"].null_count,
        proteins=len(places),
        places=sum(map(len, places.values())),
        stored=stored[MASKED_LOGITS],
        work=work,
    )
    tell(
        f"variants: {planned.rows:,}, of which {planned.unscored:,} cannot be scored; "
        f"{plural(planned.places, 'place')} in {plural(planned.proteins, 'protein')}; "
        f"masked copies: {work[MASKED_LOGITS].sequences:,} to compute, {planned.stored:,} in the store"
    )
    return planned, groups


def _first_digests(folder: str) -> Iterator[bytes]:
    """Of the sequences that a group was dealt, as many as tell whether the store has them under other settings."""
    for shard in list_shards(folder, EMBEDDED)[:1]:
        for digest, _ in itertools.islice(read_shard(shard), _LOOKED_UP):
            yield digest


def _tell_what_differs(store: Store, digests: list[bytes]) -> None:
    if not digests:
        return
    found = stored_otherwise(store, np.frombuffer(b"".join(digests), np.uint8).reshape(-1, DIGEST_BYTES))
    if found:
        tell(
            f"the store has {found[0]:,} of the first {len(digests):,} sequences to embed under other settings; "
            f"what differs: {'; '.join(found[1])}"
        )


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
        where = record_name(record.file, record.position, record.id)
        log.info("rejected %s: %s: %s", where, record.reason, record.detail)
    if 0 < room < len(block.reasons):
        log.info("further rejected records are not logged here; the manifest has them all")
