"""Figures about the run: what the slots did, how fast the groups were, how right the embeddings are, and their map.

Every figure is made with plotly and returned as its `Figure`.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
import plotly.graph_objects as go

from esmflow.embedding_map import EmbeddingMap
from esmflow.figure_style import PALETTE, axis, colour, cut, power_of_ten, short_number, short_path, styled
from esmflow.manifest_counts import SampledRecord
from esmflow.slot_timeline import COMPUTE, IDLE, LOAD, WRITE, Piece

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


def speed_figure(runs: Sequence[Mapping[str, Any]]) -> go.Figure:
    """Residues per second of each group while it computed, above the peak of its card's memory."""
    ran = [run for run in runs if run["residues_per_second"]]
    groups = [run["group"] for run in ran]
    memory = [run["peak_memory_bytes"] / GIB for run in ran]
    figure = go.Figure()
    for rows, values, shade, unit in (
        ("y", [run["residues_per_second"] for run in ran], "blue", "residues/s"),
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


def certificate_figure(certificate: Mapping[str, Any]) -> go.Figure:
    """How far each sampled embedding is from the one that was computed again: one minus the cosine, by length."""
    figure = go.Figure()
    # Double precision says no more than this.
    smallest = 1e-15
    names = sorted({name for entry in certificate["sequences"] for name in entry["outputs"]})
    for name, shade in zip(names, PALETTE * len(names)):
        entries = [entry for entry in certificate["sequences"] if name in entry["outputs"]]
        distances = np.maximum([1 - entry["outputs"][name]["cosine"] for entry in entries], smallest)
        figure.add_scatter(
            x=[entry["length"] for entry in entries],
            y=np.log10(distances),
            mode="markers",
            name=name,
            showlegend=len(names) > 1,
            marker={"color": colour(shade), "size": 7, "opacity": 0.8},
            text=[f"{escape(cut(entry['id']))}<br>cosine 1 − {value:.1e}" for entry, value in zip(entries, distances)],
            hovertemplate="%{text}<extra></extra>",
        )
    limits = certificate.get("limits") or {}
    for precision, limit in limits.items():
        if limit["min_cosine"] < 1:
            at = float(np.log10(1 - limit["min_cosine"]))
            figure.add_hline(at, line={"color": colour("vermillion"), "width": 1.5, "dash": "dot"})
            text = f"limit for {precision}: cosine {limit['min_cosine']}"
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
