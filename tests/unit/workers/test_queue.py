"""The queue of files: each is in one place, and what failed once is tried again by another worker."""

from __future__ import annotations

from esmflow.failures import Reason
from esmflow.workers.queue import FailedFile, FileQueue

CRASH = (Reason.WORKER_CRASHED, "SIGKILL")


def test_what_a_worker_lost_is_tried_by_another_one_and_by_none_else_while_there_is_one():
    queue = FileQueue([["a"], []])
    assert queue.take(0, others=True) == "a"
    assert queue.retry_or_fail(0, *CRASH) == ["a"]
    assert not queue.has_for(0, others=True)
    assert queue.take(0, others=True) is None
    assert queue.has_for(1, others=True)
    assert queue.take(1, others=True) == "a"
    assert queue.retry_or_fail(1, *CRASH) == []
    assert queue.failed == [FailedFile("a", *CRASH)]
    assert queue.is_complete()


def test_a_worker_that_is_alone_tries_again_itself():
    queue = FileQueue([["a"], []])
    queue.take(0, others=False)
    queue.retry_or_fail(0, *CRASH)
    assert queue.has_for(0, others=False)
    assert queue.take(0, others=False) == "a"
    assert queue.done(0, "a", "result")
    assert (queue.results, queue.failed) == ({"a": "result"}, [])


def test_second_tries_come_last_and_a_worker_takes_from_the_one_with_most_left():
    queue = FileQueue([["a"], ["b", "c", "d"], ["e", "f"]])
    queue.take(0, others=True)
    queue.retry_or_fail(0, *CRASH)
    assert [queue.take(0, others=True) for _ in range(2)] == ["d", "c"]
    assert [queue.take(1, others=True) for _ in range(4)] == ["b", "f", "e", "a"]
    assert queue.take(2, others=True) is None


def test_what_is_given_up_fails_for_the_reason_that_it_failed_for_first():
    queue = FileQueue([["a", "b"], ["c"]])
    queue.take(0, others=True)
    queue.retry_or_fail(0, *CRASH)
    queue.take(1, others=True)
    queue.give_up(Reason.SYSTEMIC_ABORT, "given up")
    assert {failure.file: failure.reason for failure in queue.failed} == {
        "a": Reason.WORKER_CRASHED,
        "b": Reason.SYSTEMIC_ABORT,
        "c": Reason.SYSTEMIC_ABORT,
    }
    assert queue.is_complete()


def test_a_report_on_a_file_that_a_worker_does_not_have_changes_nothing():
    queue = FileQueue([["a"], ["b"]])
    queue.take(0, others=True)
    assert not queue.done(0, "b", None)
    assert not queue.fail(1, FailedFile("a", *CRASH))
    assert (queue.results, queue.failed, queue.in_hand(0)) == ({}, [], ("a",))
