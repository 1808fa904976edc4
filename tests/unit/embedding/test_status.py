"""Status: what jobs tell of themselves, and what can be said of those that cannot any more."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from workflow_run import wait_until

from esmflow.embedding import heartbeat
from esmflow.embedding.heartbeat import Heartbeat, JobStatus, State
from esmflow.embedding.status import StatusError, is_over, read_status, status_lines, status_path
from esmflow.files import read_json, write_json
from esmflow.plan.run_plan import GroupPlan, Plan
from esmflow.report.summary import unfinished_lines
from esmflow.workers.lifetime import note_run

SCRIPTS = Path(__file__).resolve().parents[3] / "workflow" / "scripts"


@pytest.fixture
def results(tmp_path):
    """A results folder with a plan of two groups."""
    folder = tmp_path / "results"
    groups = (GroupPlan(residues=1000), GroupPlan(residues=500))
    Plan(fingerprint="f", records=2, groups=groups).write(folder / "plan" / "plan.json")
    return folder


def run_path(results, group="0"):
    return results / "embed" / f"group-{group}" / "run.json"


def beat(results, group="0", **fields):
    """Writes a job's last word: of this process, unless `fields` say otherwise."""
    process = psutil.Process()
    now = time.time()
    log = results.parent / f"group-{group}.log"
    log.write_text("first line\nthe last line\n")
    word = JobStatus(
        group, State.EMBEDDING, os.uname().nodename, process.pid, process.create_time(), now, now, 1, str(log)
    )
    replace(word, **fields).write(status_path(run_path(results, group), group))


def states(results, **options):
    return [group.state for group in read_status(results, **options)]


def test_a_group_whose_job_has_not_begun_is_waiting_with_all_it_was_planned(results):
    groups = read_status(results)
    assert [group.state for group in groups] == [State.WAITING] * 2
    assert [group.left for group in groups] == [1000, 500]
    assert not is_over(groups)


THIS_PROCESS = "this process"


@pytest.mark.parametrize("ended", [{"state": State.FAILED}, {"process_started": 1.0}])
@pytest.mark.parametrize(
    ("attempt", "host", "run", "again"),
    [
        (1, None, None, True),
        (2, None, None, False),
        (1, None, THIS_PROCESS, True),
        (1, None, 2**22, False),
        (2, None, THIS_PROCESS, False),
        (1, "node17", 2**22, True),
    ],
)
def test_a_run_is_not_over_while_it_will_try_a_group_again(results, ended, attempt, host, run, again):
    # Told here and not above: tests must have the same names in every process that runs them.
    run = os.getpid() if run == THIS_PROCESS else run
    now = time.time()
    started = psutil.Process().create_time()
    beat(results, "1", state=State.FINISHED)
    write_json(run_path(results, "1"), {})
    fields = {"host": host, "updated": now - 300} if host else {}
    beat(results, **ended, **fields, attempt=attempt, last_attempt=2, run=run, run_started=run and started)
    groups = read_status(results)
    assert groups[0].state in (State.FAILED, State.DIED)
    assert groups[0].retried == again
    assert is_over(groups) != again
    assert ("it will be tried again" in "\n".join(status_lines(groups))) == again


def test_what_is_not_there_is_said_in_a_sentence(tmp_path):
    with pytest.raises(StatusError, match="no such folder"):
        read_status(tmp_path / "none")
    with pytest.raises(StatusError, match="not planned yet"):
        read_status(tmp_path)


def test_a_job_at_work_is_shown_with_its_figures_and_the_total(results):
    figures = {"residues": 900, "residues_done": 300, "residues_per_second": 100.0, "shards": 9, "slots": ("GPU-0123",)}
    beat(results, **figures, failed_sequences=2, worker_deaths=1)
    lines = status_lines(read_status(results))
    header, first, second, total = lines
    assert " ".join(header.split()) == "group state done left residues/s time left slot failures"
    assert " ".join(first.split()) == "0 embedding 300 600 100 6 s GPU-0123 2 sequences, 1 workers"
    assert " ".join(second.split()) == "1 waiting 0 500 - - - -"
    assert " ".join(total.split()).startswith("total 0 of 2 finished 300 1,100 100 11 s 1 running")


def test_a_job_of_a_dead_process_has_died_and_the_status_says_who_when_and_its_last_line(results):
    beat(results, process_started=1.0)
    groups = read_status(results)
    assert groups[0].state is State.DIED
    text = "\n".join(status_lines(groups))
    assert f"group 0, attempt 1 (process {os.getpid()} on {os.uname().nodename}) died; last heard of at " in text
    assert "the last line" in text


def test_a_job_on_another_machine_has_died_when_it_is_silent_for_long(results):
    now = time.time()
    beat(results, host="node17", updated=now - 30)
    assert states(results, now=now) == [State.EMBEDDING, State.WAITING]
    assert states(results, now=now + 300) == [State.DIED, State.WAITING]
    assert "no sign of life for 6 min" in "\n".join(status_lines(read_status(results, now + 300), now + 300))


def test_what_an_earlier_plan_left_behind_says_nothing_of_this_one(results):
    beat(results)
    later = time.time() + 5
    os.utime(results / "plan" / "plan.json", (later, later))
    assert states(results)[0] is State.WAITING


