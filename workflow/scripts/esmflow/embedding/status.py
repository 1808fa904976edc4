"""The status of a run, read from the small files that its jobs keep up: what each group is doing, and who died.

Only reads. Works while a run is under way, on any machine that sees the results, and after it has ended in any way.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from esmflow.embedding.heartbeat import JobStatus, State
from esmflow.errors import EsmflowError
from esmflow.logs import last_lines
from esmflow.plan.run_plan import Plan
from esmflow.text import clock, duration

SILENT_SECONDS = 120.0
"""After so long without a word from another machine, a job is taken for dead."""


class StatusError(EsmflowError):
    """There is nothing to tell. The message says why."""


RUNNING = (State.STARTING, State.QUEUED, State.LOADING, State.EMBEDDING)


@dataclass(frozen=True)
class GroupStatus:
    """One group. planned_residues: what the plan gave it. job: what its job said last, None if it never began.

    retried: whether it ended without success and Snakemake is going to try it again.
    """

    group: str
    state: State
    planned_residues: int
    job: JobStatus | None = None
    retried: bool = False

    @property
    def done(self) -> int:
        """Residues done in this attempt."""
        return self.job.residues_done if self.job else 0

    @property
    def left(self) -> int:
        """Residues left to do."""
        if self.state is State.FINISHED:
            return 0
        if self.job is None or not self.job.shards:
            return self.planned_residues
        return max(0, self.job.residues - self.job.residues_done)

    @property
    def rate(self) -> float:
        """Residues per second now."""
        return (self.job.residues_per_second or 0.0) if self.job and self.state is State.EMBEDDING else 0.0


def read_status(results: str | os.PathLike[str], now: float | None = None) -> list[GroupStatus]:
    """The status of every group of the run in a results folder.

    Raises StatusError if the folder is not there or its run has not been planned yet.
    """
    folder = Path(results)
    if not folder.is_dir():
        raise StatusError(f"{folder}: no such folder; give the results folder of a run")
    plan = folder / "plan" / "plan.json"
    if not plan.exists():
        raise StatusError(f"{folder}: the run is not planned yet ({plan} is not there), so there are no groups to show")
    groups = Plan.read(plan).groups
    width = len(str(len(groups) - 1))
    planned = plan.stat().st_mtime
    return [_group(folder, f"{n:0{width}d}", group.residues, planned, now) for n, group in enumerate(groups)]


def status_path(run_path: str | os.PathLike[str], group: str) -> Path:
    """Where the job keeps up its status that writes `run_path`, `{results}/embed/group-{group}/run.json`."""
    return Path(run_path).parents[2] / "status" / f"group-{group}.json"


def _group(folder: Path, group: str, residues: int, planned: float, now: float | None) -> GroupStatus:
    run = folder / "embed" / f"group-{group}" / "run.json"
    path = status_path(run, group)
    try:
        # What is older than the plan tells of an earlier one. Both times are the file server's.
        job = JobStatus.read(path) if path.stat().st_mtime >= planned else None
    except (OSError, ValueError):
        job = None
    if job is None or job.state is State.FINISHED:
        # Snakemake removes run.json when a group is to be computed again.
        return GroupStatus(group, State.FINISHED if run.exists() else State.WAITING, residues, job)
    silent = (now or time.time()) - job.updated >= SILENT_SECONDS
    state = job.state
    if state is not State.FAILED and not _is_alive(job.host, job.process, job.process_started, otherwise=not silent):
        state = State.DIED
    retried = state in (State.FAILED, State.DIED) and job.attempt < job.last_attempt
    if job.run is not None and job.run_started is not None:
        # Of a run elsewhere nothing is known: it is believed to go on.
        retried = retried and _is_alive(job.host, job.run, job.run_started, otherwise=True)
    return GroupStatus(group, state, residues, job, retried)


def _is_alive(host: str, process: int, started: float, *, otherwise: bool) -> bool:
    """Whether a process runs; `otherwise`: what to say where that cannot be seen from here."""
    if host != socket.gethostname():
        return otherwise
    try:
        # A process id may have been given to another process since.
        found = psutil.Process(process)
        return found.status() != psutil.STATUS_ZOMBIE and abs(found.create_time() - started) < 2
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:
        return otherwise


# As text


def status_lines(groups: Sequence[GroupStatus], now: float | None = None) -> list[str]:
    """A table with a line for each group and a total, and a sentence on each group that failed or died."""
    header = ("group", "state", "done", "left", "residues/s", "time left", "slot", "failures")
    rows = [header, *(_row(group) for group in groups), _total(groups)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    lines = ["  ".join(_aligned(cell, width, i) for i, (cell, width) in enumerate(zip(row, widths))) for row in rows]
    lines = [line.rstrip() for line in lines]
    return [*lines, *trouble_lines(groups, now)]


def trouble_lines(groups: Sequence[GroupStatus], now: float | None = None) -> list[str]:
    """Two or three lines on each group that failed or died: who and when, its log, and whether it is tried again."""
    return [line for group in groups for line in _trouble(group, now or time.time())]


def is_over(groups: Sequence[GroupStatus]) -> bool:
    """Whether no group will change any more unless somebody does something."""
    ended = (State.FINISHED, State.DIED, State.FAILED)
    return all(group.state in ended and not group.retried for group in groups)


def show_status(results: str | os.PathLike[str], every_seconds: float | None = None) -> None:
    """Prints the table; every so many seconds anew until the run is over, if that is given. Raises StatusError."""
    while True:
        groups = read_status(results)
        if every_seconds and sys.stdout.isatty():
            print("\033[2J\033[H", end="")
        print("\n".join(status_lines(groups)), flush=True)
        if not every_seconds or is_over(groups):
            return
        time.sleep(every_seconds)


def _aligned(cell: str, width: int, column: int) -> str:
    """Numbers to the right, words to the left."""
    return cell.rjust(width) if 2 <= column <= 5 else cell.ljust(width)


def _row(group: GroupStatus) -> tuple[str, ...]:
    slots = _slots(group.job) if group.job and group.state in RUNNING else "-"
    return (group.group, group.state.value, *_figures([group]), slots, _failures([group]))


def _total(groups: Sequence[GroupStatus]) -> tuple[str, ...]:
    finished = sum(group.state is State.FINISHED for group in groups)
    running = sum(group.state in RUNNING for group in groups)
    return (
        "total",
        f"{finished} of {len(groups)} finished",
        *_figures(groups),
        f"{running} running",
        _failures(groups),
    )


def _figures(groups: Sequence[GroupStatus]) -> tuple[str, ...]:
    """Residues done and left, residues per second, and the time left."""
    done, left, rate = (sum(getattr(group, name) for group in groups) for name in ("done", "left", "rate"))
    return (f"{done:,}", f"{left:,}", *((f"{rate:,.0f}", duration(left / rate)) if rate else ("-", "-")))


def _slots(job: JobStatus) -> str:
    """Slots, a GPU's UUID by its beginning; and the host, if it is another."""
    slots = ",".join(slot[:12] for slot in job.slots) or "-"
    return slots if job.host == socket.gethostname() else f"{slots} on {job.host}"


def _failures(groups: Sequence[GroupStatus]) -> str:
    jobs = [group.job for group in groups if group.job]
    counts = {
        "sequences": sum(job.failed_sequences for job in jobs),
        "shards": sum(job.failed_shards for job in jobs),
        "workers": sum(job.worker_deaths for job in jobs),
    }
    return ", ".join(f"{count:,} {what}" for what, count in counts.items() if count) or "-"


def _trouble(group: GroupStatus, now: float) -> list[str]:
    job = group.job
    if job is None or group.state not in (State.FAILED, State.DIED):
        return []
    who = f"group {group.group}, attempt {job.attempt} (process {job.process} on {job.host})"
    again = ["    it will be tried again"] if group.retried else []
    if group.state is State.FAILED:
        return [f"{who} failed at {clock(job.updated)}: {job.message}", f"    log: {job.log_file}", *again]
    here = job.host == socket.gethostname()
    how = "died" if here else f"has given no sign of life for {duration(now - job.updated)}"
    last = next(iter(last_lines(job.log_file, 1)), "(empty, or cannot be read from here)")
    return [
        f"{who} {how}; last heard of at {clock(job.updated)}, {job.state}",
        f"    log: {job.log_file}: {last}",
        *again,
    ]
