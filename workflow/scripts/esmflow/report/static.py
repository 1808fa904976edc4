"""The report's figures as SVG, for Snakemake's own report.

That report shows a page of its own in a frame whose address holds the whole content, and browsers open no address of
the size of plotly's script; pictures they do. So the same plotly figures are drawn here without a browser: bars,
points and flows, with the axes, lines and legends that the report uses, and nothing more.
"""

from __future__ import annotations

import datetime
import math
import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
import plotly.graph_objects as go

WIDTH = 900
_LEGEND, _GAP = 34, 12
_LETTER = 6.6
"""About the width of a letter at 12 px."""


class Drawing:
    """Collects the elements of an SVG. Colours are names of the page's colours, as `var(--name)`, or plain ones."""

    def __init__(self, height: float, style: str) -> None:
        self.height = height
        # The style begins with the light colours.
        light = style[style.index("{") : style.index("}")]
        self._colours = dict(re.findall(r"(--[\w-]+):\s*(#\w+)", light))
        self._elements: list[str] = []

    def paint(self, colour: str, attribute: str = "fill") -> str:
        """An attribute with a colour; a translucent one is written as two, which every program reads."""
        named = re.fullmatch(r"var\((--[\w-]+)\)", colour)
        value = self._colours[named[1]] if named else colour
        if len(value) == 9:
            return f'{attribute}="{value[:7]}" {attribute}-opacity="{int(value[7:], 16) / 255:.2f}"'
        return f'{attribute}="{value}"'

    def box(self, x: float, y: float, width: float, height: float, colour: str, more: str = "") -> None:
        """A filled rectangle."""
        self._elements.append(
            f'<rect x="{x:.2f}" y="{y:.2f}" width="{max(width, 0.3):.2f}" height="{max(height, 0.3):.2f}" '
            f"{self.paint(colour)} {more}/>"
        )

    def line(self, x0: float, y0: float, x1: float, y1: float, colour: str, dots: bool = False) -> None:
        """A straight line."""
        dash = ' stroke-dasharray="2 3" stroke-width="1.5"' if dots else ""
        place = f'x1="{x0:.2f}" y1="{y0:.2f}" x2="{x1:.2f}" y2="{y1:.2f}"'
        self._elements.append(f"<line {place} {self.paint(colour, 'stroke')}{dash}/>")

    def point(self, x: float, y: float, radius: float, colour: str, opacity: float) -> None:
        """A filled circle."""
        self._elements.append(
            f'<circle cx="{x:.2f}" cy="{y:.2f}" r="{radius:.1f}" {self.paint(colour)} opacity="{opacity}"/>'
        )

    def path(self, path: str, colour: str) -> None:
        """A filled path."""
        self._elements.append(f'<path d="{path}" {self.paint(colour)}/>')

    def text(
        self, x: float, y: float, text: str, anchor: str = "start", colour: str = "var(--ink)", more: str = ""
    ) -> None:
        """One line of text; what plotly takes as markup is plain here."""
        plain = re.sub(r"<br>", " ", text)
        self._elements.append(
            f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {self.paint(colour)} {more}>{plain}</text>'
        )

    def finish(self) -> str:
        """The SVG."""
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{self.height:.0f}" '
            f'viewBox="0 0 {WIDTH} {self.height:.0f}" font-family="system-ui, sans-serif" font-size="12">\n'
            f'<rect width="100%" height="100%" {self.paint("var(--card)")}/>\n'
            + "\n".join(self._elements)
            + "\n</svg>\n"
        )


def static_message(text: str, style: str) -> str:
    """A sentence in place of a figure."""
    words, lines = text.split(), [""]
    for word in words:
        if len(lines[-1]) + len(word) > 110:
            lines.append("")
        lines[-1] += f"{word} "
    drawing = Drawing(40 + 20 * len(lines), style)
    for number, line in enumerate(lines):
        drawing.text(20, 34 + 20 * number, escape(line.strip()))
    return drawing.finish()


def static_figure(figure: go.Figure, style: str) -> str:
    """Draws a figure of the report. style: the page's, for its colours."""
    # The figure's own conversion encodes arrays.
    traces, layout = [trace.to_plotly_json() for trace in figure.data], figure.layout.to_plotly_json()
    drawing = Drawing(layout["height"], style)
    if traces[0]["type"] == "sankey":
        draw_flow(drawing, traces[0], WIDTH)
    else:
        _draw_plots(drawing, traces, layout)
    return drawing.finish()


