"""Shared by the tests of attention, layernorm, mlp and the block: devices, dtypes and tolerances."""

import pytest
import torch

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}  # in relative norm
TOKENS = [1, 49, 50, 196, 197, 257]


def near(got, want, dtype=torch.float32, floor=0.0):
    """Asserts that `got` is near `want` in relative norm.

    floor: a root mean square difference that is always allowed, for gradients that cancel to nothing.
    """
    assert got.shape == want.shape, (got.shape, want.shape)
    difference, size = (got.double() - want.double()).norm(), want.double().norm()
    allowed = TOLERANCE[dtype] * size + floor * want.numel() ** 0.5
    assert difference <= allowed, (dtype, float(difference / size), float(size))


def gradients(outputs, seeds, inputs):
    """The gradients of sum(output · seed) for the inputs that are not None."""
    given = [t for t in inputs if t is not None]
    total = sum((out.to(seed.dtype) * seed).sum() for out, seed in zip(outputs, seeds, strict=True))
    return torch.autograd.grad(total, given)
