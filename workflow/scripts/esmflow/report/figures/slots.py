"""Figures of what the slots did when, and of how fast the groups were."""

from __future__ import annotations

import datetime
from collections.abc import Sequence

import altair as alt
import numpy as np

from esmflow.embedding.run_record import RunRecord
from esmflow.report.figures.style import GIB, LETTER, Figure, axis_of_names, colour, data_of, legend_of, short, styled
from esmflow.report.timeline import COMPUTE, IDLE, LOAD, WRITE, Piece

# A figure stays readable, and the page small, up to these.
MOST_BARS = 120
_KINDS = {LOAD: "yellow", COMPUTE: "blue", WRITE: "green", IDLE: "faint"}


def timeline_figure(pieces: Sequence[Piece], width: int) -> Figure:
    """What each slot did when; the groups' numbers stand on their longest pieces."""
    began, ended = min(piece.started for piece in pieces), max(piece.ended for piece in pieces)
    slots = sorted({piece.slot for piece in pieces})
    pixel = (ended - began) / (width - LETTER * max(map(len, slots)))
    longest: dict[tuple[str, str], Piece] = {}
    for piece in pieces:
        if piece.kind == COMPUTE:
            key = piece.slot, piece.group
            longest[key] = max(longest.get(key, piece), piece, key=lambda piece: piece.seconds)
    numbers = [
        {"slot": piece.slot, "at": _moment((piece.started + piece.ended) / 2), "group": piece.group}
        for piece in longest.values()
        if piece.seconds > (LETTER * len(piece.group) + 4) * pixel
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
    y = alt.Y("slot:N", sort=None, title=None, axis=axis_of_names(width, slots), scale=alt.Scale(domain=slots))
    scale = alt.Scale(type="utc", domain=[_moment(began), _moment(ended)], nice=False)
    bars = (
        data_of(rows)
        .mark_bar(stroke=colour("card"), strokeWidth=0.7)
        .encode(
            x=alt.X("start:T", axis=time, scale=scale),
            x2="end:T",
            y=y,
            color=legend_of("kind", _KINDS, rows, width),
            description="what:N",
        )
    )
    text = data_of(numbers or [{"slot": slots[0], "at": _moment(began), "group": ""}]).mark_text(color=colour("card"))
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
    every = -(-LETTER * (len(names[-1]) + 1) * len(names) // inside)
    below = alt.Axis(title="group", values=names[::every])
    plots = []
    for values, title, unit, shade, height, axis in (
        (speeds, "residues/s", "residues/s", "blue", 170, None),
        (memory, "memory, GiB", "GiB at most", "purple", 120, below),
    ):
        data = data_of(
            {"group": name, "value": value, "text": short(value), "what": f"group {name}\n{short(value)} {unit}"}
            for name, value in zip(names, values)
        )
        x = alt.X("group:N", sort=None, axis=axis)
        y = alt.Y("value:Q", axis=alt.Axis(grid=True, title=title, minExtent=45, maxExtent=45, tickCount=4))
        bars = data.mark_bar(color=colour(shade), size=min(70, 0.65 * inside / len(names)))
        fits = inside / len(names) > LETTER * max(map(len, map(short, values)))
        texts = [data.mark_text(dy=-8).encode(x, y, text="text:N")] if fits else []
        plots.append(alt.layer(bars.encode(x, y, description="what:N"), *texts).properties(width=inside, height=height))
    return styled(alt.vconcat(*plots, spacing=26), None, None)


def _moment(seconds: float) -> str:
    """A time of this machine, for a scale that knows no zones."""
    return datetime.datetime.fromtimestamp(seconds).isoformat(timespec="milliseconds") + "Z"
