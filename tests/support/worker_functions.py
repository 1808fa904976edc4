"""Worker functions for the tests of workers: what a spawned process runs must be importable.

Most are about processes alone. What computes is imported where it is used: each of many processes starts in a third of
the time without it.
"""

from __future__ import annotations

import ctypes
import logging
import os
import resource
import signal
import sys
import threading
import time

from esmflow.failures import Reason
from esmflow.workers.process import FileSubset
from esmflow.workers.queue import FailedFile


def copies(file_subset, device_id, **kwargs):
    """Processes every file."""
    processed = []
    for file in file_subset:
        file_subset.progress(1)
        file_subset.done(file, {"device": device_id, "worker": os.getpid(), **kwargs})
        processed.append(file)
    return processed, []


def reports_nothing(file_subset, device_id):
    """Takes what there is and says at the end what came of it: file-1 has failed, file-2 is not mentioned."""
    files = list(file_subset)
    return (
        [file for file in files if file not in ("file-1", "file-2")],
        [FailedFile(file, Reason.OUT_OF_MEMORY, "too long") for file in files if file == "file-1"],
    )


def returns_nothing(file_subset, device_id):
    """Breaks the contract."""


def takes_its_time(file_subset, device_id, *, slow, seconds):
    """The worker with the number `slow` needs `seconds` for each file."""
    for file in file_subset:
        if device_id == slow:
            time.sleep(seconds)
        file_subset.done(file, device_id)
    return [], []


def dies_on(file_subset, device_id, *, deadly, number=signal.SIGKILL):
    """Ends by a signal on the files named in `deadly`."""
    for file in file_subset:
        logging.getLogger(__name__).info("working on %s", file)
        if file in deadly:
            os.kill(os.getpid(), number)
        file_subset.done(file, device_id)
    return [], []


def dies_once_on(file_subset, device_id, *, deadly, marks, how="kill"):
    """Ends on the files named in `deadly`, the first time that any worker has them in hand."""
    for file in file_subset:
        file_subset.progress(5)
        mark = os.path.join(marks, file)
        if file in deadly and not os.path.exists(mark):
            with open(mark, "w") as handle:
                handle.write(str(device_id))
            print("last words on", file, file=sys.stderr, flush=True)
            end_yourself(how)
        file_subset.done(file, device_id)
    return [], []


class FilesUnderALimit(FileSubset):
    """Lets its process have `more` bytes of memory beyond what it has when it takes its first file."""

    def __init__(self, connection, more):
        super().__init__(connection)
        self._more = more

    def __iter__(self):
        for number, file in enumerate(super().__iter__()):
            if number == 0:
                with open("/proc/self/statm") as handle:
                    now = int(handle.read().split()[0]) * resource.getpagesize()
                resource.setrlimit(resource.RLIMIT_AS, (now + self._more, resource.RLIM_INFINITY))
            yield file


def embeds_with_little_memory(file_subset, device_id, *, more, **kwargs):
    """The workflow's own worker, with a limit."""
    from esmflow.embedding.worker import process_esm_files_worker

    limited = FilesUnderALimit(file_subset._connection, more)
    return process_esm_files_worker(limited, device_id, **kwargs)


def end_yourself(how):
    """`kill`, `segfault` (a real one), or `memory`: what Linux does to a process when memory runs out."""
    if how == "segfault":
        ctypes.string_at(0)
    if how == "memory":
        resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
        bytearray(2 << 30)
    os.kill(os.getpid(), signal.SIGKILL)


def works_on_one_device_only(file_subset, device_id, *, broken, marks):
    """Raises before it takes a file on the device `broken`; the others keep one in hand until that was three times."""
    if device_id == broken:
        open(os.path.join(marks, str(os.getpid())), "w").close()
        raise RuntimeError(f"CUDA error: device {device_id} is unusable")
    for count, file in enumerate(file_subset):
        while count and len(os.listdir(marks)) < 3:
            time.sleep(0.05)
        file_subset.done(file, device_id)
    return [], []


