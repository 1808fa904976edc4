"""Running out of memory, on the device or on the host: telling it from other errors, and making room again."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from typing import TypeVar

import torch

Result = TypeVar("Result")

_MESSAGES = (
    "out of memory",  # CUDA's allocator, the driver ("CUDA error: out of memory"), and page-locked memory
    "can't allocate memory",  # PyTorch's allocator on a CPU
    "cannot allocate memory",  # the operating system
    "alloc_failed",  # cuBLAS and cuDNN, which allocate on their own: CUBLAS_STATUS_ALLOC_FAILED
    "bad_alloc",  # C++
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out, on the device or on the host, page-locked or not."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError | OSError) and any(text in str(error).lower() for text in _MESSAGES)


def unless_out_of_memory(work: Callable[[], Result]) -> Result | str:
    """The result of `work`, or the message if memory ran out.

    A message instead of the exception, whose traceback would keep the tensors of the failed attempt alive.
    """
    try:
        return work()
    except (MemoryError, RuntimeError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        return str(error) or "out of memory"


def release_memory() -> None:
    """Gives cached memory back to the device, so that what is tried next finds all of it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# Of glibc's malloc.h: from how many bytes on memory comes from the system, and how much is kept when it is freed.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> None:
    """Lets this process keep what it frees for what it needs next, up to 1 GiB at once; with glibc only.

    On a CPU a quarter of the time of fair-esm's module goes into memory for attention maps that is taken from the
    system, cleared and given back at every layer.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        for parameter in (_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD):
            libc.mallopt(parameter, 1 << 30)
