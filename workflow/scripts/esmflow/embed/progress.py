"""Progress of a job: a line now and then in the log, a bar on a terminal."""

from __future__ import annotations

import logging
import sys
import time
from typing import Any

from tqdm import tqdm

log = logging.getLogger(__name__)

_LOG_SECONDS = 30.0


class Progress:
    """Counts residues done out of a known total, and tells the rate and the time left."""

    def __init__(self, what: str, total_residues: int) -> None:
        self._what = what
        self._total = total_residues
        self._done = 0
        self._started = time.monotonic()
        self._next_log = self._started + _LOG_SECONDS
        self._bar = tqdm(
            total=total_residues,
            desc=what,
            unit=" residues",
            unit_scale=True,
            disable=not sys.stderr.isatty(),
            ncols=100,
            leave=False,
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: Any) -> None:
        self._bar.close()
        self._write_line()

    @property
    def done(self) -> int:
        """Residues done so far."""
        return self._done

    def advance(self, residues: int) -> None:
        """Notes that more residues are done."""
        self._done += residues
        self._bar.update(residues)

    def tick(self) -> None:
        """Writes the log line when it is time; called about once a second."""
        if time.monotonic() >= self._next_log:
            self._write_line()
            self._next_log = time.monotonic() + _LOG_SECONDS

    def _write_line(self) -> None:
        seconds = time.monotonic() - self._started
        rate = self._done / seconds if seconds else 0.0
        left = f"{(self._total - self._done) / rate:,.0f} s left" if rate else "time left unknown"
        share = self._done / self._total if self._total else 1.0
        log.info(
            "%s: %s of %s residues (%.0f%%) in %.0f s, %s residues/s, %s",
            self._what, f"{self._done:,}", f"{self._total:,}", 100 * share, seconds, f"{rate:,.0f}", left,
        )  # fmt: skip
