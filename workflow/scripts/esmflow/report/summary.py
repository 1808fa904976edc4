"""The few lines that a run ends with on the terminal: what came of it, and the next thing to do."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from esmflow.collect.summary import Summary, VariantSummary
from esmflow.embedding.status import StatusError, read_status, trouble_lines
from esmflow.failures import REMEDY, Reason
from esmflow.text import duration, plural
from esmflow.verify.certificate import Certificate, Remedy

_REASONS = 3


@dataclass(frozen=True)
class Places:
    """Where a run's results are, as the lines name them; and the command that made them. report: None without one."""

    embeddings: str
    manifest: str
    report: str | None
    failures: str
    command: str


def summary_lines(
    summary: Summary,
    certificate: Certificate | None,
    model: str,
    places: Places,
    variants: VariantSummary | None = None,
) -> list[str]:
    """Five to ten lines: how many of what, how fast, how right, where, and what to do about what is missing."""
    lines = [
        f"records    {summary.records:,}: {summary.embedded:,} embedded, "
        f"{summary.rejected:,} rejected, {summary.failed:,} failed{_remarks(summary)}",
        *_reason_lines(summary.reasons),
        _speed_line(summary, model),
        f"verified   {certificate.line()}" if certificate else "verified   no (verify.sample: 0)",
        f"results    {places.embeddings}  ({', '.join(summary.arrays)}; {', '.join(summary.formats)})",
        *([f"variants   {variants.line()}; {Path(places.manifest).with_name('variants.tsv')}"] if variants else []),
        f"manifest   {places.manifest}" + (f"; report {places.report}" if places.report else ""),
    ]
    if summary.records > summary.embedded:
        lines.append(f"failures   {places.failures}  (every record without an embedding, and why)")
    return [*lines, *_next_lines(summary, certificate, places)]


def _remarks(summary: Summary) -> str:
    counts = {
        "share the embedding of an equal sequence": summary.duplicates,
        "truncated": summary.truncated,
        "in windows": summary.windowed,
    }
    remarks = [f"{count:,} {what}" for what, count in counts.items() if count]
    return f" ({', '.join(remarks)})" if remarks else ""


def _reason_lines(reasons: Mapping[str, int]) -> list[str]:
    """The most frequent reasons, with their remedies."""
    by_count = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
    lines = [f"           {count:,} × {reason}: {REMEDY[Reason(reason)]}" for reason, count in by_count[:_REASONS]]
    if by_count[_REASONS:]:
        lines[-1] += f"; and {sum(count for _, count in by_count[_REASONS:]):,} for other reasons"
    return lines


def _speed_line(summary: Summary, model: str) -> str:
    if not summary.residues_per_second:
        return f"speed      {model}: nothing had to be computed"
    with_start_up = (
        f", {summary.residues_per_second_with_start_up:,.0f} with start-up ({duration(summary.seconds_with_start_up)})"
        if summary.residues_per_second_with_start_up
        else ""
    )
    return (
        f"speed      {model}: {summary.residues_per_second:,.0f} residues/s while embedding "
        f"({duration(summary.seconds)}){with_start_up}; {plural(summary.computed_sequences, 'sequence')} computed"
    )


def _next_lines(summary: Summary, certificate: Certificate | None, places: Places) -> list[str]:
    """The next thing to do, one thing only."""
    if certificate and certificate.passed is False:
        return [f"next       do not use these embeddings; {_remedy(certificate, places)}"]
    if summary.failed:
        return [f"next       try the failed records again: {places.command} --forcerun plan"]
    if summary.rejected:
        return [f"next       correct the rejected records if they matter, then run: {places.command}"]
    verified = certificate.sequences if certificate else ()
    in_bf16 = [output.cosine for s in verified if s.precision == "bf16" for output in s.outputs.values()]
    if (lowest := min(in_bf16, default=1.0)) < _NEAR_ENOUGH:
        return [
            f"next       a vector in bf16 has cosine {lowest:.5f} to fp32, as happens to short peptides; where that "
            f"matters, set precision: fp16, then run: {places.command}"
        ]
    return []


def _remedy(certificate: Certificate, places: Places) -> str:
    if certificate.remedy == Remedy.COLLECT:
        return f"write them again from the store: {places.command} --forcerun collect"
    if certificate.remedy == Remedy.RECOMPUTE:
        remove = shlex.join(["rm", *certificate.segments])
        return f"compute them again: {remove} && {places.command} --forcerun plan"
    other = "engine: reference" if certificate.engine == "packed" else "precision: fp32"
    return f"set {other} in the configuration, then run: {places.command}"


_NEAR_ENOUGH = 0.9995
"""A cosine to fp32 below which the summary says what is nearer."""

_LINES = 6


def unfinished_lines(results: str, logs: str, command: str) -> list[str]:
    """At most ten lines, the last of them with the command to go on with."""
    summary, plan = Path(results, "summary.json"), Path(results, "plan", "plan.json")
    if summary.exists() and plan.exists() and summary.stat().st_mtime > plan.stat().st_mtime:
        return [
            "The run ended with an error, after everything that could be done was done. What is wrong and what to do",
            f"is above, and in {logs}/finish.log.",
        ]
    try:
        trouble = trouble_lines(read_status(results))
    except StatusError:
        trouble = []
    more = [f"and {(len(trouble) - _LINES) // 2} more groups"] if len(trouble) > _LINES else []
    return [
        f"The run did not finish. What went wrong is above and in {logs}/.",
        *trouble[:_LINES],
        *more,
        f"next       go on from here, finished shards are kept: {command}",
        "           If it says that the directory is locked, the last run was killed: once with --unlock first.",
    ]


def command_of(words: Sequence[str]) -> str:
    """The `snakemake …` command of a process, given its words, as a person would type it."""
    names = [os.path.basename(word) for word in words[:3]]
    if "snakemake" not in names:
        return "snakemake"
    at = names.index("snakemake")
    if at and words[at - 1] in ("-m", "-Pm"):
        return shlex.join([_as_typed(words[0]), *words[1:]])
    return shlex.join([_as_typed(words[at]), *words[at + 1 :]])


def _as_typed(program: str) -> str:
    """The program's name where that is enough, its path from here where it is below, else its whole path."""
    if shutil.which(os.path.basename(program)) == program:
        return os.path.basename(program)
    below = os.path.relpath(program)
    return program if below.startswith("..") else below
