"""Collect a run: write the formats asked for, the manifest and the failures, and check that all adds up."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from esmflow.collect.formats import FORMATS, named_after_inputs
from esmflow.collect.joining import EMBEDDED, FAILED, REJECTED, CollectError, Joined, Tally, join
from esmflow.collect.sequences import InputSequences
from esmflow.collect.streaming import VectorStream
from esmflow.collect.summary import Summary
from esmflow.collect.tables import manifest_schema, open_tables
from esmflow.collect.writers.base import Description, EmbeddingWriter
from esmflow.embedding.run_record import RunRecord, Speed
from esmflow.failures import read_failures
from esmflow.inputs.residues import ResiduePolicy
from esmflow.inputs.sheet import InputFile, output_names
from esmflow.method import Fingerprint
from esmflow.plan.freshness import write_embeddings_note
from esmflow.plan.run_plan import Plan
from esmflow.store.gather import SegmentIndex
from esmflow.store.segments import SegmentError, Store
from esmflow.text import versions
from esmflow.threads import one_ahead

log = logging.getLogger(__name__)

# What computes and writes numbers.
_PACKAGES = ("torch", "fair-esm", "numpy", "h5py")


@dataclass(frozen=True, kw_only=True)
class CollectSettings:
    """What to collect, and what to write.

    records, plan, runs, failure_lists: what earlier steps left: the record table, the plan, and each group's `run.json`
    and failure list. embeddings: a folder to write, with one folder for each array. manifest, manifest_tsv, failures,
    summary: files to write.
    note, note_number: see `written`.
    model: its name. pooled_precision: `fp32`, or `fp16` to round pooled vectors as they are written.
    gaps: what was done with them when the inputs were read.
    """

    records: str
    plan: str
    runs: Sequence[str]
    failure_lists: Sequence[str]
    embeddings: str
    manifest: str
    manifest_tsv: str
    failures: str
    summary: str
    note: str
    note_number: int
    store: str
    fingerprint: Fingerprint
    model: str
    formats: Sequence[str]
    pooled_precision: str
    gaps: str
    threads: int


def collect(settings: CollectSettings) -> Summary:
    """Writes formats, manifest and failures in the order of the input, the run's summary, and its joined log.

    Streams over the records; memory grows with the number of sequences by 28 bytes each, not with their vectors.
    Raises CollectError when a record is neither embedded nor accounted for, or has a value that fp16 cannot hold.
    """
    store, method = Store(settings.store, settings.fingerprint), settings.fingerprint
    runs = [RunRecord.read(path) for path in settings.runs]
    plan = Plan.read(settings.plan)
    names = {name for run in runs for name in run.segments}
    try:
        index = SegmentIndex(store, sorted(names.union(plan.stored_segments)), settings.threads, check=True)
    except SegmentError as error:
        raise CollectError(f"{error}. The same command again computes their sequences anew") from error
    failures = {failure.digest: failure for path in settings.failure_lists for failure in read_failures(path)}
    precision = _describe_precision(index)
    descriptions = [
        Description(array, settings.model, precision, store.fingerprint, versions(*_PACKAGES))
        for array in method.outputs.arrays()
    ]
    tally = Tally()
    records = pq.ParquetFile(settings.records)
    blocks, schema = records.iter_batches(), manifest_schema(records.schema_arrow)
    called = _name_outputs(settings.records) if named_after_inputs(settings.formats) else {}
    # What was planned was not rejected; besides that, they are read as planning read them.
    sequences = InputSequences(ResiduePolicy(method.invalid_residues, "keep", gaps=settings.gaps))
    writers = _make_writers(settings.formats, Path(settings.embeddings), descriptions)
    with (
        open_tables(settings.manifest, settings.manifest_tsv, settings.failures, schema) as write_rows,
        VectorStream.open(index, writers, sequences, half=settings.pooled_precision == "fp16") as vectors,
    ):
        for joined in one_ahead(join(block, index, failures, method.long) for block in blocks):
            tally.count(joined.table)
            write_rows(joined.table)
            for file, part in _by_file(joined.table["file"]):
                vectors.add(called.get(file, file), Joined(joined.table[part], joined.location[part]))
    tally.check(plan.records)
    summary = _summary(tally, plan, runs, settings.formats, method.outputs.names())
    summary.write(settings.summary)
    write_embeddings_note(settings.note, settings.note_number, settings.embeddings)
    return summary


def _make_writers(formats: Sequence[str], folder: Path, descriptions: Sequence[Description]) -> list[EmbeddingWriter]:
    """The writers of every format, for the outputs that it can hold."""
    writers: list[EmbeddingWriter] = []
    for each in map(FORMATS.__getitem__, formats):
        written = [description for description in descriptions if each.holds(description.array)]
        left_out = [description.array.name for description in descriptions if not each.holds(description.array)]
        if left_out:
            log.warning("%s holds %s only: without %s", each.name, ", ".join(each.kinds), ", ".join(left_out))
        writer = each.load_writer()
        if each.joins_outputs:
            writers += [writer(folder / each.name, written)] if written else []
        else:
            writers += [writer(folder / description.array.name, [description]) for description in written]
    return writers


def _describe_precision(index: SegmentIndex) -> str:
    """The precision that was used; more than one if `auto` met different cards."""
    used = sorted(set(index.precisions))
    if len(used) > 1:
        log.warning(
            "embeddings were computed in different precisions (%s): see the manifest's precision", ", ".join(used)
        )
    return "+".join(used) or "none"


def _by_file(files: pa.ChunkedArray) -> Iterator[tuple[str, slice]]:
    """The parts of a block that are of one input file each."""
    runs = pc.run_end_encode(files.combine_chunks().cast("string"))
    start = 0
    for file, end in zip(runs.values.to_pylist(), runs.run_ends.to_pylist(), strict=True):
        yield file, slice(start, end)
        start = end


def _name_outputs(records: str) -> dict[str, str]:
    """By path, what is called after each input file, of all that there are records of."""
    files = {}
    for block in pq.ParquetFile(records).iter_batches(columns=["sample", "file"]):
        table = pa.Table.from_batches([block])
        for file, part in _by_file(table["file"]):
            files[file] = InputFile(table["sample"][part.start].as_py(), file)
    return output_names(list(files.values()))


def _summary(
    tally: Tally, plan: Plan, runs: Sequence[RunRecord], formats: Sequence[str], arrays: Sequence[str]
) -> Summary:
    speed = Speed.of((run.shards, run.started, run.ended) for run in runs)
    return Summary(
        records=tally.records,
        embedded=tally.status[EMBEDDED],
        failed=tally.status[FAILED],
        rejected=tally.status[REJECTED],
        reasons={reason: n for reason, n in sorted(tally.reasons.items()) if n},
        truncated=tally.truncated,
        windowed=tally.windowed,
        duplicates=plan.duplicates,
        computed_sequences=sum(run.sequences for run in runs),
        computed_residues=speed.residues,
        seconds=speed.embedding_seconds,
        residues_per_second=speed.while_embedding,
        seconds_with_start_up=speed.seconds,
        residues_per_second_with_start_up=speed.with_start_up,
        groups_with_failures=tuple(run.group for run in runs if run.failed_sequences),
        formats=tuple(formats),
        arrays=tuple(arrays),
        versions=versions(*_PACKAGES),
    )
