"""The report's figures. Each is described once, with Altair; the page and Snakemake's own report show the same drawing.

Every figure is a function of what it shows and of the width that it is drawn for, in pixels: a screen's or a phone's.
Colours are the page's by name, and what a mark says when it is pointed at is its description.
"""

from __future__ import annotations

import datetime
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import altair as alt
import numpy as np
import polars as pl

from esmflow.embedding.run_record import RunRecord
from esmflow.report.embedding_map import EmbeddingMap
from esmflow.report.manifest_counts import LONGEST, ManifestCounts, SampledRecord
from esmflow.report.timeline import COMPUTE, IDLE, LOAD, WRITE, Piece
from esmflow.text import bytes_in_words
from esmflow.verify.certificate import Certificate

Figure = alt.Chart | alt.LayerChart | alt.FacetChart | alt.VConcatChart

GIB = 2**30
# Okabe and Ito's colours, which people with any colour vision can tell apart; the page has shades for light and dark.
PALETTE = ("blue", "orange", "green", "purple", "sky", "vermillion", "yellow")
NARROW = 520
# Figures stay readable, and the page small, up to these.
MOST_BARS = 120
MOST_POINTS_ON_A_PHONE = 2000

_LETTER = 7
"""About the width of a letter in pixels."""
# Altair refuses to draw more than 5,000 rows unless told: what is drawn here is bounded by those who count it.
alt.data_transformers.disable_max_rows()

_LENGTHS = {
    "whole": ("embedded whole", "blue"),
    "truncated": ("embedded, truncated", "orange"),
    "windowed": ("embedded in windows", "green"),
    "failed": ("failed", "vermillion"),
    "rejected": ("rejected", "grey"),
}
_KINDS = {LOAD: "yellow", COMPUTE: "blue", WRITE: "green", IDLE: "faint"}
# Name, column and colour of the boxes of the flow, from top to bottom.
_STAGES = {
    "Records": (0, "grey"),
    "Unique": (1, "sky"),
    "Duplicates": (1, "purple"),
    "Computed": (2, "blue"),
    "Reused": (2, "yellow"),
    "Embedded": (3, "green"),
    "Failed": (3, "vermillion"),
    "Rejected": (3, "orange"),
}


def flow_links(counts: ManifestCounts) -> dict[tuple[str, str], int]:
    """How many records or sequences go from which stage to which; those that none took are left out."""
    embedded, failed, rejected = (counts.records(status) for status in ("embedded", "failed", "rejected"))
    sequences = counts.computed + counts.reused + counts.failed
    links = {
        ("Records", "Unique"): sequences,
        ("Records", "Duplicates"): embedded + failed - sequences,
        ("Unique", "Computed"): counts.computed,
        ("Unique", "Reused"): counts.reused,
        ("Computed", "Embedded"): counts.computed,
        ("Reused", "Embedded"): counts.reused,
        ("Duplicates", "Embedded"): embedded - counts.computed - counts.reused,
        ("Unique", "Failed"): counts.failed,
        ("Duplicates", "Failed"): failed - counts.failed,
        ("Records", "Rejected"): rejected,
    }
    return {link: number for link, number in links.items() if number}


