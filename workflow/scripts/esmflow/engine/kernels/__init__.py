"""Triton kernels. Importing one of them needs Triton, which PyTorch brings along where it supports GPUs."""