def _draw_plots(drawing: Drawing, traces: Sequence[Mapping[str, Any]], layout: Mapping[str, Any]) -> None:
    """Draws the plots of a figure, one above the other, with what is beside them."""
    top = _LEGEND if _draw_legend(drawing, traces) else _GAP
    for name in sorted({trace.get("yaxis", "y") for trace in traces}):
        mine = [trace for trace in traces if trace.get("yaxis", "y") == name]
        x_spec = layout[f"xaxis{name[1:]}"]
        y_spec = layout[f"yaxis{name[1:]}"]
        level = mine[0].get("orientation") == "h"
        x, y = axis_for(mine, "x", x_spec, layout), axis_for(mine, "y", y_spec, layout)
        left = 20 + _LETTER * max((len(label) for _, label in y.ticks), default=0) + (22 if y.title else 0)
        below = (22 if x_spec.get("showticklabels", True) else 6) + (22 if x.title else 0)
        low, high = y_spec.get("domain", (0, 1))
        whole = drawing.height - top
        x.place(left, WIDTH - (90 if level and mine[0].get("textposition") == "outside" else 24))
        y.place(top + whole * (1 - low) - below, top + whole * (1 - high) + (14 if high < 1 or top == _GAP else 0))
        _draw_axes(drawing, x, y, x_spec, y_spec)
        draw = _draw_points if mine[0]["type"] == "scatter" else _draw_bars
        draw(drawing, mine, x, y, layout)
        if name == "y":
            _draw_marks(drawing, layout, x, y)


def _draw_legend(drawing: Drawing, traces: Sequence[Mapping[str, Any]]) -> bool:
    at = 16.0
    for trace in traces:
        if trace.get("name") and trace.get("showlegend", True):
            drawing.box(at, 8, 11, 11, trace["marker"]["color"])
            drawing.text(at + 17, 18, trace["name"])
            at += 40 + _LETTER * len(trace["name"])
    return at > 16


def _draw_axes(drawing: Drawing, x: Axis, y: Axis, x_spec: Mapping[str, Any], y_spec: Mapping[str, Any]) -> None:
    quiet, line = "var(--quiet)", "var(--line)"
    for value, label in x.ticks if x_spec.get("showticklabels", True) else ():
        if x_spec.get("showgrid"):
            drawing.line(x(value), y.start, x(value), y.end, line)
        drawing.text(x(value), y.start + 16, label, "middle", quiet)
    for value, label in y.ticks:
        if y_spec.get("showgrid"):
            drawing.line(x.start, y(value), x.end, y(value), line)
        drawing.text(x.start - 8, y(value) + 4, label, "end", quiet)
    drawing.line(x.start, y.start, x.end, y.start, line)
    if x.title:
        drawing.text((x.start + x.end) / 2, y.start + 38, x.title, "middle", quiet)
    if y.title:
        middle = (y.start + y.end) / 2
        drawing.text(16, middle, y.title, "middle", quiet, f'transform="rotate(-90 16 {middle:.0f})"')


def _draw_bars(
    drawing: Drawing, traces: Sequence[Mapping[str, Any]], x: Axis, y: Axis, layout: Mapping[str, Any]
) -> None:
    stacked: dict[float, float] = {}
    for trace in traces:
        level = trace.get("orientation") == "h"
        along, across = (x, y) if level else (y, x)
        places = across.values(trace["y" if level else "x"])
        sizes = along.lengths(trace["x" if level else "y"])
        bases = along.values(trace["base"]) if "base" in trace else [0.0] * len(sizes)
        widths = trace.get("width", 1 - layout.get("bargap", 0.3))
        texts = trace.get("text") or [""] * len(sizes)
        for i, (place, size, base) in enumerate(zip(places, sizes, bases)):
            if layout.get("barmode") == "stack":
                base = stacked.get(place, 0.0)
                stacked[place] = base + size
            width = widths if isinstance(widths, float) else widths[i]
            a, b = sorted((along(base), along(base + size)))
            c, d = sorted((across(place - width / 2), across(place + width / 2)))
            box = (a, c, b - a, d - c) if level else (c, a, d - c, b - a)
            edge = trace["marker"].get("line")
            more = f"{drawing.paint(edge['color'], 'stroke')}" if edge else ""
            if size:
                drawing.box(*box, trace["marker"]["color"], more)
            _draw_value(drawing, trace, texts[i], box, level)


