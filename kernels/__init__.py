"""Triton kernels, one file per op; installed as `lift_fast.kernels`. They import nothing of lift_fast."""