def flow_figure(counts: ManifestCounts, width: int) -> Figure:
    """Records from the input to what became of them. Places are in pixels; names stand on the right of their boxes."""
    height, gap, box, letters = 240, 40, 14, 76
    links = flow_links(counts)
    into, out = Counter[str](), Counter[str]()
    for (source, target), number in links.items():
        out[source] += number
        into[target] += number
    sizes = {stage: max(into[stage], out[stage]) for stage in _STAGES if into[stage] or out[stage]}
    columns = [[stage for stage in sizes if _STAGES[stage][0] == column] for column in range(4)]
    scale = min((height - gap * (len(c) - 1)) / sum(sizes[stage] for stage in c) for c in columns if c)
    lefts = {stage: (width - box - letters) * _STAGES[stage][0] / 3 for stage in sizes}
    tops: dict[str, float] = {}
    for column in columns:
        tops |= zip(column, accumulate((scale * sizes[stage] + gap for stage in column), initial=0.0))
    boxes = [
        {
            "x": lefts[stage],
            "x2": lefts[stage] + box,
            "y": top,
            "y2": top + max(scale * sizes[stage], 1.5),
            "middle": top + scale * sizes[stage] / 2 - 13,
            "shade": colour(_STAGES[stage][1]),
            "label": f"{stage}\n{sizes[stage]:,}",
            "what": f"{stage}: {sizes[stage]:,}",
        }
        for stage, top in tops.items()
    ]
    ribbons = []
    leave, enter = dict(tops), dict(tops)
    for (source, target), number in links.items():
        for t in np.linspace(0, 1, 25).tolist():
            x = lefts[source] + box + t * (lefts[target] - lefts[source] - box)
            y = leave[source] + (enter[target] - leave[source]) * t * t * (3 - 2 * t)
            what = f"{source} → {target}: {number:,}"
            end = y + max(scale * number, 0.6)
            ribbons.append({"x": x, "y": y, "y2": end, "shade": colour(_STAGES[target][1]), "what": what})
        leave[source] += scale * number
        enter[target] += scale * number
    x, right, y, middle = (
        channel(f"{field}:Q", scale=None, axis=None)
        for channel, field in ((alt.X, "x"), (alt.X, "x2"), (alt.Y, "y"), (alt.Y, "middle"))
    )
    shade = alt.Color("shade:N", scale=None)
    flows = _data(ribbons).mark_area(opacity=0.28).encode(x, y, shade, y2="y2", detail="what:N", description="what:N")
    bars = _data(boxes).mark_rect().encode(x, y, shade, x2="x2", y2="y2", description="what:N")
    names = (
        _data(boxes).mark_text(lineBreak="\n", align="left", baseline="top", dx=6).encode(right, middle, text="label:N")
    )
    return styled(flows + bars + names, width, height + 16)


def reasons_figure(counts: ManifestCounts, width: int) -> Figure:
    """Records without an embedding, by reason."""
    rows = [(reason.replace("_", " "), n, f"{n:,}", f"{n:,} records") for reason, n in counts.reasons.most_common()]
    return _level_bars(rows, "vermillion", width)


def disk_figure(sizes: Mapping[str, int], width: int) -> Figure:
    """Bytes on disk, by what they are for."""
    ordered = sorted(sizes.items(), key=lambda item: -item[1])
    return _level_bars([(name, n, bytes_in_words(n), bytes_in_words(n)) for name, n in ordered], "sky", width)


def _level_bars(rows: Sequence[tuple[str, float, str, str]], shade: str, width: int) -> Figure:
    """Horizontal bars with values beside them. rows: name, size, value and what the bar says, the largest first."""
    data = _data(
        {"name": name, "size": size, "text": text, "what": f"{name}: {what}"} for name, size, text, what in rows
    )
    # The values need room.
    room = 1 + _LETTER * (2 + max(len(text) for _, _, text, _ in rows)) / (0.6 * width)
    x = alt.X("size:Q", axis=None, scale=alt.Scale(domain=[0, room * max(max(size for _, size, *_ in rows), 1)]))
    y = alt.Y("name:N", sort=None, axis=_names(width, (name for name, *_ in rows)), scale=alt.Scale(paddingInner=0.4))
    bars = data.mark_bar(color=colour(shade)).encode(x=x, y=y, description="what:N")
    values = data.mark_text(align="left", dx=6).encode(x=x, y=y, text="text:N")
    return styled(bars + values, width, 38 * len(rows))


