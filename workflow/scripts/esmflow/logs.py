"""Where log lines go: everything to the job's log file, warnings and errors to the terminal as well."""

from __future__ import annotations

import logging
import os
import re
import sys
import time
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from esmflow.errors import without_controls
from esmflow.files import atomic_path
from esmflow.text import clock

log = logging.getLogger(__name__)

_FORMAT = "%(asctime)s %(levelname)-7s [%(process)d] %(name)s: %(message)s"
_WRITER = re.compile(r"\d{4}-\d\d-\d\d [\d:,]+ \w+ +\[(\d+)\]")
_TAIL_BYTES = 100_000


class _Formatter(logging.Formatter):
    """Lines without what a terminal would obey: messages of libraries may hold anything too."""

    def format(self, record: logging.LogRecord) -> str:
        return without_controls(super().format(record))


def add_log_file(path: str | os.PathLike[str]) -> None:
    """Appends this process's log lines to a file; workers and their supervisor share one."""
    # A line that finds no room on the disk is lost, without a traceback on the terminal for each.
    logging.raiseExceptions = False
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    handler = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(_Formatter(_FORMAT))
    root = logging.getLogger()
    root.setLevel(logging.INFO)
    root.addHandler(handler)


def start_logging(path: str | os.PathLike[str], attempt: int | None = None) -> None:
    """Starts a job's log file anew, and shows warnings and errors on the terminal.

    A job that is tried again, so `attempt` is more than 1, goes on with it: what ended the attempt before is in there.
    Snakemake removes a job's log before every attempt, so the file has a second, hidden name while it may be needed.
    """
    log_file, kept = Path(path), _second_name(path)
    log_file.parent.mkdir(parents=True, exist_ok=True)
    again = attempt is not None and attempt > 1
    # Not every file system has hard links; then there is the last attempt's log only.
    with suppress(OSError):
        if not again:
            kept.unlink()
        elif not log_file.exists():
            os.link(kept, log_file)
    with open(log_file, "a" if again else "w", encoding="utf-8") as handle:
        if attempt is not None:
            handle.write(f"===== attempt {attempt}, {clock(time.time())} =====\n")
    if attempt is not None:
        with suppress(OSError):
            os.link(log_file, kept)
    add_log_file(path)
    terminal = logging.StreamHandler(sys.stderr)
    terminal.setLevel(logging.WARNING)
    terminal.setFormatter(_Formatter("esmflow: %(message)s"))
    logging.getLogger().addHandler(terminal)


def end_logging(path: str | os.PathLike[str]) -> None:
    """Says that a job will not be tried again."""
    _second_name(path).unlink(missing_ok=True)


def _second_name(path: str | os.PathLike[str]) -> Path:
    return Path(path).with_name(f".{Path(path).name}.attempts")


def last_lines(path: str | os.PathLike[str], count: int, process: int | None = None, start: int = 0) -> list[str]:
    """The last lines of a log from byte `start` on, of one of the processes that write to it; none if it is not there.

    Lines without a process id (tracebacks, what C libraries print) count as those of whoever logged before them.
    """
    try:
        with open(path, "rb") as handle:
            size = handle.seek(0, os.SEEK_END)
            handle.seek(max(start, size - _TAIL_BYTES))
            text = handle.read().decode("utf-8", errors="replace")
    except OSError:
        return []
    found: deque[str] = deque(maxlen=count)
    mine = True
    for line in text.splitlines():
        if writer := _WRITER.match(line):
            mine = process is None or int(writer[1]) == process
        if mine and line.strip():
            found.append(line.rstrip())
    return list(found)


def join_logs(paths: Iterable[Path], target: str | os.PathLike[str]) -> None:
    """Writes the logs that exist into one file, each under its name."""
    with atomic_path(target) as temporary, open(temporary, "w", encoding="utf-8") as joined:
        for path in paths:
            if path.exists():
                joined.write(f"===== {path} =====\n{path.read_text(encoding='utf-8', errors='replace')}\n")


def tell(message: str) -> None:
    """Logs something that the user should see on the terminal too, though it is no warning."""
    log.info("%s", message)
    # The terminal may have been closed, or what it was piped to have ended: no reason for a job to fail.
    with suppress(OSError):
        print(f"esmflow: {message}", file=sys.stderr, flush=True)
