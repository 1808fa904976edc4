"""The sections of a run's report: for each a figure, the same in words and tables, made from the run's files."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import yaml

from esmflow.failures import REMEDY, Reason
from esmflow.report.embedding_map import FEWEST, MOST_MAPS, embedding_map, map_arrays
from esmflow.report.figures.embeddings import certificate_figure, colourings, map_figure
from esmflow.report.figures.records import disk_figure, flow_figure, lengths_figure, reasons_figure
from esmflow.report.figures.slots import speed_figure, timeline_figure
from esmflow.report.figures.style import GIB, Figure
from esmflow.report.manifest_counts import LONGEST, MOST_POINTS, ManifestCounts
from esmflow.report.methods import methods_paragraph, references
from esmflow.report.run_files import RunFiles, devices
from esmflow.report.timeline import MOST_SLOTS, drawable, kind_seconds, slot_name, slot_pieces
from esmflow.text import bytes_in_words, clock, duration, in_words, percent, plural, shown, span

# A page with a row for each of a thousand files helps nobody; the manifest has them all.
MOST_ROWS = 100
RUN_JSON = "the groups' run.json"


@dataclass(frozen=True)
class Table:
    """A table of the page. note: a sentence above it. folded: shown when the reader opens it, and when printed."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    note: str = ""
    folded: bool = True


@dataclass(frozen=True)
class Section:
    """What a section shows. note: what its figure says, in words; facts: names and values.

    figures: of a width each, by their names, of which the reader chooses one. texts: titles, and what is shown as it
    is. links: files beside the page, with what they are.
    """

    note: str = ""
    facts: Sequence[tuple[str, str]] = ()
    figures: Mapping[str, Callable[[int], Figure]] = field(default_factory=dict)
    tables: Sequence[Table] = ()
    texts: Sequence[tuple[str, str]] = ()
    links: Sequence[tuple[str, str]] = ()


def what_ran(files: RunFiles, counts: ManifestCounts) -> Section:
    """Model, method, versions and hardware."""
    method, model, runs = files.fingerprint, files.model, files.runs
    size = model.dimensions
    used = ", ".join(f"{name} ({number:,} records)" for name, number in counts.precisions.most_common()) or "none"
    cut = {
        "truncate": f"cut off after {method.max_residues} residues",
        "window": f"in windows of {method.max_residues} residues that share {method.window_overlap}",
    }
    versions = files.summary.versions
    name = f"{model.name}, merged into {model.base}" if model.base else model.name
    facts = [
        ("Model", f"{name}: {size.layers} layers, width {size.hidden}, {size.heads} heads"),
        ("Checkpoint", model.digest),
        ("Outputs", f"{', '.join(files.summary.arrays)} as {', '.join(files.summary.formats)}"),
        *([("Variants", files.variants.line())] if files.variants else []),
        ("Precision", used if method.precision != "auto" else f"{used}, chosen by auto"),
        ("Engine", f"{method.engine}, method version {method.method_version}: {_arithmetic(files, counts)}"),
        ("Long sequences", cut.get(method.long_sequences, method.long_sequences)),
        ("Invalid residues", method.invalid_residues.replace("_", " ")),
        ("Fingerprint", files.store.fingerprint),
        ("Versions", ", ".join(f"{name} {version}" for name, version in versions.items()) or "not recorded"),
        ("Hardware", devices(files) if files.slots() else "no slot was needed"),
        ("Hosts", ", ".join(sorted({run.host for run in runs}))),
    ]
    if runs:
        started, ended = min(run.started for run in runs), max(run.ended for run in runs)
        facts.append(("Embedding", f"{span(started, ended)}: {duration(ended - started)}"))
        # Files that were copied may have any time.
        if files.finished >= ended:
            steps = "collecting and verifying" if files.certificate else "collecting"
            facts.append((f"With {steps}", f"{duration(files.finished - started)} in all"))
    again = [f"group {run.group}, attempt {run.attempt}" for run in runs if run.attempt > 1]
    if again:
        facts.append(("Tried again", ", ".join(again)))
    return Section(facts=facts)


