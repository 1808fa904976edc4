"""The report of a run: one HTML page that opens offline, made from files that the run wrote."""

from __future__ import annotations

import datetime
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2

from esmflow.files import PROJECT, atomic_path
from esmflow.report.drawing import draw, message, on_paper
from esmflow.report.manifest_counts import ManifestCounts, count_manifest
from esmflow.report.run_files import RunFiles, devices
from esmflow.report.sections import SECTIONS, Section
from esmflow.text import duration, percent, plural

log = logging.getLogger(__name__)

TEMPLATES = PROJECT / "workflow" / "report"

# Each figure is drawn for a screen or a sheet of paper, and for a phone; the page's style shows one of them.
WIDTHS = {"wide": 840, "narrow": 350}

_STATUS_COLOURS = {"embedded": "green", "rejected": "orange", "failed": "vermillion"}


def write_report(files: RunFiles, page: str, figures: Mapping[str, str], folder: Path = TEMPLATES) -> None:
    """Writes the page and, for Snakemake's own report, its figures.

    figures: where the figure of a section goes, by the section's key. folder: where the page's template, style and
    script are, and each section's caption. A section that cannot be made says so in its place, and the log has the
    error: what the run computed must not be lost for a drawing.
    """
    counts = count_manifest(files.manifest, files.written_segments, embedded=files.summary.embedded)
    sections = {key: _made(title, make, files, counts) for key, title, make in SECTIONS}
    drawings = _draw(sections)
    style = (folder / "page.css").read_text(encoding="utf-8")
    for key, path in figures.items():
        views = drawings.get(key)
        drawing = next(iter(views.values()))["wide"] if views else message(sections[key].note)
        with atomic_path(path) as temporary:
            temporary.write_text(on_paper(drawing, style), encoding="utf-8")
    with atomic_path(page) as temporary:
        temporary.write_text(_page(files, counts, sections, drawings, folder), encoding="utf-8")
    log.info("report of %d records in %s", counts.total, page)


def _made(
    title: str, make: Callable[[RunFiles, ManifestCounts], Section], files: RunFiles, counts: ManifestCounts
) -> Section:
    try:
        return make(files, counts)
    except Exception as error:
        return Section(note=_excuse(title, error))


def _draw(sections: dict[str, Section]) -> dict[str, dict[str, dict[str, str]]]:
    """Each section's figures by name and width, as SVG. A section of which one cannot be drawn says so instead."""
    specifications: dict[str, list[dict[str, Any]]] = {}
    drawings: dict[str, dict[str, dict[str, str]]] = {}
    for key, section in sections.items():
        try:
            specifications[key] = [
                figure(width).to_dict() for figure in section.figures.values() for width in WIDTHS.values()
            ]
        except Exception as error:
            sections[key] = replace(section, note=f"{_excuse(key, error)} {section.note}")
    drawn = iter(draw([one for of_section in specifications.values() for one in of_section]))
    for key, of_section in specifications.items():
        made = [next(drawn) for _ in of_section]
        if errors := [one for one in made if not isinstance(one, str)]:
            sections[key] = replace(sections[key], note=f"{_excuse(key, errors[0])} {sections[key].note}")
        elif made:
            widths = zip(*[iter(map(str, made))] * len(WIDTHS))
            drawings[key] = {name: dict(zip(WIDTHS, both)) for name, both in zip(sections[key].figures, widths)}
    return drawings


def _excuse(title: str, error: Exception) -> str:
    log.error("the report's section %s could not be made", title, exc_info=error)
    reason = f"{type(error).__name__}: {error}".partition("\n")[0][:200]
    return f"This could not be shown ({reason}); the report's log has the details."


def _page(
    files: RunFiles,
    counts: ManifestCounts,
    sections: Mapping[str, Section],
    drawings: Mapping[str, Mapping[str, Mapping[str, str]]],
    folder: Path,
) -> str:
    """The page. Everything that comes from the input is escaped: by the template, and in drawings by what draws."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.tests["digest"] = re.compile("[0-9a-f]{32}").fullmatch
    environment.tests["number_like"] = lambda cell: str(cell)[:1].isdigit() and len(str(cell)) < 25
    shown = [
        {
            "key": key,
            "title": title,
            "caption": (folder / f"{key}.rst").read_text(encoding="utf-8").strip(),
            "content": sections[key],
            "drawings": drawings.get(key, {}),
        }
        for key, title, _ in SECTIONS
    ]
    return environment.get_template("page.html.j2").render(
        headline=headline(files),
        model=files.model.name,
        made=datetime.datetime.now().astimezone().strftime("%d %B %Y, %H:%M %Z").lstrip("0"),
        share=[(status, counts.records(status), shade) for status, shade in _STATUS_COLOURS.items()],
        numbers=key_numbers(files, counts),
        sections=shown,
        fingerprint=files.store.fingerprint,
        style=(folder / "page.css").read_text(encoding="utf-8"),
        script=(folder / "page.js").read_text(encoding="utf-8"),
    )


def headline(files: RunFiles) -> str:
    """What came of the run, in one sentence."""
    summary = files.summary
    if summary.embedded == summary.records:
        return f"All {summary.records:,} records have an embedding"
    return f"{summary.embedded:,} of {summary.records:,} records have an embedding"


def key_numbers(files: RunFiles, counts: ManifestCounts) -> list[tuple[str, str, str]]:
    """The numbers at the top: name, value, and a few words that explain it."""
    summary, slots = files.summary, files.slots()
    share = summary.embedded / summary.records if summary.records else 1.0
    numbers = [
        ("Records", f"{summary.records:,}", plural(len(counts.files), "input file")),
        ("Embedded", f"{summary.embedded:,}", f"{percent(share)} of the records"),
        (
            "Without embedding",
            f"{summary.rejected + summary.failed:,}",
            f"{summary.rejected:,} rejected, {summary.failed:,} failed",
        ),
    ]
    if summary.residues_per_second:
        computed = f"while embedding: {plural(summary.computed_sequences, 'sequence')} in {duration(summary.seconds)}"
        if summary.residues_per_second_with_start_up:
            computed += f"; {summary.residues_per_second_with_start_up:,.0f} with start-up"
        numbers.append(("Residues per second", f"{summary.residues_per_second:,.0f}", computed))
        jobs = plural(sum(bool(run.workers) for run in files.runs), "job")
        numbers.append(("Slots", f"{len(slots)}", f"{jobs} on {devices(files)}"))
    else:
        numbers.append(("Computed", "0", files.why_nothing()))
    if files.certificate is None:
        numbers.append(("Certificate", "none", "verification was off"))
    else:
        verified = plural(files.certificate.verified_sequences(), "sequence")
        numbers.append(("Certificate", files.certificate.verdict, f"by {verified}"))
    return numbers
