"""Logs: of a job that is tried again every attempt, of several processes the last lines of one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from esmflow.logs import end_logging, last_lines

SCRIPTS = Path(__file__).resolve().parents[2] / "workflow" / "scripts"


def log_in_a_process(path, attempt, message):
    code = (
        "import logging, sys; from esmflow.logs import start_logging\n"
        f"start_logging(sys.argv[1], {attempt!r}); logging.error(sys.argv[2])"
    )
    subprocess.run([sys.executable, "-c", code, str(path), message], check=True, env={"PYTHONPATH": str(SCRIPTS)})


def test_a_terminal_that_is_gone_ends_no_job(tmp_path):
    code = (
        "import logging, sys; from esmflow.step import logged_step; from esmflow.logs import tell\n"
        "with logged_step(sys.argv[1], []):\n"
        "    tell('the forecast'); logging.warning('careful'); tell('the end')\n"
    )
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-c", code, str(tmp_path / "log")]
    ended = subprocess.run(command, stderr=writing, env={**os.environ, "PYTHONPATH": str(SCRIPTS)})
    os.close(writing)
    said = [line.split(": ")[1] for line in (tmp_path / "log").read_text().splitlines()]
    assert (ended.returncode, said) == (0, ["the forecast", "careful", "the end"])


def test_a_log_keeps_every_attempt_under_a_heading_and_a_new_run_starts_it_anew(tmp_path):
    log = tmp_path / "logs" / "group-0.log"
    log_in_a_process(log, 1, "of an earlier run")
    log_in_a_process(log, 1, "the first crash")
    # As Snakemake does before every attempt.
    log.unlink()
    log_in_a_process(log, 2, "the second try")
    lines = log.read_text().splitlines()
    assert [line.split(",")[0] for line in lines if line.startswith("=")] == ["===== attempt 1", "===== attempt 2"]
    assert [line.rsplit(": ", 1)[-1] for line in lines[1::2]] == ["the first crash", "the second try"]


def test_nothing_is_left_beside_the_log_of_a_job_that_will_not_be_tried_again(tmp_path):
    log = tmp_path / "group-0.log"
    log_in_a_process(log, 1, "message")
    assert len(list(tmp_path.iterdir())) == 2
    end_logging(log)
    assert list(tmp_path.iterdir()) == [log]
    end_logging(log)


def test_a_step_without_attempts_starts_its_log_anew_and_needs_no_heading(tmp_path):
    for message in ("first", "second"):
        log_in_a_process(tmp_path / "log", None, message)
    (line,) = (tmp_path / "log").read_text().splitlines()
    assert line.endswith("second")


def test_the_last_lines_are_those_of_one_process_or_of_all_from_a_place_on(tmp_path):
    log = tmp_path / "log"
    log.write_text(
        "before\n2026-01-01 10:00:00,000 INFO [7] a: mine\ntrace\n2026-01-01 10:00:00,001 INFO [8] a: other\n"
    )
    assert last_lines(log, 1) == ["2026-01-01 10:00:00,001 INFO [8] a: other"]
    assert [line[-5:] for line in last_lines(log, 9, process=7)] == ["efore", " mine", "trace"]
    assert [line[-5:] for line in last_lines(log, 9, process=7, start=7)] == [" mine", "trace"]
    assert last_lines(tmp_path / "none", 3) == []


def test_what_a_terminal_would_obey_is_an_escape_in_the_log(tmp_path):
    log_in_a_process(tmp_path / "a.log", 1, "no such file: \x1b[31m\x07\udce9.fa\nsecond line")
    lines = (tmp_path / "a.log").read_text(encoding="utf-8").splitlines()
    assert lines[1].endswith("no such file: \\x1b[31m\\x07\\udce9.fa")
    assert lines[2] == "second line"