def _arithmetic(files: RunFiles, counts: ManifestCounts) -> str:
    """How the engine computes, in the fingerprint's words: those for what this run did."""
    of_others = ("auto is", *([] if "bf16" in counts.precisions else ["rotated queries and keys in fp16"]))
    clauses = [clause for clause in files.fingerprint.arithmetic.split("; ") if not clause.startswith(of_others)]
    half = bool({"fp16", "bf16", "int8"} & counts.precisions.keys())
    if half and not files.slots():
        return "; ".join(clauses)
    tanh = half and any(slot.device == "cuda" for _, slot in files.slots())
    said = {"GELU by tanh in bf16 and fp16 on a GPU, else by erf": f"GELU by {'tanh' if tanh else 'erf'}"}
    words = "; ".join(said.get(clause, clause) for clause in clauses)
    return words if half else words.replace(", under autocast in bf16 and fp16", "")


def records_flow(files: RunFiles, counts: ManifestCounts) -> Section:
    """What became of the records, of each file."""
    embedded, failed = counts.records("embedded"), counts.records("failed")
    repeats = embedded + failed - counts.computed - counts.reused - counts.failed
    note = (
        f"Of {counts.total:,} records {counts.records('rejected'):,} were rejected and {repeats:,} are duplicates. "
        f"Of {counts.computed + counts.reused + counts.failed:,} unique sequences {counts.computed:,} were computed, "
        f"{counts.reused:,} taken from the store, {counts.failed:,} failed."
    )
    columns: dict[str, Callable[[Any], str]] = {
        "records": lambda entry: f"{entry[1].total():,}",
        "embedded": lambda entry: f"{entry[1]['embedded']:,}",
        "rejected": lambda entry: f"{entry[1]['rejected']:,}",
        "failed": lambda entry: f"{entry[1]['failed']:,}",
    }
    tables = [
        _table(
            f"By {what}",
            {what.split()[-1]: lambda entry: entry[0]} | columns,
            list(found.items()),
            "the manifest",
            folded,
        )
        for what, found, folded in (
            ("sample", counts.samples, len(counts.samples) > 12),
            ("input file", counts.files, True),
        )
    ]
    return Section(note=note, figures={"": partial(flow_figure, counts)}, tables=tables)


def failures(files: RunFiles, counts: ManifestCounts) -> Section:
    """Why records have no embedding, with the first of each reason."""
    if not counts.reasons:
        return Section(note="Every record has an embedding.")
    tables = []
    for reason, number in counts.reasons.most_common():
        first = counts.first[reason]
        part = f", the first {len(first)}" if number > len(first) else ""
        tables.append(
            Table(
                f"{reason}: {plural(number, 'record')}{part}",
                ("file", "record", "id", "detail"),
                [(entry.file, f"{entry.record:,}", shown(entry.id), entry.detail) for entry in first],
                note=f"What to do: {REMEDY[Reason(reason)]}.",
                folded=len(counts.reasons) > 4,
            )
        )
    note = f"{plural(counts.reasons.total(), 'record')} without an embedding; all of them are in failures.tsv."
    return Section(note=note, figures={"": partial(reasons_figure, counts)}, tables=tables)


def lengths(files: RunFiles, counts: ManifestCounts) -> Section:
    """How long the records are, and which were cut."""
    if not counts.lengths:
        return Section(note="There are no records.")
    total = np.sum(list(counts.lengths.values()), axis=0)
    present = total.nonzero()[0]
    middle = int((total.cumsum() >= total.sum() / 2).argmax())
    cut = [f"{int(counts.lengths[k].sum()):,} were {k}" for k in ("truncated", "windowed") if k in counts.lengths]
    longest = f"{present[-1]:,}" if present[-1] < LONGEST else f"{LONGEST:,} or more"
    note = f"Half of the records have {middle:,} residues or fewer, the longest {longest}."
    note += f" {' and '.join(cut)}." if cut else " None was cut."
    return Section(note=note, figures={"": partial(lengths_figure, counts, files.fingerprint.long.max_residues)})