def test_a_damaged_file_is_as_good_as_none(results):
    path = status_path(run_path(results), "0")
    for content in ("", "{", '{"state": "embedding"}', '{"state": "nonsense", "slots": []}'):
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
        assert states(results)[0] is State.WAITING


def test_a_group_is_finished_as_long_as_its_run_json_is_there(results):
    beat(results, state=State.FINISHED)
    assert states(results)[0] is State.WAITING
    write_json(run_path(results), {})
    assert states(results)[0] is State.FINISHED


# The job's side


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(heartbeat, "INTERVAL_SECONDS", 0.05)


def test_a_job_is_heard_of_without_doing_anything_itself_and_says_how_it_ended(results, quick):
    path = status_path(run_path(results), "0")
    done = iter(range(10, 10_000, 10))
    with Heartbeat(path, "0", "log", 2) as job:
        assert read_json(path)["state"] == "starting"
        job.tell(State.LOADING, residues=500, slots=("CPU-0",))
        job.observe(lambda: {"state": State.EMBEDDING, "residues_done": next(done)})
        wait_until(lambda: read_json(path)["residues_done"] > 30, what="progress")
        found = read_json(path)
        assert (found["state"], found["residues"], found["slots"], found["attempt"]) == ("embedding", 500, ["CPU-0"], 2)
        assert found["residues_per_second"] > 0
    assert read_json(path)["state"] == "finished"
    with pytest.raises(OSError, match="disk full"), Heartbeat(path, "0", "log"):
        raise OSError("disk full\n on /scratch")
    assert (read_json(path)["state"], read_json(path)["message"]) == ("failed", "disk full on /scratch")


def test_a_job_tells_of_the_attempts_it_has_and_of_the_run_that_would_try_it_again(results, monkeypatch):
    path = status_path(run_path(results), "0")
    with Heartbeat(path, "0", "log", 1, 3):
        pass
    assert (read_json(path)["last_attempt"], read_json(path)["run"]) == (3, None)
    note_run()
    try:
        with Heartbeat(path, "0", "log"):
            pass
        assert read_json(path)["run"] == os.getpid()
        # The Snakemake around a cluster job's script decides nothing.
        waiting = [sys.executable, "-c", "print('here', flush=True); input()", "--mode", "remote"]
        sleeper = subprocess.Popen(waiting, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        # Until it runs, its command line is empty.
        assert sleeper.stdout.readline() == b"here\n"
        monkeypatch.setenv("ESMFLOW_RUN", os.environ["ESMFLOW_RUN"].replace(str(os.getpid()), str(sleeper.pid)))
        with Heartbeat(path, "0", "log"):
            pass
        assert read_json(path)["run"] is None
        sleeper.communicate(b"\n")
    finally:
        os.environ.pop("ESMFLOW_RUN", None)


def test_a_status_that_cannot_be_written_stops_no_job(tmp_path):
    (tmp_path / "status").write_text("a file where the folder should be")
    with Heartbeat(tmp_path / "status" / "group-0.json", "0", "log") as job:
        job.tell(State.EMBEDDING)


JOB = """
import sys, time
from esmflow.embedding.heartbeat import Heartbeat, State
with Heartbeat(sys.argv[1], "0", "log") as job:
    job.tell(State.EMBEDDING)
    time.sleep(600)
"""


def test_a_killed_job_is_found_dead_by_the_command_which_needs_neither_snakemake_nor_torch(results):
    path = status_path(run_path(results), "0")
    environment = {**os.environ, "PYTHONPATH": str(SCRIPTS)}
    job = subprocess.Popen([sys.executable, "-c", JOB, str(path)], env=environment)
    try:
        wait_until(lambda: path.exists() and read_json(path)["state"] == "embedding", what="the job")
        assert states(results)[0] is State.EMBEDDING
        job.send_signal(signal.SIGKILL)
        job.wait()
    finally:
        job.kill()
    code = (
        "import sys, runpy\n"
        "sys.modules['torch'] = sys.modules['snakemake'] = None\n"
        f"sys.argv = ['status.py', {str(results)!r}]\n"
        f"runpy.run_path({str(SCRIPTS / 'status.py')!r}, run_name='__main__')\n"
    )
    shown = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert f"(process {job.pid} on" in shown.stdout
    assert "died; last heard of at" in shown.stdout


# The end of a run that did not finish


def test_a_run_that_ends_early_says_who_failed_and_the_command_to_go_on_with(results):
    beat(results, state=State.FAILED, message="the disk is full")
    lines = unfinished_lines(str(results), "logs", "snakemake --cores 8")
    assert 3 <= len(lines) <= 10
    assert any("group 0, attempt 1" in line and "the disk is full" in line for line in lines)
    assert any(line.endswith("snakemake --cores 8") for line in lines)


def test_a_run_that_ends_before_it_is_planned_says_so_in_few_lines(tmp_path):
    lines = unfinished_lines(str(tmp_path), "logs", "snakemake")
    assert len(lines) == 3


def test_what_a_killed_attempt_left_half_written_is_removed_by_the_next(results):
    path = status_path(run_path(results), "0")
    path.parent.mkdir(parents=True, exist_ok=True)
    left, of_another = path.parent / f".{path.name}.ab12cd34.part", path.parent / ".group-1.json.cd34ef56.part"
    left.touch()
    of_another.touch()
    with Heartbeat(path, "0", "log"):
        assert not left.exists()
    assert of_another.exists()
