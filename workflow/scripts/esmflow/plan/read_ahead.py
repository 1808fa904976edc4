"""Run tasks in worker processes and take their results in order, without letting them pile up."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from esmflow.errors import EsmflowError
from esmflow.workers.lifetime import DEFERRED_SIGNALS, die_with_parent

Label = TypeVar("Label")
Result = TypeVar("Result")

# Results that may wait, for each worker.
_AHEAD = 3


class TaskError(EsmflowError):
    """A worker process that ended before its task. The message says what to do."""


def run_in_order(tasks: Iterable[tuple[Label, Callable[[], Result]]], workers: int) -> Iterator[tuple[Label, Result]]:
    """Yields each task's label and result, in the order of the tasks.

    With one worker they run here, each when it is its turn. With more, tasks are sent to that many spawned processes,
    so they and their results must be picklable; not more of them wait than the workers need. What a task raises is
    raised here. Raises TaskError when a worker is killed.
    """
    if workers == 1:
        for label, task in tasks:
            yield label, task()
        return
    # A forked process would inherit the locks of threads that it does not have.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start_worker, (os.getpid(),)) as pool:
        waiting: deque[tuple[Label, Future[Result]]] = deque()
        try:
            for label, task in tasks:
                waiting.append((label, pool.submit(task)))
                if len(waiting) > _AHEAD * workers:
                    first, future = waiting.popleft()
                    yield first, future.result()
            while waiting:
                first, future = waiting.popleft()
                yield first, future.result()
        except BrokenProcessPool as error:
            raise TaskError(
                "a worker process was killed, most likely for want of memory; run again with fewer --cores"
            ) from error
        finally:
            for _, future in waiting:
                future.cancel()


def _start_worker(parent: int) -> None:
    die_with_parent(parent)
    # Both reach every process of a step, and are the parent's to deal with.
    for number in DEFERRED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