def slots_over_time(files: RunFiles, counts: ManifestCounts) -> Section:
    """Which group ran where and when, and what the slots did."""
    pieces = slot_pieces(files.runs)
    if not pieces:
        return Section(note=f"No slot was leased: {files.why_nothing()}.")
    seconds = kind_seconds(pieces)
    shares = ", ".join(f"{percent(value / sum(seconds.values()))} {kind}" for kind, value in seconds.items())
    slots = {piece.slot for piece in pieces}
    table = _table(
        "Leases",
        {
            "group": lambda lease: lease[0].group,
            "slot": lambda lease: slot_name(lease[0].host, lease[1].slot),
            "device": lambda lease: lease[1].slot.name,
            "uuid": lambda lease: lease[1].slot.uuid or "",
            "leased": lambda lease: clock(lease[1].leased),
            "held for": lambda lease: duration(lease[1].released - lease[1].leased),
        },
        [(run, worker) for run in files.runs for worker in run.workers],
        RUN_JSON,
    )
    note = f"Slots were leased for {duration(sum(seconds.values()))} in all: {shares}."
    if len(slots) > MOST_SLOTS:
        note += f" The figure has {MOST_SLOTS} of {len(slots):,} slots."
    return Section(note=note, figures={"": partial(timeline_figure, drawable(pieces))}, tables=[table])


def speed(files: RunFiles, counts: ManifestCounts) -> Section:
    """How fast each group was and how much memory it took."""
    ran = [run for run in files.runs if run.residues_per_second]
    if not ran:
        return Section(note=f"No group computed anything: {files.why_nothing()}.")
    slowest, fastest = (f(run.residues_per_second or 0 for run in ran) for f in (min, max))
    peak = max(run.peak_memory_bytes or 0 for run in ran)
    cards = any(slot.device == "cuda" for _, slot in files.slots())
    note = f"Groups computed at {slowest:,.0f} to {fastest:,.0f} residues per second while embedding, and took "
    note += f"{peak / GIB:.2f} GiB of "
    note += "a card's memory at most." if cards else "memory at most."
    table = _table(
        "Groups",
        {
            "group": lambda run: run.group,
            "sequences": lambda run: f"{run.sequences:,}",
            "residues": lambda run: f"{run.residues:,}",
            "residues/s": lambda run: f"{run.residues_per_second or 0:,.0f}",
            "with start-up": lambda run: f"{run.residues_per_second_with_start_up or 0:,.0f}",
            "GiB": lambda run: f"{(run.peak_memory_bytes or 0) / GIB:.2f}",
            "model load, s": lambda run: f"{run.model_load_seconds or 0:.1f}",
            "tokens per batch": lambda run: f"{run.token_budget or 0:,}",
            "written": lambda run: f"{len(run.segments_written):,}",
            "reused": lambda run: f"{len(run.segments_reused):,}",
        },
        files.runs,
        RUN_JSON,
    )
    return Section(note=note, figures={"": partial(speed_figure, ran)}, tables=[table])


def certificate(files: RunFiles, counts: ManifestCounts) -> Section:
    """The sample that was computed again, if any was."""
    found = files.certificate
    if found is None:
        return Section(note="Verification was off: no embedding was computed again.")
    remarks = {True: "", False: ": do not use these embeddings", None: ": no sequence could be computed again"}
    verdict = f"{found.verdict.capitalize() if found.passed else found.verdict.upper()}{remarks[found.passed]}"
    note = f"{verdict}. {plural(found.computed_again, 'sequence')} computed again with {found.verified_with}"
    note += f", {found.verified_before:,} verified by an earlier run." if found.verified_before else "."
    note += f" Not verified: {in_words(found.not_verified)}." if found.not_verified else ""
    tables = []
    if found.problems:
        problems = {"problem": lambda problem: problem}
        tables.append(_table("Problems", problems, found.problems, "certificate.json", folded=False))
    if found.outputs:
        columns = {
            "output": lambda entry: entry[0],
            "sequences": lambda entry: entry[1].sequences,
            "largest 1 − cosine": lambda entry: f"{1 - entry[1].cosine_min:.1e}",
            "median": lambda entry: f"{1 - entry[1].cosine_median:.1e}",
            "largest relative error": lambda entry: f"{entry[1].relative_error_max:.1e}",
        }
        outputs = list(found.outputs.items())
        tables.append(_table("By output", columns, outputs, "certificate.json", folded=False))
    figure = partial(certificate_figure, found, files.fingerprint.long)
    return Section(note=note, figures={"": figure} if found.outputs else {}, tables=tables)