def lengths_figure(counts: ManifestCounts, max_residues: int | None, width: int) -> Figure:
    """Records by length: on a logarithmic scale if lengths spread over more than one order of magnitude."""
    total = np.sum([*counts.lengths.values(), np.zeros(LONGEST + 2, np.int64)], axis=0)
    present = np.flatnonzero(total[1:]) + 1
    shortest, longest = (int(present[0]), int(present[-1])) if len(present) else (1, 1)
    logarithmic = longest > 10 * shortest
    edges = _length_edges(shortest, longest, logarithmic).tolist()
    rows = []
    for order, (kind, (name, _)) in enumerate(_LENGTHS.items()):
        numbers = np.add.reduceat(counts.lengths[kind], edges).tolist() if kind in counts.lengths else []
        for (low, high), number in zip(pairwise(edges), numbers):
            residues = f"{low:,}" if high == low + 1 else f"{low:,}–{high - 1:,}"
            row = {"low": low, "high": high, "records": number, "kind": name, "order": order}
            rows.append({**row, "what": f"{residues} residues: {number:,} {name}"})
    marks = [m * 10**power for power in range(6) for m in (1, 3) if edges[0] <= m * 10**power <= edges[-1]]
    scale = alt.Scale(type="log" if logarithmic else "linear", domain=[edges[0], edges[-1]], nice=False)
    axis = alt.Axis(title="residues", tickCount=6, values=marks if logarithmic else alt.Undefined)
    bars = (
        _data(row for row in rows if row["records"])
        .mark_bar(stroke=colour("card"), strokeWidth=0.7)
        .encode(
            x=alt.X("low:Q", bin="binned", scale=scale, axis=axis),
            x2="high",
            y=alt.Y("records:Q", stack="zero", axis=alt.Axis(grid=True, title="records", tickMinStep=1)),
            color=_legend("kind", {name: shade for _, (name, shade) in _LENGTHS.items()}, rows, width),
            order=alt.Order("order:Q"),
            description="what:N",
        )
    )
    layers: list[alt.Chart] = [bars]
    if max_residues is not None and edges[0] < max_residues < edges[-1]:
        limit = _data([{"at": max_residues + 1, "text": f"max_residues {max_residues:,}"}])
        layers.append(limit.mark_rule(color=colour("ink"), strokeDash=[2, 3]).encode(x="at:Q"))
        layers.append(limit.mark_text(align="right", dx=3, dy=-8).encode(x="at:Q", y=alt.value(0), text="text:N"))
    return styled(alt.layer(*layers), width, 250)


