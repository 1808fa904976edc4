"""What draws the report's figures: in a process of its own, small, and for programs that know no variables."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest

from esmflow.report import drawing
from esmflow.report.drawing import DrawingError, draw, message, on_paper
from esmflow.report.page import TEMPLATES

STYLE = (TEMPLATES / "page.css").read_text()
HOSTILE = "<script>&amp;</script>\"'"
POINTS = {
    "data": {"values": [{"x": 1 / 3, "what": HOSTILE}, {"x": 2, "what": "b"}]},
    "mark": {"type": "circle", "color": "var(--vermillion)"},
    "encoding": {"x": {"field": "x", "type": "quantitative"}, "description": {"field": "what", "type": "nominal"}},
}
BROKEN = {"data": {"values": "{"}, "mark": "bar", "encoding": {"x": {"field": 5}}}


@pytest.fixture(scope="module")
def points():
    (svg,) = draw([POINTS])
    return svg


def test_marks_say_what_they_are_and_nothing_else_does(points):
    assert HOSTILE not in points
    circles = ElementTree.fromstring(points).findall(".//{http://www.w3.org/2000/svg}circle")
    assert [circle.get("aria-label") for circle in circles] == [HOSTILE, "b"]
    assert all(circle.get("role") is None and len(circle.get("cx").partition(".")[2]) <= 2 for circle in circles)


def test_a_drawing_on_paper_has_the_light_colours_and_no_variables(points):
    svg = on_paper(points, STYLE)
    assert "var(" in points
    assert "var(" not in svg
    assert "#d55e00" in svg
    root = ElementTree.fromstring(svg)
    background = root.find("{http://www.w3.org/2000/svg}rect")
    assert background.get("fill") == "#ffffff"
    assert root.get("viewBox") == " ".join(background.get(name) for name in ("x", "y", "width", "height"))


def test_a_sentence_in_place_of_a_figure_is_text_and_nothing_else():
    svg = on_paper(message(f"{HOSTILE} {'word ' * 60}"), STYLE)
    assert "var(" not in svg
    lines = ["".join(text.itertext()) for text in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]
    assert len(lines) == 3
    assert lines[0].startswith(HOSTILE)


def test_a_figure_that_cannot_be_drawn_does_not_keep_the_others_from_it():
    first, second = draw([BROKEN, POINTS])
    assert isinstance(first, DrawingError)
    assert isinstance(second, str)


def test_a_drawing_process_that_dies_is_an_error_of_each_figure(monkeypatch):
    monkeypatch.setattr(drawing, "__file__", "/nowhere.py")
    assert all("nowhere.py" in str(error) and isinstance(error, DrawingError) for error in draw([POINTS, POINTS]))
