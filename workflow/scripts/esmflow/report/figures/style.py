"""What all figures share: colours, axes, legends, and short names of long things."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import altair as alt
import polars as pl

Figure = alt.Chart | alt.LayerChart | alt.FacetChart | alt.VConcatChart

GIB = 2**30
# Okabe and Ito's colours, which people with any colour vision can tell apart; the page has shades for light and dark.
PALETTE = ("blue", "orange", "green", "purple", "sky", "vermillion", "yellow")
NARROW = 520

LETTER = 7
"""About the width of a letter in pixels."""
# Altair refuses to draw more than 5,000 rows unless told: what is drawn here is bounded by those who count it.
alt.data_transformers.disable_max_rows()


def colour(name: str) -> str:
    """A colour of the page."""
    return f"var(--{name})"


def styled(chart: Figure, width: int | None, height: int | None) -> Figure:
    """What all figures share. width: of the whole; height: of the plot; None where the chart has them."""
    if width is not None:
        fit = alt.AutoSizeParams(type="fit-x", contains="padding")
        chart = chart.properties(width=width, height=height, autosize=fit)
    return (
        chart.properties(padding=2, background="transparent")
        .configure(font="system-ui, sans-serif")
        .configure_view(stroke=None)
        .configure_text(color=colour("ink"), fontSize=12, aria=False)
        .configure_axis(
            aria=False,
            grid=False,
            gridColor=colour("line"),
            domainColor=colour("line"),
            ticks=False,
            title=None,
            titleColor=colour("quiet"),
            titleFontSize=13,
            titleFontWeight="normal",
            titlePadding=8,
            labelColor=colour("quiet"),
            labelFontSize=12,
            labelPadding=6,
            labelAngle=0,
            labelFlush=False,
        )
        .configure_axisQuantitative(format=",.4~f")
        .configure_legend(
            aria=False,
            title=None,
            orient="top",
            symbolType="circle",
            labelColor=colour("ink"),
            labelFontSize=12,
            labelLimit=320,
            columnPadding=30,
        )
    )


def data_of(rows: Iterable[Mapping[str, Any]]) -> alt.Chart:
    return alt.Chart(pl.DataFrame(list(rows)))


def axis_of_names(width: int, names: Iterable[str]) -> alt.Axis:
    """An axis of names, with room for them in any font."""
    most = 2 * width // 5
    return alt.Axis(labelLimit=most, minExtent=min(most, LETTER * max(map(len, names)) + 6))


def legend_of(field: str, shades: Mapping[str, str], rows: Sequence[Mapping[str, Any]], width: int) -> alt.Color:
    """Colours of a field's values, with a legend above the plot if there are several. shades: in their order."""
    present = {row[field] for row in rows}
    names = [name for name in shades if name in present]
    columns = min(len(names), max(1, width // (LETTER * max(map(len, names)) + 44)))
    legend = alt.Legend(columns=columns) if len(names) > 1 else None
    scale = alt.Scale(domain=names, range=[colour(shades[name]) for name in names])
    return alt.Color(f"{field}:N", scale=scale, legend=legend)


def short(value: float) -> str:
    """Three digits, or all of a large number."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def short_path(path: str, parts: int = 1, letters: int = 40) -> str:
    """The end of a path that fits a legend."""
    name = "/".join(path.split("/")[-parts:])
    return name if len(name) <= letters else f"…{name[-letters:]}"