def _length_edges(shortest: int, longest: int, logarithmic: bool) -> np.ndarray:
    """About forty bins of whole lengths: bin i holds `edges[i]` to `edges[i + 1] - 1` residues."""
    if logarithmic:
        return np.unique(np.round(np.geomspace(shortest, longest + 1, 41)).astype(np.int64))
    step = -(-(longest + 1 - shortest) // 40)
    return np.append(np.arange(shortest, longest + 1, step), longest + 1)


def timeline_figure(pieces: Sequence[Piece], width: int) -> Figure:
    """What each slot did when; the groups' numbers stand on their longest pieces."""
    began, ended = min(piece.started for piece in pieces), max(piece.ended for piece in pieces)
    slots = sorted({piece.slot for piece in pieces})
    pixel = (ended - began) / (width - _LETTER * max(map(len, slots)))
    longest: dict[tuple[str, str], Piece] = {}
    for piece in pieces:
        if piece.kind == COMPUTE:
            key = piece.slot, piece.group
            longest[key] = max(longest.get(key, piece), piece, key=lambda piece: piece.seconds)
    numbers = [
        {"slot": piece.slot, "at": _moment((piece.started + piece.ended) / 2), "group": piece.group}
        for piece in longest.values()
        if piece.seconds > (_LETTER * len(piece.group) + 4) * pixel
    ]
    rows = [
        {
            "slot": piece.slot,
            "start": _moment(piece.started),
            "end": _moment(piece.ended),
            "kind": piece.kind,
            "what": f"group {piece.group}, {piece.kind} {piece.seconds:,.2f} s\n{piece.what}",
        }
        for piece in pieces
    ]
    span = ended - began
    form = "%H:%M:%S" if span < 600 else "%H:%M" if span < 86400 else "%d %b %H:%M" if span < 7 * 86400 else "%d %b"
    time = alt.Axis(grid=True, title=None, format=form, tickCount=max(2, width // 150))
    y = alt.Y("slot:N", sort=None, title=None, axis=_names(width, slots), scale=alt.Scale(domain=slots))
    scale = alt.Scale(type="utc", domain=[_moment(began), _moment(ended)], nice=False)
    bars = (
        _data(rows)
        .mark_bar(stroke=colour("card"), strokeWidth=0.7)
        .encode(
            x=alt.X("start:T", axis=time, scale=scale),
            x2="end:T",
            y=y,
            color=_legend("kind", _KINDS, rows, width),
            description="what:N",
        )
    )
    text = _data(numbers or [{"slot": slots[0], "at": _moment(began), "group": ""}]).mark_text(color=colour("card"))
    height = max(18, min(44, 900 // len(slots))) * len(slots)
    return styled(bars + text.encode(x="at:T", y=y, text="group:N"), width, height)


def speed_figure(runs: Sequence[RunRecord], width: int) -> Figure:
    """Residues per second of each group while it computed, above the peak of its card's memory.

    Of many groups several share a bar: the median of their speeds, the largest of their peaks.
    """
    ran = [run for run in runs if run.residues_per_second]
    share = -(-len(ran) // MOST_BARS)
    shared = [ran[start : start + share] for start in range(0, len(ran), share)]
    names = [runs[0].group if len(runs) == 1 else f"{runs[0].group}–{runs[-1].group}" for runs in shared]
    speeds = [float(np.median([run.residues_per_second or 0 for run in runs])) for runs in shared]
    memory = [max(run.peak_memory_bytes or 0 for run in runs) / GIB for runs in shared]
    inside = width - 70
    every = -(-_LETTER * (len(names[-1]) + 1) * len(names) // inside)
    below = alt.Axis(title="group", values=names[::every])
    plots = []
    for values, title, unit, shade, height, axis in (
        (speeds, "residues/s", "residues/s", "blue", 170, None),
        (memory, "memory, GiB", "GiB at most", "purple", 120, below),
    ):
        data = _data(
            {"group": name, "value": value, "text": _short(value), "what": f"group {name}\n{_short(value)} {unit}"}
            for name, value in zip(names, values)
        )
        x = alt.X("group:N", sort=None, axis=axis)
        y = alt.Y("value:Q", axis=alt.Axis(grid=True, title=title, minExtent=45, maxExtent=45, tickCount=4))
        bars = data.mark_bar(color=colour(shade), size=min(70, 0.65 * inside / len(names)))
        fits = inside / len(names) > _LETTER * max(map(len, map(_short, values)))
        texts = [data.mark_text(dy=-8).encode(x, y, text="text:N")] if fits else []
        plots.append(alt.layer(bars.encode(x, y, description="what:N"), *texts).properties(width=inside, height=height))
    return styled(alt.vconcat(*plots, spacing=26), None, None)


def certificate_figure(certificate: Certificate, width: int) -> Figure:
    """How far each sampled embedding is from the one that was computed again: one minus the cosine, by length."""
    # Double precision says no more than this.
    smallest = 1e-15
    rows: list[dict[str, Any]] = [
        {
            "length": entry.length,
            "distance": math.log10(max(1 - found.cosine, smallest)),
            "output": name,
            "what": f"{_cut(entry.id)}\ncosine 1 − {max(1 - found.cosine, smallest):.1e}",
        }
        for entry in certificate.sequences
        for name, found in entry.outputs.items()
    ]
    names = sorted({row["output"] for row in rows})
    limits = [
        {"at": math.log10(1 - limit.min_cosine), "text": f"limit for {precision}: cosine {limit.min_cosine}"}
        for precision, limit in certificate.limits.items()
        if limit.min_cosine < 1
    ]
    heights = [row["distance"] for row in rows] + [limit["at"] for limit in limits]
    low, high = math.floor(min(heights)), math.ceil(max(heights))
    words = {str(power): "10" + str(power).translate(_RAISED) for power in range(low, high + 1)}
    axis = alt.Axis(
        grid=True, title="1 − cosine", values=list(map(int, words)), labelExpr=f"({json.dumps(words)})[datum.value]"
    )
    y = alt.Y("distance:Q", axis=axis, scale=alt.Scale(domain=[low, high], nice=False))
    x = alt.X("length:Q", axis=alt.Axis(title="residues", tickCount=width // 100))
    shades = {name: shade for name, shade in zip(names, PALETTE * len(names))}
    points = _data(rows).mark_circle(size=45, opacity=0.8)
    points = points.encode(x=x, y=y, color=_legend("output", shades, rows, width), description="what:N")
    rule = _data(limits).mark_rule(color=colour("vermillion"), strokeDash=[2, 3], size=1.5)
    text = _data(limits).mark_text(align="right", dy=-8).encode(x=alt.value("width"), y="at:Q", text="text:N")
    return styled(points + rule.encode(y="at:Q") + text if limits else points, width, 240)


def map_figure(mapped: EmbeddingMap, sample: Sequence[SampledRecord], files: Sequence[str], width: int) -> Figure:
    """Embeddings on two axes, coloured by input file: the largest files have a colour each, the rest share one."""
    sizes = Counter(record.file for record in sample)
    large = {file for file, _ in sizes.most_common(len(PALETTE))}
    # In input order, so that colours do not change places from run to run.
    named = [file for file in files if file in large]
    names = Counter(map(_short_path, named))
    labels = {file: _short_path(file) if names[_short_path(file)] == 1 else _short_path(file, 2) for file in named}
    shades = {"other files": "grey"} | dict(zip(labels.values(), PALETTE))
    thinned = 1 if width > NARROW else -(-len(sample) // MOST_POINTS_ON_A_PHONE)
    rows = [
        {
            "x": x,
            "y": y,
            "file": labels.get(record.file, "other files"),
            "what": f"{_cut(record.id)}\n{record.length:,} residues\n{_short_path(record.file)}",
        }
        for (x, y), record in zip(mapped.points[::thinned].tolist(), sample[::thinned])
    ]
    first, second = mapped.explained
    points = _data(rows).mark_circle(size=40 if len(rows) < 2000 else 14, opacity=0.75)
    x, y = (
        channel(
            field, scale=alt.Scale(zero=False), axis=alt.Axis(title=title, grid=grid, tickCount=max(4, width // 130))
        )
        for channel, field, title, grid in (
            (alt.X, "x:Q", f"first component, {first:.0%} of the variance", False),
            (alt.Y, "y:Q", f"second component, {second:.0%}", True),
        )
    )
    points = points.encode(x=x, y=y, color=_legend("file", shades, rows, width), description="what:N")
    return styled(points, width, 430 if width > NARROW else 320)


def colour(name: str) -> str:
    """A colour of the page."""
    return f"var(--{name})"


def styled(chart: Figure, width: int | None, height: int | None) -> Figure:
    """What all figures share. width: of the whole; height: of the plot; None where the chart has them."""
    if width is not None:
        fit = alt.AutoSizeParams(type="fit-x", contains="padding")
        chart = chart.properties(width=width, height=height, autosize=fit)
    return (
        chart.properties(padding=2, background="transparent")
        .configure(font="system-ui, sans-serif")
        .configure_view(stroke=None)
        .configure_text(color=colour("ink"), fontSize=12, aria=False)
        .configure_axis(
            aria=False,
            grid=False,
            gridColor=colour("line"),
            domainColor=colour("line"),
            ticks=False,
            title=None,
            titleColor=colour("quiet"),
            titleFontSize=13,
            titleFontWeight="normal",
            titlePadding=8,
            labelColor=colour("quiet"),
            labelFontSize=12,
            labelPadding=6,
            labelAngle=0,
            labelFlush=False,
        )
        .configure_axisQuantitative(format=",.4~f")
        .configure_legend(
            aria=False,
            title=None,
            orient="top",
            symbolType="circle",
            labelColor=colour("ink"),
            labelFontSize=12,
            labelLimit=320,
            columnPadding=30,
        )
    )


def _data(rows: Iterable[Mapping[str, Any]]) -> alt.Chart:
    return alt.Chart(pl.DataFrame(list(rows)))


def _names(width: int, names: Iterable[str]) -> alt.Axis:
    """An axis of names, with room for them in any font."""
    most = 2 * width // 5
    return alt.Axis(labelLimit=most, minExtent=min(most, _LETTER * max(map(len, names)) + 6))


def _legend(field: str, shades: Mapping[str, str], rows: Sequence[Mapping[str, Any]], width: int) -> alt.Color:
    """Colours of a field's values, with a legend above the plot if there are several. shades: in their order."""
    present = {row[field] for row in rows}
    names = [name for name in shades if name in present]
    columns = min(len(names), max(1, width // (_LETTER * max(map(len, names)) + 44)))
    legend = alt.Legend(columns=columns) if len(names) > 1 else None
    scale = alt.Scale(domain=names, range=[colour(shades[name]) for name in names])
    return alt.Color(f"{field}:N", scale=scale, legend=legend)


def _moment(seconds: float) -> str:
    """A time of this machine, for a scale that knows no zones."""
    return datetime.datetime.fromtimestamp(seconds).isoformat(timespec="milliseconds") + "Z"


_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def _short(value: float) -> str:
    """Three digits, or all of a large number."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _short_path(path: str, parts: int = 1, letters: int = 40) -> str:
    """The end of a path that fits a legend."""
    name = "/".join(path.split("/")[-parts:])
    return name if len(name) <= letters else f"…{name[-letters:]}"


def _cut(text: str, letters: int = 60) -> str:
    """The beginning of a long text."""
    return text if len(text) <= letters else f"{text[: letters - 1]}…"
