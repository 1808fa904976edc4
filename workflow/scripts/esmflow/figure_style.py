"""What the report's figures share: their colours, their axes, their words.

Colours are CSS variables of the page, which has values for light and for dark; see `workflow/report/page.css`.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import plotly.graph_objects as go

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
