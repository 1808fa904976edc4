"""Figures of the embeddings: how right they are, and where they lie."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt
import numpy as np

from esmflow.method import LongSequences
from esmflow.report.embedding_map import EmbeddingMap
from esmflow.report.figures.style import NARROW, PALETTE, Figure, colour, data_of, legend_of, short_path, styled
from esmflow.report.manifest_counts import SampledRecord
from esmflow.text import shown
from esmflow.verify.certificate import Certificate

MOST_POINTS_ON_A_PHONE = 2000
_SHORT_TO_LONG = ("yellow", "green", "sky", "blue", "purple")


def certificate_figure(certificate: Certificate, long: LongSequences, width: int) -> Figure:
    """How far each sampled embedding is from the one that was computed again: one minus the cosine, by length.

    long: what was cut, which is what the length is of.
    """
    # Double precision says no more than this.
    smallest = 1e-15
    rows: list[dict[str, Any]] = [
        {
            "length": long.embedded(entry.length),
            "distance": math.log10(max(1 - found.cosine, smallest)),
            "output": name,
            "what": f"{shown(entry.id, 60)}\ncosine 1 − {max(1 - found.cosine, smallest):.1e}",
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
    axis = alt.Axis(title="residues compared", tickCount=width // 100)
    x = alt.X("length:Q", scale=alt.Scale(zero=False), axis=axis)
    shades = {name: shade for name, shade in zip(names, PALETTE * len(names))}
    points = data_of(rows).mark_circle(size=45, opacity=0.8)
    points = points.encode(x=x, y=y, color=legend_of("output", shades, rows, width), description="what:N")
    rule = data_of(limits).mark_rule(color=colour("vermillion"), strokeDash=[2, 3], size=1.5)
    text = data_of(limits).mark_text(align="right", dy=-8).encode(x=alt.value("width"), y="at:Q", text="text:N")
    return styled(points + rule.encode(y="at:Q") + text if limits else points, width, 240)


@dataclass(frozen=True)
class Colouring:
    """What the points of a map are coloured by. values: of each record; shades: the colour of each value, in order."""

    what: str
    values: Sequence[str]
    shades: Mapping[str, str]


def colourings(sample: Sequence[SampledRecord], files: Sequence[str], samples: Sequence[str]) -> list[Colouring]:
    """By sample and by input file where there are several, and by length."""
    found = []
    if len(samples) > 1:
        found.append(_by_name("sample", [record.sample for record in sample], samples))
    if len(files) > 1:
        found.append(_by_name("input file", [record.file for record in sample], files))
    return [*found, _by_length([record.length for record in sample])]


def _by_name(what: str, names: Sequence[str], known: Sequence[str]) -> Colouring:
    """The most frequent have a colour each, the rest share one."""
    frequent = {name for name, _ in Counter(names).most_common(len(PALETTE))}
    # In input order, so that colours do not change places from run to run.
    named = [name for name in known if name in frequent]
    ends = Counter(map(short_path, named))
    labels = {name: short_path(name) if ends[short_path(name)] == 1 else short_path(name, 2) for name in named}
    others = f"other {what}s"
    shades = {others: "grey"} | dict(zip(labels.values(), PALETTE))
    return Colouring(what, [labels.get(name, others) for name in names], shades)


def _by_length(lengths: Sequence[int]) -> Colouring:
    """In up to five classes of about as many records each."""
    edges = np.unique(np.quantile(lengths, np.linspace(0, 1, len(_SHORT_TO_LONG) + 1)).round().astype(int)).tolist()
    lows = edges[:-1] or edges
    highs = [*(edge - 1 for edge in edges[1:-1]), edges[-1]]
    words = [f"{low:,}" if low == high else f"{low:,}–{high:,}" for low, high in zip(lows, highs)]
    classes = np.searchsorted(lows, lengths, "right") - 1
    shades = {f"{word} residues": shade for word, shade in zip(words, _SHORT_TO_LONG)}
    return Colouring("length", [f"{words[number]} residues" for number in classes], shades)


def map_figure(
    mapped: EmbeddingMap, sample: Sequence[SampledRecord], colouring: Colouring, most: int, width: int
) -> Figure:
    """Embeddings on two axes, in colours. most: points on a screen; a phone gets fewer."""
    thinned = -(-len(sample) // (most if width > NARROW else min(most, MOST_POINTS_ON_A_PHONE)))
    rows = [
        {
            "x": x,
            "y": y,
            "value": value,
            "what": f"{shown(record.id, 60)}\n{record.length:,} residues\n{short_path(record.file)}",
        }
        for (x, y), record, value in zip(
            mapped.framed[::thinned].tolist(), sample[::thinned], colouring.values[::thinned]
        )
    ]
    first, second = mapped.explained
    points = data_of(rows).mark_circle(size=40 if len(rows) < 2000 else 14, opacity=0.75)
    x, y = (
        channel(
            field, scale=alt.Scale(zero=False), axis=alt.Axis(title=title, grid=grid, tickCount=max(4, width // 130))
        )
        for channel, field, title, grid in (
            (alt.X, "x:Q", f"first component, {first:.0%} of the variance", False),
            (alt.Y, "y:Q", f"second component, {second:.0%}", True),
        )
    )
    points = points.encode(x=x, y=y, color=legend_of("value", colouring.shades, rows, width), description="what:N")
    return styled(points, width, 430 if width > NARROW else 320)


_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
