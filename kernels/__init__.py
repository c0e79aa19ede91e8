"""Triton kernels, one file an op; installed as `lift_fast.kernels`. They import nothing of lift_fast."""
