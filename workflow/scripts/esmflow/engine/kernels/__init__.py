"""Kernels, which need Triton, as PyTorch brings it along where it supports GPUs; `plain_…`: the same in PyTorch."""