def _draw_value(drawing: Drawing, trace: Mapping[str, Any], text: str, box: tuple[float, ...], level: bool) -> None:
    left, top, width, height = box
    if not text or trace.get("textposition") == "none":
        return
    if trace["textposition"] == "inside":
        if width > _LETTER * len(text):
            drawing.text(left + width / 2, top + height / 2 + 4, text, "middle", trace["textfont"]["color"])
    elif level:
        drawing.text(left + width + 6, top + height / 2 + 4, text)
    else:
        drawing.text(left + width / 2, top - 5, text, "middle")


def _draw_points(
    drawing: Drawing, traces: Sequence[Mapping[str, Any]], x: Axis, y: Axis, layout: Mapping[str, Any]
) -> None:
    for trace in traces:
        marker = trace["marker"]
        for across, up in zip(x.values(trace["x"]), y.values(trace["y"])):
            drawing.point(x(across), y(up), marker["size"] / 2, marker["color"], marker["opacity"])


def _draw_marks(drawing: Drawing, layout: Mapping[str, Any], x: Axis, y: Axis) -> None:
    """Lines across the plot, such as a limit, and what is written beside them."""
    for shape in layout.get("shapes", ()):
        colour = shape["line"]["color"]
        if shape["x0"] == shape["x1"]:
            drawing.line(x(shape["x0"]), y.start, x(shape["x0"]), y.end, colour, dots=True)
        else:
            drawing.line(x.start, y(shape["y0"]), x.end, y(shape["y0"]), colour, dots=True)
    place: dict[str, Callable[[Any], float]] = {
        "x": lambda note: x.end if note.get("xref") == "paper" else x(note["x"]),
        "y": lambda note: y.end + 16 if note.get("yref") == "paper" else y(note["y"]),
    }
    for note in layout.get("annotations", ()):
        drawing.text(place["x"](note) - 6, place["y"](note) - 4, note["text"], "end")


_TIME_STEPS = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200, 86400)
_TICKS = 6


