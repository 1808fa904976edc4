"""Figures about records: what became of them, why some have no embedding, how long they are; and the disk they take.

Every figure is made with plotly and returned as its `Figure`.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from html import escape
from itertools import pairwise
from typing import Any

import numpy as np
import plotly.graph_objects as go

from esmflow.embed.run_record import RunRecord
from esmflow.report.embedding_map import EmbeddingMap
from esmflow.report.manifest_counts import LONGEST, ManifestCounts, SampledRecord
from esmflow.report.timeline import COMPUTE, IDLE, LOAD, WRITE, Piece
from esmflow.text import bytes_in_words
from esmflow.verify.certificate import Certificate

_LENGTHS = {
    "whole": ("embedded whole", "blue"),
    "truncated": ("embedded, truncated", "orange"),
    "windowed": ("embedded in windows", "green"),
    "failed": ("failed", "vermillion"),
    "rejected": ("rejected", "grey"),
}


def flow_figure(counts: ManifestCounts) -> go.Figure:
    """Records from the input to what became of them."""
    embedded, failed, rejected = (counts.records(status) for status in ("embedded", "failed", "rejected"))
    sequences = counts.computed + counts.reused + counts.failed
    repeats = embedded + failed - sequences
    nodes = {
        "records": ("Records", counts.total, "grey"),
        "unique": ("Unique", sequences, "sky"),
        "repeats": ("Duplicates", repeats, "purple"),
        "computed": ("Computed", counts.computed, "blue"),
        "reused": ("Reused", counts.reused, "yellow"),
        "embedded": ("Embedded", embedded, "green"),
        "failed": ("Failed", failed, "vermillion"),
        "rejected": ("Rejected", rejected, "orange"),
    }
    links = [
        ("records", "unique", sequences),
        ("records", "repeats", repeats),
        ("records", "rejected", rejected),
        ("unique", "computed", counts.computed),
        ("unique", "reused", counts.reused),
        ("unique", "failed", counts.failed),
        ("computed", "embedded", counts.computed),
        ("reused", "embedded", counts.reused),
        ("repeats", "embedded", embedded - counts.computed - counts.reused),
        ("repeats", "failed", failed - counts.failed),
    ]
    links = [link for link in links if link[2]]
    shown = [name for name in nodes if any(name in link[:2] for link in links)]
    figure = go.Figure(
        go.Sankey(
            arrangement="snap",
            node={
                "label": [f"{nodes[name][0]}<br>{nodes[name][1]:,}" for name in shown],
                "color": [colour(nodes[name][2]) for name in shown],
                "pad": 36,
                "thickness": 14,
                "line": {"width": 0},
                "customdata": [nodes[name][0] for name in shown],
                "hovertemplate": "%{customdata}: %{value:,}<extra></extra>",
            },
            link={
                "source": [shown.index(source) for source, _, _ in links],
                "target": [shown.index(target) for _, target, _ in links],
                "value": [number for _, _, number in links],
                "color": [colour(f"{nodes[target][2]}-soft") for _, target, _ in links],
                "hovertemplate": "%{source.customdata} → %{target.customdata}: %{value:,}<extra></extra>",
            },
        )
    )
    # The words of a thin box reach below it.
    return styled(figure, height=340).update_layout(margin_b=26)


def reasons_figure(counts: ManifestCounts) -> go.Figure:
    """Records without an embedding, by reason."""
    reasons = [reason for reason, _ in reversed(counts.reasons.most_common())]
    numbers = [counts.reasons[reason] for reason in reasons]
    names = [reason.replace("_", " ") for reason in reasons]
    figure = go.Figure(level_bars(names, numbers, [f"{n:,}" for n in numbers], "vermillion", "%{y}: %{text} records"))
    return styled(figure, height=80 + 40 * len(reasons), x={"showticklabels": False}, grid="none")


def lengths_figure(counts: ManifestCounts, max_residues: int | None) -> go.Figure:
    """Records by length: on a logarithmic scale if lengths spread over more than one order of magnitude."""
    total = np.sum([*counts.lengths.values(), np.zeros(LONGEST + 2, np.int64)], axis=0)
    present = np.flatnonzero(total[1:]) + 1
    shortest, longest = (int(present[0]), int(present[-1])) if len(present) else (1, 1)
    logarithmic = longest > 10 * shortest
    edges = _length_edges(shortest, longest, logarithmic)
    scale = np.log10 if logarithmic else np.asarray
    low, high = scale(edges[:-1]), scale(edges[1:])
    figure = go.Figure()
    for kind, (name, shade) in _LENGTHS.items():
        if kind in counts.lengths:
            heights = np.add.reduceat(counts.lengths[kind], edges)[:-1]
            ranges = [f"{a:,}" if b == a + 1 else f"{a:,}–{b - 1:,}" for a, b in pairwise(edges)]
            figure.add_bar(
                x=(low + high) / 2,
                y=heights,
                width=high - low,
                name=name,
                marker={"color": colour(shade), "line": {"color": colour("card"), "width": 1}},
                customdata=ranges,
                hovertemplate=f"%{{customdata}} residues: %{{y:,}} {name}<extra></extra>",
            )
    ticks: dict[str, Any] = {"title": "residues"}
    if logarithmic:
        marks = [m * 10**power for power in range(6) for m in (1, 3) if edges[0] <= m * 10**power <= edges[-1]]
        ticks |= {"tickvals": [float(np.log10(mark)) for mark in marks], "ticktext": [f"{mark:,}" for mark in marks]}
    if max_residues is not None and edges[0] < max_residues < edges[-1]:
        at = float(scale(max_residues + 0.5))
        figure.add_vline(at, line={"color": colour("ink"), "width": 1.5, "dash": "dot"})
        figure.add_annotation(
            x=at,
            y=1,
            yref="paper",
            text=f"max_residues {max_residues:,}",
            showarrow=False,
            yanchor="top",
            xanchor="right",
        )
    figure.update_layout(barmode="stack", bargap=0)
    return styled(figure, height=340, x=ticks, y={"title": "records", "rangemode": "tozero", "tickformat": ","})


def _length_edges(shortest: int, longest: int, logarithmic: bool) -> np.ndarray:
    """About forty bins of whole lengths: bin i holds `edges[i]` to `edges[i + 1] - 1` residues."""
    if logarithmic:
        return np.unique(np.round(np.geomspace(shortest, longest + 1, 41)).astype(np.int64))
    step = -(-(longest + 1 - shortest) // 40)
    return np.append(np.arange(shortest, longest + 1, step), longest + 1)


def disk_figure(sizes: Mapping[str, int]) -> go.Figure:
    """Bytes on disk, by what they are for."""
    names = sorted(sizes, key=lambda name: sizes[name])
    texts = [bytes_in_words(sizes[name]) for name in names]
    figure = go.Figure(level_bars(names, [sizes[name] for name in names], texts, "sky", "%{y}: %{text}"))
    return styled(figure, height=80 + 40 * len(names), x={"showticklabels": False}, grid="none")


GIB = 2**30

_KIND_COLOURS = {LOAD: "yellow", COMPUTE: "blue", WRITE: "green", IDLE: "faint"}


def timeline_figure(pieces: Sequence[Piece]) -> go.Figure:
    """What each slot did when; the groups' numbers stand on their longest pieces."""
    slots = sorted({piece.slot for piece in pieces}, reverse=True)
    longest: dict[tuple[str, str], Piece] = {}
    for piece in pieces:
        key = piece.slot, piece.group
        if piece.kind == COMPUTE and piece.seconds >= longest.get(key, piece).seconds:
            longest[key] = piece
    numbered = set(map(id, longest.values()))
    figure = go.Figure()
    for kind, shade in _KIND_COLOURS.items():
        of_kind = [piece for piece in pieces if piece.kind == kind]
        if of_kind:
            figure.add_bar(
                orientation="h",
                y=[piece.slot for piece in of_kind],
                base=[_moment(piece.started) for piece in of_kind],
                x=[1000 * piece.seconds for piece in of_kind],
                width=0.62,
                name=kind,
                marker={"color": colour(shade), "line": {"color": colour("card"), "width": 1}},
                text=[piece.group if id(piece) in numbered else "" for piece in of_kind],
                textposition="inside",
                insidetextanchor="middle",
                textangle=0,
                textfont={"color": colour("card")},
                customdata=[(piece.group, escape(piece.what), f"{piece.seconds:,.2f}") for piece in of_kind],
                hovertemplate=f"group %{{customdata[0]}}, {kind} %{{customdata[2]}} s<br>%{{customdata[1]}}"
                "<extra></extra>",
            )
    figure.update_layout(barmode="overlay")
    y = {"categoryorder": "array", "categoryarray": slots, "automargin": True}
    return styled(
        figure, height=110 + max(18, min(44, 900 // len(slots))) * len(slots), x={"type": "date"}, y=y, grid="x"
    )


def speed_figure(runs: Sequence[RunRecord]) -> go.Figure:
    """Residues per second of each group while it computed, above the peak of its card's memory."""
    ran = [run for run in runs if run.residues_per_second]
    groups = [run.group for run in ran]
    memory = [(run.peak_memory_bytes or 0) / GIB for run in ran]
    figure = go.Figure()
    for rows, values, shade, unit in (
        ("y", [run.residues_per_second or 0 for run in ran], "blue", "residues/s"),
        ("y2", memory, "purple", "GiB at most"),
    ):
        figure.add_bar(
            x=groups,
            y=values,
            yaxis=rows,
            xaxis="x" if rows == "y" else "x2",
            width=min(0.65, 0.11 * len(ran)),
            marker={"color": colour(shade)},
            text=[short_number(value) for value in values],
            textposition="outside" if len(ran) <= 24 else "none",
            cliponaxis=False,
            hovertemplate=f"group %{{x}}: %{{y:,.3~f}} {unit}<extra></extra>",
            showlegend=False,
        )
    figure.update_layout(
        bargap=0.35,
        xaxis2=axis(title="group", type="category", anchor="y2", matches="x"),
        yaxis2=axis(grid=True, title="memory, GiB", domain=[0, 0.36], rangemode="tozero"),
    )
    y = {"domain": [0.56, 1], "title": "residues/s", "rangemode": "tozero", "tickformat": ","}
    return styled(figure, height=420, x={"type": "category", "showticklabels": False}, y=y)


def certificate_figure(certificate: Certificate) -> go.Figure:
    """How far each sampled embedding is from the one that was computed again: one minus the cosine, by length."""
    figure = go.Figure()
    # Double precision says no more than this.
    smallest = 1e-15
    names = sorted({name for entry in certificate.sequences for name in entry.outputs})
    for name, shade in zip(names, PALETTE * len(names)):
        entries = [entry for entry in certificate.sequences if name in entry.outputs]
        distances = np.maximum([1 - entry.outputs[name].cosine for entry in entries], smallest)
        figure.add_scatter(
            x=[entry.length for entry in entries],
            y=np.log10(distances),
            mode="markers",
            name=name,
            showlegend=len(names) > 1,
            marker={"color": colour(shade), "size": 7, "opacity": 0.8},
            text=[f"{escape(cut(entry.id))}<br>cosine 1 − {value:.1e}" for entry, value in zip(entries, distances)],
            hovertemplate="%{text}<extra></extra>",
        )
    for precision, limit in certificate.limits.items():
        if limit.min_cosine < 1:
            at = float(np.log10(1 - limit.min_cosine))
            figure.add_hline(at, line={"color": colour("vermillion"), "width": 1.5, "dash": "dot"})
            text = f"limit for {precision}: cosine {limit.min_cosine}"
            figure.add_annotation(
                x=1, xref="paper", xanchor="right", y=at, yanchor="bottom", text=text, showarrow=False
            )
    powers = list(range(-15, 1))
    ticks = {"tickvals": powers, "ticktext": [power_of_ten(power) for power in powers], "title": "1 − cosine"}
    return styled(figure, height=320, x={"title": "residues", "rangemode": "tozero"}, y=ticks)


def map_figure(mapped: EmbeddingMap, sample: Sequence[SampledRecord], files: Sequence[str]) -> go.Figure:
    """Embeddings on two axes, coloured by input file: the largest files have a colour each, the rest share one."""
    of_file = np.array([record.file for record in sample])
    sizes = {file: int((of_file == file).sum()) for file in files}
    large = sorted(sizes, key=lambda file: -sizes[file])[: len(PALETTE)]
    # In input order, so that colours do not change places from run to run.
    named = [file for file in files if file in large and sizes[file]]
    figure = go.Figure()
    shades = dict(zip(named, PALETTE))
    for name, mask, shade in [
        ("other files", ~np.isin(of_file, named), "grey"),
        *((short_path(file), of_file == file, shades[file]) for file in named),
    ]:
        members = np.flatnonzero(mask).tolist()
        if members:
            figure.add_scatter(
                x=mapped.points[members, 0],
                y=mapped.points[members, 1],
                mode="markers",
                name=escape(name),
                marker={"color": colour(shade), "size": 7 if len(sample) < 2000 else 4, "opacity": 0.75},
                text=[f"{escape(cut(sample[i].id))}<br>{sample[i].length:,} residues" for i in members],
                hovertemplate="%{text}<extra>%{fullData.name}</extra>",
            )
    first, second = mapped.explained
    return styled(
        figure,
        height=520,
        x={"title": f"first component, {first:.0%} of the variance", "zeroline": False},
        y={"title": f"second component, {second:.0%}", "zeroline": False},
    )


def _moment(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds).isoformat(sep=" ", timespec="milliseconds")


# Okabe and Ito's colours, which people with any colour vision can tell apart; the page has shades for light and dark.
PALETTE = ("blue", "orange", "green", "purple", "sky", "vermillion", "yellow")


def colour(name: str) -> str:
    """A colour of the page."""
    return f"var(--{name})"


def short_path(path: str, letters: int = 40) -> str:
    """The end of a path that fits a legend."""
    name = path.rpartition("/")[2]
    return name if len(name) <= letters else f"…{name[-letters:]}"


def level_bars(names: Sequence[str], values: Sequence[float], texts: Sequence[str], shade: str, hover: str) -> go.Bar:
    """Horizontal bars, the largest on top, each with its value beside it."""
    return go.Bar(
        orientation="h",
        x=values,
        y=[escape(name) for name in names],
        width=0.6,
        text=texts,
        textposition="outside",
        cliponaxis=False,
        marker={"color": colour(shade)},
        hovertemplate=f"{hover}<extra></extra>",
        showlegend=False,
    )


def styled(
    figure: go.Figure, height: int, x: dict[str, Any] | None = None, y: dict[str, Any] | None = None, grid: str = "y"
) -> go.Figure:
    """What all figures share."""
    # What is written beside horizontal bars needs room.
    right = 72 if figure.data[0].orientation == "h" and figure.data[0].textposition == "outside" else 16
    legend = any(trace.name and trace.showlegend is not False for trace in figure.data)
    figure.update_layout(
        template="none",
        height=height,
        margin={"l": 8, "r": right, "t": 34 if legend else 18, "b": 8},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, sans-serif", "size": 13, "color": colour("ink")},
        hoverlabel={"bgcolor": colour("card"), "bordercolor": colour("line"), "font": {"color": colour("ink")}},
        legend={
            "orientation": "h",
            "x": 0,
            "y": 1,
            "xanchor": "left",
            "yanchor": "bottom",
            "traceorder": "normal",
        },
        xaxis=axis(grid == "x", **(x or {})),
        yaxis=axis(grid == "y", **(y or {})),
    )
    return figure


def axis(grid: bool = False, title: str = "", **more: Any) -> dict[str, Any]:
    """An axis of a figure."""
    return {
        "automargin": True,
        "gridcolor": colour("line"),
        "showgrid": grid,
        "linecolor": colour("line"),
        "zerolinecolor": colour("line"),
        "tickfont": {"color": colour("quiet"), "size": 12},
        "title": {"text": title, "font": {"color": colour("quiet"), "size": 13}},
        **more,
    }


def power_of_ten(power: int) -> str:
    """Such as `10⁻⁵`."""
    return "10" + str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def short_number(value: float) -> str:
    """Three digits, or all of a large number."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def cut(text: str, letters: int = 60) -> str:
    """The beginning of a long text."""
    return text if len(text) <= letters else f"{text[: letters - 1]}…"
