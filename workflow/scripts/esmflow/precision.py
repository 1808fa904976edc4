"""Which precision a card computes in."""

from __future__ import annotations

import logging

import torch

log = logging.getLogger(__name__)


def resolve_precision(precision: str, device: torch.device) -> str:
    """`auto` is bf16 on a GPU of compute capability 8.0 or more, else fp32; says why. Others stay as they are."""
    if precision != "auto":
        return precision
    if device.type != "cuda":
        log.info("precision auto: fp32, because this runs on a CPU")
        return "fp32"
    major, minor = torch.cuda.get_device_capability(device)
    name = torch.cuda.get_device_name(device)
    if (major, minor) >= (8, 0):
        log.info("precision auto: bf16, because %s has compute capability %d.%d", name, major, minor)
        return "bf16"
    log.info("precision auto: fp32, because %s has compute capability %d.%d, below 8.0", name, major, minor)
    return "fp32"
