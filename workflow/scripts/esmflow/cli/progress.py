"""How far a run is: one bar over all groups on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any, Self

from tqdm import tqdm

from esmflow.embedding.status import RUNNING, GroupStatus, StatusError, read_status
from esmflow.text import duration, plural

_LINE_SECONDS = 30.0
# Of all time at most this share goes into looking.
_SHARE = 0.1
_STEPS = {
    "model": "finding and converting the model",
    "plan": "reading the input",
    "embed": "embedding",
    "collect": "writing the results",
    "verify": "computing a sample again, to verify it",
    "report": "drawing the report",
}


class Display:
    """Shows steps as they begin, and residues done, rate and time left while the groups are computed."""

    def __init__(self, results: Path) -> None:
        self._results = results
        self._steps: set[str] = set()
        self._bar: tqdm[Any] | None = None
        self._next_line = time.monotonic()
        self.seconds = 1.0
        """How long to wait until the next `refresh`."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self._close()

    @property
    def began(self) -> bool:
        """Whether any step had to be done."""
        return bool(self._steps)

    def say(self, line: str) -> None:
        """Shows a line, above the bar if there is one."""
        tqdm.write(f"esmflow: {line}", file=sys.stderr)

    def step(self, name: str) -> None:
        """A step begins; each is told once."""
        if name in _STEPS and name not in self._steps:
            self._steps.add(name)
            self.say(_STEPS[name])

    def refresh(self) -> None:
        """Looks how far the groups are and shows it."""
        if "embed" not in self._steps:
            return
        started = time.monotonic()
        try:
            groups = read_status(self._results)
        except (StatusError, OSError, ValueError):
            return
        self.seconds = max(1.0, (time.monotonic() - started) / _SHARE)
        total = sum(group.planned_residues for group in groups)
        done = max(0, total - sum(group.left for group in groups))
        if done >= total:
            self._close()
        elif sys.stderr.isatty():
            self._draw(groups, done, total)
        elif time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + _LINE_SECONDS
            self.say(f"{done:,} of {total:,} residues ({done / total:.0%}), {_pace(groups, total - done)}")

    def _draw(self, groups: list[GroupStatus], done: int, total: int) -> None:
        if self._bar is None:
            self._bar = tqdm(
                total=total,
                unit_scale=True,
                file=sys.stderr,
                dynamic_ncols=True,
                leave=False,
                bar_format="{percentage:3.0f}% |{bar}| {n_fmt} of {total_fmt} residues, {desc}",
            )
        self._bar.total, self._bar.n = total, done
        self._bar.set_description_str(_pace(groups, total - done))

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _pace(groups: list[GroupStatus], left: int) -> str:
    """How fast the groups go and how long it will take; before that can be said, what they are doing."""
    rate = sum(group.rate for group in groups)
    if rate:
        return f"{rate:,.0f}/s, {duration(left / rate)} left"
    running = [group.state.value for group in groups if group.state in RUNNING]
    return f"{plural(len(running), 'group')} {running[0]}" if running else "starting"
