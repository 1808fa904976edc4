"""Worker functions for the tests of workers: what a spawned process runs must be importable."""

from __future__ import annotations

import os
import signal
import time


def copies(file_subset, device_id, **kwargs):
    """Processes every file."""
    for file in file_subset:
        file_subset.progress(1)
        file_subset.done(file, {"device": device_id, "worker": os.getpid(), **kwargs})


def dies_on(file_subset, device_id, *, deadly, number=signal.SIGKILL):
    """Ends by a signal on the files named in `deadly`."""
    for file in file_subset:
        if file in deadly:
            os.kill(os.getpid(), number)
        file_subset.done(file, os.getpid())


def raises_on(file_subset, device_id, *, bad):
    """Raises on the files named in `bad`."""
    for file in file_subset:
        if file in bad:
            raise RuntimeError(f"CUDA error while working on {file}")
        file_subset.done(file, os.getpid())


def never_starts(file_subset, device_id):
    """Fails before it asks for a file, as with a checkpoint that cannot be loaded."""
    raise OSError("the checkpoint is corrupted")


def forgets(file_subset, device_id):
    """Goes on without reporting the files whose name ends in 1, and leaves after the third."""
    for count, file in enumerate(file_subset, 1):
        if not file.endswith("1"):
            file_subset.done(file, None)
        if count == 3:
            return


def sleeps(file_subset, device_id, *, marker):
    """Writes its process id to `marker` and sleeps."""
    for _file in file_subset:
        with open(marker, "w") as handle:
            handle.write(str(os.getpid()))
        time.sleep(600)


def says_what_was_imported(file_subset, device_id):
    """Reports whether torch is there before the worker imports anything itself."""
    import sys

    for file in file_subset:
        file_subset.done(file, "torch" in sys.modules)


def does_not_fit(files, device):
    """Has other arguments than a worker function must have."""
