"""A figure that cannot be drawn says so in its own place."""

from __future__ import annotations

import resource
from functools import partial

import pytest

from esmflow.report import drawing
from esmflow.report.figures.records import disk_figure
from esmflow.report.page import WIDTHS, _draw
from esmflow.report.sections import Section

GOOD = Section(
    note="All of it.", figures={"one": partial(disk_figure, {"store": 10}), "other": partial(disk_figure, {"plan": 5})}
)


def test_each_section_keeps_its_own_words():
    sections = {
        "good": GOOD,
        "bad": Section(note="None of it.", figures={"": partial(disk_figure, {})}),
        "words": Section("Words."),
    }
    drawings = _draw(sections)
    assert {key: list(drawn) for key, drawn in drawings.items()} == {"good": ["one", "other"]}
    assert [list(drawn) for drawn in drawings["good"].values()] == [list(WIDTHS)] * 2
    assert drawings["good"]["one"]["wide"] != drawings["good"]["other"]["wide"]
    assert (sections["good"].note, sections["words"].note) == ("All of it.", "Words.")
    assert sections["bad"].note.startswith("This could not be shown (ValueError: ")
    assert sections["bad"].note.endswith("the report's log has the details. None of it.")


def test_a_limit_of_address_space_costs_the_figures_and_nothing_else(monkeypatch):
    def limited(*args, **options):
        limit = partial(resource.setrlimit, resource.RLIMIT_AS, (4 << 30, 4 << 30))
        return run(*args, **options, preexec_fn=limit)

    run = drawing.subprocess.run
    monkeypatch.setattr(drawing.subprocess, "run", limited)
    sections = {"good": GOOD, "words": Section("Words.")}
    if _draw(sections):
        pytest.skip("the engine that draws is content with 4 GiB of address space here")
    assert "the process that draws ended with" in sections["good"].note
    assert sections["good"].note.endswith("All of it.")
    assert sections["words"].note == "Words."
