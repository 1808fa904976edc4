"""Progress of a job: a line now and then in the log, a bar on a terminal."""

from __future__ import annotations

import io
import logging
import sys
import time
from typing import Any

from tqdm import tqdm

log = logging.getLogger(__name__)

_LOG_SECONDS = 30.0
_LINE = (
    "{desc}: {n_fmt} of {total_fmt} residues ({percentage:.0f}%) in {elapsed}, {rate_fmt} with start-up, "
    "{remaining} left"
)


class _Nowhere(io.TextIOBase):
    """Where the bar goes when nobody looks."""

    def write(self, text: str) -> int:
        return len(text)


class Progress:
    """Counts residues done out of a known total, and tells the rate and the time left."""

    def __init__(self, what: str, total_residues: int) -> None:
        self._next_log = time.monotonic() + _LOG_SECONDS
        # smoothing: the rate is that of the whole job.
        self._bar = tqdm(
            total=total_residues,
            desc=what,
            unit=" residues",
            unit_scale=True,
            smoothing=0,
            file=sys.stderr if sys.stderr.isatty() else _Nowhere(),
            ncols=100,
            leave=False,
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: Any) -> None:
        self._write_line()
        self._bar.close()

    @property
    def done(self) -> int:
        """Residues done so far."""
        return int(self._bar.n)

    def advance(self, residues: int) -> None:
        """Notes that more residues are done; fewer, if negative: what a dead worker had in hand."""
        self._bar.update(residues)

    def tick(self) -> None:
        """Writes the log line when it is time; called about once a second."""
        if time.monotonic() >= self._next_log:
            self._write_line()
            self._next_log = time.monotonic() + _LOG_SECONDS

    def _write_line(self) -> None:
        log.info("%s", tqdm.format_meter(**{**self._bar.format_dict, "ncols": None, "bar_format": _LINE}))