def map_of_embeddings(files: RunFiles, counts: ManifestCounts) -> Section:
    """Maps of the embeddings, one for each output and what its points are coloured by."""
    arrays = map_arrays(files.fingerprint.outputs.arrays())
    if not arrays:
        return Section(note="A map needs mean, bos or per-residue vectors, and this run computed none.")
    if len(counts.sample) < FEWEST:
        return Section(note=f"A map needs at least {FEWEST} embeddings.")
    maps = [embedding_map(files.store, counts.sample, array) for array in arrays]
    colours = colourings(counts.sample, list(counts.files), list(counts.samples))
    embedded, most = files.summary.embedded, MOST_POINTS // (len(maps) * len(colours))
    shown = min(len(counts.sample), most)
    note = f"All {embedded:,} embeddings" if shown == embedded else f"About {shown:,} of {embedded:,} embeddings"
    note += f" of {in_words(str(mapped.array) for mapped in maps)}."
    if moved := max(mapped.moved for mapped in maps):
        note += f" {moved:,} that lie far from all others stand at the edge, so that they do not squeeze the rest."
    if len(arrays) == MOST_MAPS:
        note += f" No more than {MOST_MAPS} outputs have a map."
    figures = {
        (f"{mapped.array} " if len(maps) > 1 else "") + f"by {colouring.what}": partial(
            map_figure, mapped, counts.sample, colouring, most
        )
        for mapped in maps
        for colouring in colours
    }
    return Section(note=note, figures=figures)


def disk(files: RunFiles, counts: ManifestCounts) -> Section:
    """What the run left, where it is, and what it takes on disk."""
    sizes = files.disk()
    free = shutil.disk_usage(files.results or ".").free
    note = f"{bytes_in_words(sum(sizes.values()))} in all; {bytes_in_words(free)} are free where the results are."
    return Section(note=note, figures={"": partial(disk_figure, sizes)}, links=files.links())


def paper(files: RunFiles, counts: ManifestCounts) -> Section:
    """What to write about the run, and what it takes to do it again."""
    configuration = yaml.safe_dump(dict(files.configuration), sort_keys=False, allow_unicode=True)
    texts = [("References", references(files)), ("Command", files.command), ("Configuration", configuration)]
    return Section(note=methods_paragraph(files, counts), texts=texts)


def _table(
    title: str, columns: Mapping[str, Callable[[Any], Any]], entries: Sequence[Any], where: str, folded: bool = True
) -> Table:
    """A row for each of as many entries as a page can hold. columns: what they show; where: the file that has all."""
    note = f"The first {MOST_ROWS} of {len(entries):,}; all are in {where}." if len(entries) > MOST_ROWS else ""
    rows = [[cell(entry) for cell in columns.values()] for entry in entries[:MOST_ROWS]]
    return Table(title, list(columns), rows, note, folded)


SECTIONS: list[tuple[str, str, Callable[[RunFiles, ManifestCounts], Section]]] = [
    ("method", "What ran", what_ran),
    ("flow", "Records", records_flow),
    ("failures", "Rejected and failed", failures),
    ("lengths", "Lengths", lengths),
    ("timeline", "Slots over time", slots_over_time),
    ("speed", "Speed and memory", speed),
    ("certificate", "Certificate", certificate),
    ("map", "Map", map_of_embeddings),
    ("disk", "Files", disk),
    ("paper", "Methods", paper),
]
