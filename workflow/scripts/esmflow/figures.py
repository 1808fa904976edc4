"""Figures about records: what became of them, why some have no embedding, how long they are; and the disk they take.

Every figure is made with plotly and returned as its `Figure`.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import plotly.graph_objects as go

from esmflow.figure_style import colour, level_bars, styled
from esmflow.manifest_counts import LONGEST, ManifestCounts
from esmflow.words import bytes_in_words

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
