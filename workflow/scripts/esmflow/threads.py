"""Work that goes on beside the main thread, in order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

Item = TypeVar("Item")


class Background:
    """Runs calls one after the other in a thread of its own. One runs at a time and none waits: memory is bounded.

    What a call raises is raised by the next `run`, by `wait`, or at the end of the block.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._running: Future[Any] | None = None

    def __enter__(self) -> Background:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._thread.shutdown()
        if kind is None:
            self.wait()

    def run(self, call: Callable[..., Any], *arguments: Any) -> None:
        """Starts a call as soon as the one before has ended."""
        self.wait()
        self._running = self._thread.submit(call, *arguments)

    def wait(self) -> None:
        """Returns when nothing runs any more."""
        running, self._running = self._running, None
        if running is not None:
            running.result()


def one_ahead(items: Iterator[Item]) -> Iterator[Item]:
    """The same items; the next one is made in a thread while one is used."""
    with ThreadPoolExecutor(1) as thread:
        following = thread.submit(_take_one, items)
        while taken := following.result():
            following = thread.submit(_take_one, items)
            yield taken[0]


def _take_one(items: Iterator[Item]) -> tuple[Item, ...]:
    """The next item, alone; nothing at the end."""
    for item in items:
        return (item,)
    return ()
