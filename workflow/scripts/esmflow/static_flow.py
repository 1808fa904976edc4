"""The flow of records as SVG: columns of boxes joined by bands as wide as what they stand for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from esmflow.static_figures import Drawing

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
