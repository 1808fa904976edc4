"""Processes that end together: a worker with its supervisor, a supervisor with the run that started it."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

from esmflow.errors import EsmflowError

TERMINATED_EXIT_STATUS = 128 + signal.SIGTERM
"""What a scheduler expects of a job that it asked to end: 143."""

DEFERRED_SIGNALS = (signal.SIGINT, signal.SIGTERM)
"""Signals that reach every process of a job, and that its supervisor decides about."""

_PR_SET_PDEATHSIG = 1
_WATCH_SECONDS = 0.5
# Inherited by jobs: the process id of the run that they belong to, and the namespace in which it means something.
_RUN = "ESMFLOW_RUN"


class WrongSystemError(EsmflowError):
    """This system cannot run jobs. The message says why, and what to do."""


class Terminated(BaseException):
    """The job was asked to end (SIGTERM): by a scheduler at its time limit or for a job that goes first, or by a user.

    Like KeyboardInterrupt no Exception, so that nothing takes it for a failure of its own.
    """


def raise_when_terminated() -> None:
    """From now on SIGTERM raises Terminated in the main thread, so that whatever is held is let go of.

    Once: a scheduler may ask again while that is being done, and nothing must interrupt it.
    """

    def on_signal(number: int, frame: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise Terminated("asked to end (SIGTERM); what is finished is kept")

    signal.signal(signal.SIGTERM, on_signal)


@contextmanager
def when_terminated(action: Callable[[], None]) -> Iterator[None]:
    """During the block SIGTERM runs `action` instead; once it has, SIGTERM means nothing more."""
    before = signal.getsignal(signal.SIGTERM)

    def on_signal(number: int, frame: object) -> None:
        nonlocal before
        before = signal.SIG_IGN
        action()

    signal.signal(signal.SIGTERM, on_signal)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def die_with_parent(parent: int) -> None:
    """Asks Linux to kill this process when the one that started it (`parent`, a process id) ends, however it ends."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # The parent may have died before the request was made; then nothing would ever come.
    if os.getppid() != parent:
        os._exit(1)


def check_system() -> None:
    """Raises WrongSystemError where jobs cannot be run: that no process outlives its parent is for Linux to see to."""
    if sys.platform != "linux":
        raise WrongSystemError(
            f"runs need Linux, and this is {sys.platform}: on Windows use WSL 2, elsewhere a Linux machine; "
            "results can be read anywhere"
        )


def note_run() -> None:
    """Called by the process of a run, so that its jobs know which process must be alive."""
    os.environ[_RUN] = f"{os.getpid()} {_process_namespace()}"


def jobs_import_from(scripts: Path) -> None:
    """Called by the process of a run, so that its jobs import the library of its workflow.

    Another version of the package may be installed, and would be found first. An installed workflow has no library in
    its own scripts: there the package is the library.
    """
    if (scripts / "esmflow").is_dir():
        others = [path for path in [os.environ.get("PYTHONPATH")] if path]
        os.environ["PYTHONPATH"] = os.pathsep.join([str(scripts), *others])


def end_with_run(action: Callable[[], None]) -> None:
    """Runs `action` as soon as the run that this job's script belongs to has ended, or at once if it has already."""
    processes = ancestors_running("snakemake")
    if run := _run_of_this_job():
        try:
            processes.append(psutil.Process(run))
        except psutil.NoSuchProcess:
            action()
    when_any_ends(processes, action)


def main_process_of_run() -> psutil.Process | None:
    """The process of the run that this job belongs to, which would try it again.

    None outside a run, and in a cluster job or a container: the Snakemake around its script does not decide that.
    """
    run = _run_of_this_job()
    try:
        return psutil.Process(run) if run and "--mode" not in psutil.Process(run).cmdline() else None
    except psutil.Error:
        return None


def _run_of_this_job() -> int | None:
    """The process id of the run, None outside a run and in a container that cannot see it."""
    number, _, namespace = os.environ.get(_RUN, "").partition(" ")
    return int(number) if number and namespace == _process_namespace() else None


def _process_namespace() -> str:
    return os.readlink("/proc/self/ns/pid")


def ancestors_running(program: str) -> list[psutil.Process]:
    """This process's ancestors that run `program`, as `program …`, `python …/program …` or `python -m program …`."""
    found = []
    for process in psutil.Process().parents():
        try:
            if any(os.path.basename(word) == program for word in process.cmdline()[:3]):
                found.append(process)
        except psutil.Error:
            continue
    return found


def when_any_ends(processes: Sequence[psutil.Process], action: Callable[[], None]) -> None:
    """Runs `action` once, from a background thread, as soon as one of `processes` is no longer running.

    A job is not a child of the run that started it but its grandchild, so the parent-death signal does not reach it
    when the run is killed.
    """

    def watch() -> None:
        while all(_is_alive(process) for process in processes):
            time.sleep(_WATCH_SECONDS)
        action()

    if processes:
        threading.Thread(target=watch, name="watch-ancestors", daemon=True).start()


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
