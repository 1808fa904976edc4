"""Work that goes on beside the main thread, in order."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


class Background:
    """Runs calls one after the other in a thread of its own. One runs at a time and none waits: memory is bounded.

    What a call raises is raised by the next `run`, or by `wait`.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._running: Future[Any] | None = None

    def __enter__(self) -> Background:
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown()

    def run(self, call: Callable[..., Any], *arguments: Any) -> None:
        """Starts a call as soon as the one before has ended."""
        self.wait()
        self._running = self._thread.submit(call, *arguments)

    def wait(self) -> None:
        """Returns when nothing runs any more."""
        running, self._running = self._running, None
        if running is not None:
            running.result()
