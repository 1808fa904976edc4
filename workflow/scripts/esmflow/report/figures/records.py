"""Figures of what became of the records, of their lengths, and of what is on disk."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise

import altair as alt
import numpy as np

from esmflow.report.figures.style import LETTER, Figure, axis_of_names, colour, data_of, legend_of, styled
from esmflow.report.manifest_counts import LONGEST, ManifestCounts
from esmflow.text import bytes_in_words

_LENGTHS = {
    "whole": ("embedded whole", "blue"),
    "truncated": ("embedded, truncated", "orange"),
    "windowed": ("embedded in windows", "green"),
    "failed": ("failed", "vermillion"),
    "rejected": ("rejected", "grey"),
}
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
    flows = data_of(ribbons).mark_area(opacity=0.28).encode(x, y, shade, y2="y2", detail="what:N", description="what:N")
    bars = data_of(boxes).mark_rect().encode(x, y, shade, x2="x2", y2="y2", description="what:N")
    names = (
        data_of(boxes)
        .mark_text(lineBreak="\n", align="left", baseline="top", dx=6)
        .encode(right, middle, text="label:N")
    )
    return styled(flows + bars + names, width, height + 16)


def reasons_figure(counts: ManifestCounts, width: int) -> Figure:
    """Records without an embedding, by reason."""
    rows = [(reason, n, f"{n:,}", f"{n:,} records") for reason, n in counts.reasons.most_common()]
    return _level_bars(rows, "vermillion", width)


def disk_figure(sizes: Mapping[str, int], width: int) -> Figure:
    """Bytes on disk, by what they are for."""
    ordered = sorted(sizes.items(), key=lambda item: -item[1])
    return _level_bars([(name, n, bytes_in_words(n), bytes_in_words(n)) for name, n in ordered], "sky", width)


def _level_bars(rows: Sequence[tuple[str, float, str, str]], shade: str, width: int) -> Figure:
    """Horizontal bars with values beside them. rows: name, size, value and what the bar says, the largest first."""
    data = data_of(
        {"name": name, "size": size, "text": text, "what": f"{name}: {what}"} for name, size, text, what in rows
    )
    # The values need room.
    room = 1 + LETTER * (2 + max(len(text) for _, _, text, _ in rows)) / (0.6 * width)
    x = alt.X("size:Q", axis=None, scale=alt.Scale(domain=[0, room * max(max(size for _, size, *_ in rows), 1)]))
    y = alt.Y(
        "name:N", sort=None, axis=axis_of_names(width, (name for name, *_ in rows)), scale=alt.Scale(paddingInner=0.4)
    )
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
        data_of(row for row in rows if row["records"])
        .mark_bar(stroke=colour("card"), strokeWidth=0.7)
        .encode(
            x=alt.X("low:Q", bin="binned", scale=scale, axis=axis),
            x2="high",
            y=alt.Y("records:Q", stack="zero", axis=alt.Axis(grid=True, title="records", tickMinStep=1)),
            color=legend_of("kind", {name: shade for _, (name, shade) in _LENGTHS.items()}, rows, width),
            order=alt.Order("order:Q"),
            description="what:N",
        )
    )
    layers: list[alt.Chart] = [bars]
    if max_residues is not None and edges[0] < max_residues < edges[-1]:
        limit = data_of([{"at": max_residues + 1, "text": f"max_residues {max_residues:,}"}])
        layers.append(limit.mark_rule(color=colour("ink"), strokeDash=[2, 3]).encode(x="at:Q"))
        layers.append(limit.mark_text(align="right", dx=3, dy=-8).encode(x="at:Q", y=alt.value(0), text="text:N"))
    return styled(alt.layer(*layers), width, 250)


def _length_edges(shortest: int, longest: int, logarithmic: bool) -> np.ndarray:
    """About forty bins of whole lengths: bin i holds `edges[i]` to `edges[i + 1] - 1` residues."""
    if logarithmic:
        return np.unique(np.round(np.geomspace(shortest, longest + 1, 41)).astype(np.int64))
    step = -(-(longest + 1 - shortest) // 40)
    return np.append(np.arange(shortest, longest + 1, step), longest + 1)
