"""Which precision a card computes in."""

from __future__ import annotations

import logging

import torch

log = logging.getLogger(__name__)


def resolve_precision(precision: str, device: torch.device, sixteen_bits: str) -> str:
    """`auto` is `sixteen_bits` on a GPU of compute capability 8.0 or more, else fp32; says why. Others stay.

    sixteen_bits: `fp16` or `bf16`, whichever the engine prefers.
    """
    if precision != "auto":
        return precision
    if device.type != "cuda":
        log.info("precision auto: fp32, because this runs on a CPU")
        return "fp32"
    major, minor = torch.cuda.get_device_capability(device)
    name = torch.cuda.get_device_name(device)
    if (major, minor) >= (8, 0):
        log.info("precision auto: %s, because %s has compute capability %d.%d", sixteen_bits, name, major, minor)
        return sixteen_bits
    log.info("precision auto: fp32, because %s has compute capability %d.%d, below 8.0", name, major, minor)
    return "fp32"
