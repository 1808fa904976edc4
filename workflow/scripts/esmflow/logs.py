"""Where log lines go: everything to the job's log file, warnings and errors to the terminal as well."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from esmflow.files import atomic_path

_FORMAT = "%(asctime)s %(levelname)-7s [%(process)d] %(name)s: %(message)s"


def add_log_file(path: str | os.PathLike[str]) -> None:
    """Appends this process's log lines to a file; workers and their supervisor share one."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter(_FORMAT))
    root = logging.getLogger()
    root.setLevel(logging.INFO)
    root.addHandler(handler)


def start_logging(path: str | os.PathLike[str]) -> None:
    """Starts a job's log file anew, and shows warnings and errors on the terminal."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    open(path, "w").close()
    add_log_file(path)
    terminal = logging.StreamHandler(sys.stderr)
    terminal.setLevel(logging.WARNING)
    terminal.setFormatter(logging.Formatter("esmflow: %(message)s"))
    logging.getLogger().addHandler(terminal)


def join_logs(paths: Iterable[Path], target: str | os.PathLike[str]) -> None:
    """Writes the logs that exist into one file, each under its name."""
    with atomic_path(target) as temporary, open(temporary, "w", encoding="utf-8") as joined:
        for path in paths:
            if path.exists():
                joined.write(f"===== {path} =====\n{path.read_text(encoding='utf-8', errors='replace')}\n")
