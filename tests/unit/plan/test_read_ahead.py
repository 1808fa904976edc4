"""Tasks in other processes: in order, never far ahead, and what goes wrong is said."""

import operator
import os
import signal
from functools import partial

import pytest

from esmflow.plan.read_ahead import TaskError, run_in_order


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_order_and_tasks_are_not_taken_far_ahead(workers):
    taken = []

    def tasks():
        for number in range(50):
            taken.append(number)
            yield f"task {number}", partial(operator.mul, number, 2)

    done = 0
    for label, result in run_in_order(tasks(), workers):
        assert (label, result) == (f"task {done}", 2 * done)
        done += 1
        assert len(taken) <= done + 3 * workers
    assert done == 50


def test_what_a_task_raises_is_raised_here():
    with pytest.raises(ZeroDivisionError):
        list(run_in_order([("a", partial(operator.truediv, 1, 0))], 2))


def test_a_worker_that_is_killed_is_a_sentence():
    tasks = [(number, partial(signal.raise_signal, signal.SIGKILL)) for number in range(3)]
    with pytest.raises(TaskError, match=r"a worker process was killed.*fewer --cores"):
        list(run_in_order(tasks, 2))


def test_workers_are_other_processes():
    ((_, process),) = run_in_order([("a", os.getpid)], 2)
    assert process != os.getpid()
    assert not os.path.exists(f"/proc/{process}")
