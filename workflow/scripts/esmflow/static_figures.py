"""The report's figures as SVG, for Snakemake's own report.

That report shows a page of its own in a frame whose address holds the whole content, and browsers open no address of
the size of plotly's script; pictures they do. So the same plotly figures are drawn here without a browser: bars,
points and flows, with the axes, lines and legends that the report uses, and nothing more.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

import plotly.graph_objects as go

from esmflow.static_axes import Axis, axis_for
from esmflow.static_flow import draw_flow

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
