"""The GPUs of this machine in the order that CUDA numbers them, which need not be the driver's.

Unless CUDA_DEVICE_ORDER=PCI_BUS_ID is set, CUDA takes the fastest first, by a rule that NVIDIA does not tell: so CUDA
itself is asked, in a process of its own, as whoever has once asked sees the same GPUs for good.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import uuid
from collections.abc import Mapping

_SECONDS = 60


def cuda_order(environment: Mapping[str, str] = os.environ) -> list[str] | None:
    """The UUIDs of every GPU, as `GPU-…`, in CUDA's order; None if CUDA cannot be asked."""
    everything = {name: value for name, value in environment.items() if name != "CUDA_VISIBLE_DEVICES"}
    try:
        asked = subprocess.run(
            [sys.executable, "-I", __file__], env=everything, capture_output=True, text=True, timeout=_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return asked.stdout.split() if asked.returncode == 0 else None


def _list_devices() -> list[str]:
    cuda = ctypes.CDLL("libcuda.so.1")
    _check(cuda.cuInit(0))
    count = ctypes.c_int()
    _check(cuda.cuDeviceGetCount(ctypes.byref(count)))
    found = []
    for number in range(count.value):
        device, identity = ctypes.c_int(), (ctypes.c_ubyte * 16)()
        _check(cuda.cuDeviceGet(ctypes.byref(device), number))
        _check(cuda.cuDeviceGetUuid(ctypes.byref(identity), device))
        found.append(f"GPU-{uuid.UUID(bytes=bytes(identity))}")
    return found


def _check(result: int) -> None:
    if result:
        raise SystemExit(f"CUDA error {result}")


if __name__ == "__main__":
    print("\n".join(_list_devices()))