def raises_on(file_subset, device_id, *, bad):
    """Raises on the files named in `bad`."""
    for file in file_subset:
        if file in bad:
            raise RuntimeError(f"CUDA error while working on {file}")
        file_subset.done(file, os.getpid())
    return [], []


def fails_on(file_subset, device_id, *, bad):
    """Reports the files named in `bad` as failed and goes on."""
    for file in file_subset:
        if file in bad:
            file_subset.failed(file, Reason.OUT_OF_MEMORY, "does not fit")
        else:
            file_subset.done(file, os.getpid())
    return [], []


def never_starts(file_subset, device_id):
    """Fails before it asks for a file, as with a checkpoint that cannot be loaded."""
    raise OSError("the checkpoint is corrupted")


def forgets(file_subset, device_id):
    """Goes on without reporting the files whose name ends in 1, and leaves after the third."""
    for count, file in enumerate(file_subset, 1):
        if not file.endswith("1"):
            file_subset.done(file, None)
        if count == 3:
            break
    return [], []


def sleeps(file_subset, device_id, *, marker, seconds=600.0):
    """Writes its process id to `marker` and sleeps over each file."""
    for file in file_subset:
        with open(marker, "w") as handle:
            handle.write(str(os.getpid()))
        time.sleep(seconds)
        file_subset.done(file, device_id)
    return [], []


def hangs_once(file_subset, device_id, *, marker):
    """Falls silent on the first file that any worker takes, as a GPU does that does not answer."""
    for file in file_subset:
        if not os.path.exists(marker):
            open(marker, "w").close()
            time.sleep(600)
        file_subset.done(file, device_id)
    return [], []


def says_what_was_imported(file_subset, device_id):
    """Reports whether torch is there before the worker imports anything itself."""
    for file in file_subset:
        file_subset.done(file, "torch" in sys.modules)
    return [], []


def does_not_fit(files, device):
    """Has other arguments than a worker function must have."""


def adds(one, another, mark=None):
    """No worker function: for `run_one`. With a mark that is not there, makes it and dies."""
    if mark and not os.path.exists(mark):
        open(mark, "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    return {"sum": one + another, "process": os.getpid()}


def does_not_leave(file_subset, device_id):
    """Processes every file, and a thread keeps its process alive for ever after."""
    threading.Thread(target=time.sleep, args=(3600,)).start()
    for file in file_subset:
        file_subset.done(file, os.getpid())
    return [], []


def works_slowly(file_subset, device_id, *, marker, steps):
    """Gives a sign of life every tenth of a second. Writes its process id to `marker` when it begins."""
    for file in file_subset:
        with open(marker, "w") as handle:
            handle.write(str(os.getpid()))
        for _ in range(steps):
            time.sleep(0.1)
            file_subset.progress(1)
        file_subset.done(file, device_id)
    return [], []


def waits_for(file_subset, device_id, *, folder):
    """Each file waits until a file of its name is in a folder; `{name}.begun` says that it does."""
    for file in file_subset:
        open(os.path.join(folder, f"{file}.begun"), "w").close()
        while not os.path.exists(os.path.join(folder, file)):
            time.sleep(0.02)
        file_subset.done(file, device_id)
    return [], []


def waits_once(file_subset, device_id, *, slow, path):
    """The worker with the number `slow` keeps its first file in hand until there is something at `path`."""
    for file in file_subset:
        while device_id == slow and not os.path.exists(path):
            time.sleep(0.02)
        file_subset.done(file, device_id)
    return [], []


def remembers(folder, method, numbers):
    """No worker: what a run does when it has verified sequences."""
    from esmflow.store.segments import Store
    from esmflow.verify.agreement import Agreement
    from esmflow.verify.remembered import add_verified

    store = Store(folder, method)
    for number in numbers:
        digest = f"{number:032x}"
        add_verified(store, {digest: f"{number:016x}"}, {digest: {"mean_layer6": Agreement(1.0, 0.0, 1.0)}})
