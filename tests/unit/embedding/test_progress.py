"""Progress in the log: how much of how much, how fast, and how long it will take."""

from __future__ import annotations

import io
import re
import sys

import pytest

from esmflow.embedding import progress
from esmflow.embedding.progress import Progress


def test_the_log_says_how_far_a_job_is_and_what_is_taken_back_does_not_count(caplog, monkeypatch):
    caplog.set_level("INFO")
    monkeypatch.setattr(progress, "_LOG_SECONDS", 0.0)
    with Progress("group 0", 1_000_000) as job:
        job.advance(450_000)
        job.advance(-50_000)
        assert job.done == 400_000
        job.tick()
        assert re.fullmatch(
            r"group 0: 400k of 1\.00M residues \(40%\) in 00:00, \S+ residues/s with start-up, 00:00 left",
            caplog.messages[-1],
        )
        job.advance(600_000)
    assert caplog.messages[-1].startswith("group 0: 1.00M of 1.00M residues (100%)")


@pytest.mark.parametrize("terminal", [True, False])
def test_a_bar_is_for_terminals_only(monkeypatch, terminal):
    output = io.StringIO()
    monkeypatch.setattr(output, "isatty", lambda: terminal)
    monkeypatch.setattr(sys, "stderr", output)
    with Progress("group 0", 1000) as job:
        job.advance(500)
    assert bool(output.getvalue()) == terminal