class Axis:
    """One axis. kind: `number`, `date` (seconds since 1970) or `category` (a category's place in their order)."""

    def __init__(self, kind: str, categories: Sequence[str], title: str) -> None:
        self.kind = kind
        self.title = title
        self.ticks: list[tuple[float, str]] = []
        self.start = self.end = 0.0
        self.low, self.high = 0.0, 1.0
        self._places = {name: float(place) for place, name in enumerate(categories)}

    def values(self, values: Sequence[Any]) -> list[float]:
        """Values of a trace, as numbers."""
        if self.kind == "category":
            return [self._places[str(value)] for value in values]
        if self.kind == "date":
            return [datetime.datetime.fromisoformat(value).timestamp() for value in values]
        return [float(value) for value in values]

    def lengths(self, values: Sequence[Any]) -> list[float]:
        """Lengths along this axis: plotly gives those of time in milliseconds."""
        scale = 0.001 if self.kind == "date" else 1.0
        return [scale * float(value) for value in values]

    def place(self, start: float, end: float) -> None:
        """Says where the axis begins and ends, in pixels."""
        self.start, self.end = start, end

    def __call__(self, value: float) -> float:
        """Where a value is, in pixels."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def axis_for(
    traces: Sequence[Mapping[str, Any]], letter: str, spec: Mapping[str, Any], layout: Mapping[str, Any]
) -> Axis:
    """The axis that holds what traces have on it, with some room beyond."""
    given = [value for trace in traces for value in trace[letter]]
    level = traces[0].get("orientation") == "h"
    bars = traces[0]["type"] == "bar"
    if spec.get("type") == "category" or isinstance(given[0], str):
        names = list(spec.get("categoryarray") or dict.fromkeys(str(value) for value in given))
        axis = Axis("category", names, spec["title"]["text"])
        axis.low, axis.high = -0.5, len(names) - 0.5
        step = max(1, len(names) // 40)
        axis.ticks = [(float(place), name) for place, name in enumerate(names) if place % step == 0]
        return axis
    axis = Axis("date" if spec.get("type") == "date" else "number", (), spec["title"]["text"])
    if axis.kind == "date":
        begin = np.array(axis.values([value for trace in traces for value in trace["base"]]))
        ends = begin + np.array(axis.lengths(given))
        axis.low, axis.high = float(begin.min()), float(ends.max())
        axis.ticks = _time_ticks(axis.low, axis.high)
        return axis
    if bars and (letter == "x") == level:
        stacked = layout.get("barmode") == "stack"
        sums = np.sum([trace[letter] for trace in traces], axis=0) if stacked else np.array(given)
        axis.low, axis.high = 0.0, float(sums.max()) * 1.06 or 1.0
    elif bars:
        half = np.max(traces[0]["width"]) / 2
        axis.low, axis.high = float(np.min(given) - half), float(np.max(given) + half)
    else:
        room = 0.06 * (np.max(given) - np.min(given)) or 1.0
        axis.low, axis.high = float(np.min(given) - room), float(np.max(given) + room)
        axis.low = 0.0 if spec.get("rangemode") == "tozero" else axis.low
    if spec.get("tickvals"):
        pairs = zip(spec["tickvals"], spec["ticktext"])
        axis.ticks = [(value, label) for value, label in pairs if axis.low <= value <= axis.high]
    else:
        axis.ticks = _round_ticks(axis.low, axis.high)
    return axis


def _round_ticks(low: float, high: float) -> list[tuple[float, str]]:
    rough = (high - low) / _TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    places = range(math.ceil(low / step), math.floor(high / step) + 1)
    return [(place * step, f"{place * step:,.10g}") for place in places]


def _time_ticks(low: float, high: float) -> list[tuple[float, str]]:
    rough = (high - low) / _TICKS
    step = next((step for step in _TIME_STEPS if step >= rough), 86400 * math.ceil(rough / 86400))
    moments = [place * step for place in range(math.ceil(low / step), math.floor(high / step) + 1)]
    pattern = "%H:%M:%S" if step < 60 else "%H:%M" if step < 86400 else "%d %b"
    if step < 86400 and high - low > 86400:
        pattern = "%d %b %H:%M"
    return [(moment, datetime.datetime.fromtimestamp(moment).strftime(pattern)) for moment in moments]


_BOX, _PAD, _EDGE = 14, 36, 16


def draw_flow(drawing: Drawing, trace: Mapping[str, Any], width: float) -> None:
    """Draws one of plotly's Sankey traces, with boxes in the columns that their distance from the start gives."""
    labels, colours = trace["node"]["label"], trace["node"]["color"]
    link = trace["link"]
    links = list(zip(link["source"], link["target"], link["value"], link["color"]))
    columns = _columns(len(labels), links)
    amounts = [
        max(
            sum(value for _, target, value, _ in links if target == node),
            sum(value for source, _, value, _ in links if source == node),
        )
        for node in range(len(labels))
    ]
    by_column = {column: [n for n in range(len(labels)) if columns[n] == column] for column in set(columns)}
    room = drawing.height - 2 * _EDGE - 10
    scale = min(
        (room - _PAD * (len(nodes) - 1)) / max(sum(amounts[n] for n in nodes), 1) for nodes in by_column.values()
    )
    step = (width - 2 * _EDGE - _BOX) / max(columns)
    place: dict[int, tuple[float, float]] = {}
    for column, nodes in by_column.items():
        at = float(_EDGE)
        for node in nodes:
            place[node] = (_EDGE + column * step, at)
            at += scale * amounts[node] + _PAD
    left, entered = [0.0] * len(labels), [0.0] * len(labels)
    for source, target, value, colour in links:
        size = max(scale * value, 0.6)
        x0, y0 = place[source][0] + _BOX, place[source][1] + left[source]
        x1, y1 = place[target][0], place[target][1] + entered[target]
        left[source] += scale * value
        entered[target] += scale * value
        middle = (x0 + x1) / 2
        drawing.path(
            f"M{x0:.1f},{y0:.1f} C{middle:.1f},{y0:.1f} {middle:.1f},{y1:.1f} {x1:.1f},{y1:.1f} "
            f"V{y1 + size:.1f} C{middle:.1f},{y1 + size:.1f} {middle:.1f},{y0 + size:.1f} {x0:.1f},{y0 + size:.1f} Z",
            colour,
        )
    for node, (x, y) in place.items():
        drawing.box(x, y, _BOX, max(scale * amounts[node], 1.5), colours[node])
        last = columns[node] == max(columns)
        middle = y + max(scale * amounts[node], 1.5) / 2 + 4
        for line, text in enumerate(labels[node].split("<br>")):
            at = middle - 7 + 14 * line
            drawing.text(x - 6 if last else x + _BOX + 6, at, text, "end" if last else "start")


def _columns(nodes: int, links: list[tuple[int, int, float, str]]) -> list[int]:
    """The column of each node: its longest way from the start; where the flow ends, the last one."""
    columns = [0] * nodes
    for _ in range(nodes):
        for source, target, _, _ in links:
            columns[target] = max(columns[target], columns[source] + 1)
    ends = set(range(nodes)) - {source for source, *_ in links}
    return [max(columns) if node in ends else column for node, column in enumerate(columns)]
