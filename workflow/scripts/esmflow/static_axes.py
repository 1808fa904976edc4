"""Axes of the figures that are drawn as SVG: from values to places, with ticks at round values."""

from __future__ import annotations

import datetime
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

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
