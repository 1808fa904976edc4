"""Draws the report's figures as SVG with vl-convert, which needs no browser, and no network."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from html import escape
from typing import Any

# What a page must not say of every mark, and what nobody sees.
_NEEDLESS = re.compile(
    r' (?:role="graphics-\w+"|aria-roledescription="[^"<>]*"|aria-hidden="true"|pointer-events="none"|opacity="1")'
    r'(?=[^<>]*>)|<path class="(?:foreground|background)"[^<>]*/>'
)
_PLACES = re.compile(r' (?:d|transform|x2|y2)="[^"<>]*"')
_CIRCLE = re.compile(r'<path ([^<>]*)transform="translate\(([-\d.]+),([-\d.]+)\)" d="M([\d.]+),0A[^"]*"')
_MARGIN = 16
_PROCESSES = 6
_DECIMALS = re.compile(r"(\.\d\d)\d+")


class DrawingError(Exception):
    """A figure could not be drawn."""


def draw(specifications: Sequence[dict[str, Any]]) -> list[str | DrawingError]:
    """The SVG of each figure, given as Vega-Lite, or why there is none.

    vl-convert brings a JavaScript engine, which ends its whole process where it is not given as much address space as
    it asks for: under some login nodes' limits. So it has processes of its own: few, as half a second of each is start.
    """
    processes = min(_PROCESSES, max(2, os.cpu_count() or 2))
    shares = [specifications[first::processes] for first in range(processes)]
    drawn: list[str | DrawingError] = [DrawingError("not drawn")] * len(specifications)
    with ThreadPoolExecutor(processes) as pool:
        for first, share in enumerate(pool.map(_draw_apart, shares)):
            drawn[first::processes] = share
    return drawn


def _draw_apart(specifications: Sequence[dict[str, Any]]) -> list[str | DrawingError]:
    done = subprocess.run(
        [sys.executable, "-P", __file__], input=json.dumps(specifications), capture_output=True, encoding="utf-8"
    )
    if done.returncode:
        lines = [line.strip("# ") for line in done.stderr.splitlines()]
        words = " ".join(line for line in lines if line).partition(" ====")[0][:150] or "it said nothing"
        reason = f"the process that draws ended with {done.returncode}: {words}"
        return [DrawingError(reason)] * len(specifications)
    return [tidy(one["svg"]) if "svg" in one else DrawingError(one["error"]) for one in json.loads(done.stdout)]


def tidy(svg: str) -> str:
    """The same drawing in fewer letters."""
    rounded = _PLACES.sub(lambda place: _DECIMALS.sub(r"\1", place[0]), _NEEDLESS.sub("", svg))
    return _CIRCLE.sub(r'<circle \1cx="\2" cy="\3" r="\4"', rounded)


def on_paper(svg: str, style: str) -> str:
    """A drawing for programs that know neither the page's style nor variables: in the light colours, on their card."""
    # The style begins with the light colours.
    colours = dict(re.findall(r"(--[\w-]+):\s*(#\w+)", style[style.index("{") : style.index("}")]))
    svg = re.sub(r'="var\((--\w+)\)"', lambda name: f'="{colours[name[1]]}"', svg)
    width, height = (float(size) + 2 * _MARGIN for size in re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)[0])
    place = f'x="{-_MARGIN}" y="{-_MARGIN}" width="{width}" height="{height}"'
    size = f'width="{width}" height="{height}" viewBox="{-_MARGIN} {-_MARGIN} {width} {height}"'
    svg = re.sub(r'width="[\d.]+" height="[\d.]+" viewBox="[^"]*"', size, svg, count=1)
    return re.sub(r"(<svg[^>]*>)", rf'\1<rect {place} fill="{colours["--card"]}"/>', svg, count=1)


def message(text: str) -> str:
    """A sentence in place of a figure."""
    words, lines = text.split(), [""]
    for word in words:
        if len(lines[-1]) + len(word) > 110:
            lines.append("")
        lines[-1] += f"{word} "
    height = 40 + 20 * len(lines)
    written = (f'<text x="20" y="{34 + 20 * i}">{escape(line.strip())}</text>' for i, line in enumerate(lines))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="900" height="{height}" viewBox="0 0 900 {height}" '
        f'font-family="system-ui, sans-serif" font-size="14" fill="var(--ink)">{"".join(written)}</svg>'
    )


def _main() -> None:
    import vl_convert

    drawn = []
    for specification in json.load(sys.stdin):
        try:
            drawn.append({"svg": vl_convert.vegalite_to_svg(specification)})
        except Exception as error:
            drawn.append({"error": str(error)})
    json.dump(drawn, sys.stdout)


if __name__ == "__main__":
    _main()
