"""The status of a run, read from the small files that its jobs keep up: what each group is doing, and who died.

Only reads. Works while a run is under way, on any machine that sees the results, and after it has ended in any way.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import psutil

from esmflow.embed.heartbeat import Beat, State
from esmflow.errors import EsmflowError
from esmflow.plan.run_plan import Plan

SILENT_SECONDS = 120.0
"""After so long without a word from another machine, a job is taken for dead."""


class StatusError(EsmflowError):
    """There is nothing to tell. The message says why."""


class Condition(StrEnum):
    """What can be said of a group: a job's own word, or that it has not begun, or that it died without a last word."""

    WAITING = "waiting"
    STARTING = State.STARTING
    QUEUED = State.QUEUED
    LOADING = State.LOADING
    EMBEDDING = State.EMBEDDING
    FINISHED = State.FINISHED
    FAILED = State.FAILED
    DIED = "died"


RUNNING = (Condition.STARTING, Condition.QUEUED, Condition.LOADING, Condition.EMBEDDING)


@dataclass(frozen=True)
class GroupStatus:
    """One group. planned_residues: what the plan gave it. beat: its job's last word, None if it never began."""

    group: str
    condition: Condition
    planned_residues: int
    beat: Beat | None

    @property
    def done(self) -> int:
        """Residues done in this attempt."""
        return self.beat.residues_done if self.beat else 0

    @property
    def left(self) -> int:
        """Residues left to do."""
        if self.condition is Condition.FINISHED:
            return 0
        if self.beat is None or not self.beat.shards:
            return self.planned_residues
        return max(0, self.beat.residues - self.beat.residues_done)

    @property
    def rate(self) -> float:
        """Residues per second now."""
        return (self.beat.residues_per_second or 0.0) if self.beat and self.condition is Condition.EMBEDDING else 0.0


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
    beat = _read_beat(path)
    # What is older than the plan tells of an earlier one. Both times are the file server's.
    if beat is not None and path.stat().st_mtime < planned:
        beat = None
    return GroupStatus(group, _condition(beat, run.exists(), now or time.time()), residues, beat)


def _condition(beat: Beat | None, has_run: bool, now: float) -> Condition:
    if beat is None or beat.state is State.FINISHED:
        # Snakemake removes run.json when a group is to be computed again.
        return Condition.FINISHED if has_run else Condition.WAITING
    if beat.state is State.FAILED:
        return Condition.FAILED
    return Condition(beat.state) if _is_alive(beat, now) else Condition.DIED


def _is_alive(beat: Beat, now: float) -> bool:
    if beat.host != socket.gethostname():
        return now - beat.updated < SILENT_SECONDS
    try:
        # A process id may have been given to another process since.
        process = psutil.Process(beat.process)
        return process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - beat.process_started) < 2
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:
        return now - beat.updated < SILENT_SECONDS


def _read_beat(path: Path) -> Beat | None:
    try:
        return Beat.read(path)
    except (OSError, ValueError):
        return None


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
    """Two lines on each group that failed or died: who and when, and its log."""
    return [line for group in groups for line in _trouble(group, now or time.time())]


def is_over(groups: Sequence[GroupStatus]) -> bool:
    """Whether no group will change any more unless somebody does something."""
    return all(group.condition in (Condition.FINISHED, Condition.DIED, Condition.FAILED) for group in groups)


def _aligned(cell: str, width: int, column: int) -> str:
    """Numbers to the right, words to the left."""
    return cell.rjust(width) if 2 <= column <= 5 else cell.ljust(width)


def _row(group: GroupStatus) -> tuple[str, ...]:
    beat = group.beat
    return (
        group.group,
        group.condition.value,
        f"{group.done:,}",
        f"{group.left:,}",
        f"{group.rate:,.0f}" if group.rate else "-",
        _duration(group.left / group.rate) if group.rate else "-",
        _slots(beat) if beat and group.condition in RUNNING else "-",
        _failures(beat.failed_sequences, beat.failed_shards, beat.worker_deaths) if beat else "-",
    )


def _total(groups: Sequence[GroupStatus]) -> tuple[str, ...]:
    done, left = sum(group.done for group in groups), sum(group.left for group in groups)
    rate = sum(group.rate for group in groups)
    running = sum(group.condition in RUNNING for group in groups)
    finished = sum(group.condition is Condition.FINISHED for group in groups)
    beats = [group.beat for group in groups if group.beat]
    return (
        "total",
        f"{finished} of {len(groups)} finished",
        f"{done:,}",
        f"{left:,}",
        f"{rate:,.0f}" if rate else "-",
        _duration(left / rate) if rate else "-",
        f"{running} running",
        _failures(
            sum(beat.failed_sequences for beat in beats),
            sum(beat.failed_shards for beat in beats),
            sum(beat.worker_deaths for beat in beats),
        ),
    )


def _slots(beat: Beat) -> str:
    """Slots, a GPU's UUID by its beginning; and the host, if it is another."""
    slots = ",".join(slot[:12] for slot in beat.slots) or "-"
    return slots if beat.host == socket.gethostname() else f"{slots} on {beat.host}"


def _failures(sequences: int, shards: int, deaths: int) -> str:
    counts = {"sequences": sequences, "shards": shards, "workers": deaths}
    return ", ".join(f"{count:,} {what}" for what, count in counts.items() if count) or "-"


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    if minutes < 1:
        return f"{seconds:.0f} s"
    return f"{minutes:.0f} min" if hours < 2 else f"{hours:.1f} h"


def _trouble(group: GroupStatus, now: float) -> list[str]:
    beat = group.beat
    if beat is None or group.condition not in (Condition.FAILED, Condition.DIED):
        return []
    who = f"group {group.group}, attempt {beat.attempt} (process {beat.process} on {beat.host})"
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(beat.updated))
    if group.condition is Condition.FAILED:
        return [f"{who} failed at {since}: {beat.message}", f"    log: {beat.log_file}"]
    here = beat.host == socket.gethostname()
    how = "died" if here else f"has given no sign of life for {_duration(now - beat.updated)}"
    return [f"{who} {how}; last heard of at {since}, {beat.state}", f"    log: {beat.log_file}: {_last_line(beat)}"]


def _last_line(beat: Beat) -> str:
    try:
        with open(beat.log_file, "rb") as handle:
            handle.seek(max(0, handle.seek(0, os.SEEK_END) - 4096))
            lines = handle.read().decode("utf-8", errors="replace").strip().splitlines()
    except OSError:
        return "(cannot be read from here)"
    return lines[-1] if lines else "(empty)"
