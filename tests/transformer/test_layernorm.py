"""layernorm on every available backend, against its definition in float64."""

import pytest
import torch
from support.block_cases import DEVICES, DTYPES, gradients, near
from support.tensors import leaves

from lift_fast.errors import BackendError
from lift_fast.ops.transformer.contract import backends_here
from lift_fast.ops.transformer.layernorm import layernorm, reference

SHAPES = [(1, 1), (3, 17), (2, 49, 64), (1, 197, 192), (5, 257), (2, 50, 768)]


def case(shape, dtype, device, residual):
    x = (3 * torch.randn(shape) + 1).to(dtype)
    r = torch.randn(shape).to(dtype) if residual else None
    w, b = torch.randn(2, shape[-1], dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    return [None if t is None else t.to(device) for t in (x, r, w, b)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_are_the_definition_s(shape, residual, dtype, device):
    x, r, w, b = case(shape, dtype, device, residual)
    wide = leaves(x, r, w, b, dtype=torch.float64)
    # s is rounded on the way, so it is rounded in the definition too, and the rest needs no extra tolerance.
    s = wide[0] if r is None else wide[0] + wide[1]
    rounded = s + (s.detach().to(dtype).double() - s.detach())
    want = reference(rounded, wide[2], wide[3])
    seeds = [torch.randn_like(want), torch.randn_like(want)]
    outs = [want, s] if residual else [want]
    wanted = gradients(outs, seeds[: len(outs)], wide)
    for backend in backends_here(device) if dtype != torch.float64 else [None]:
        mine = leaves(x, r, w, b)
        got = layernorm(mine[0], mine[2], mine[3], residual=mine[1], backend=backend)
        got = list(got) if residual else [got]
        assert all(t.dtype == dtype and t.is_contiguous() for t in got)
        for g, o in zip(got, outs, strict=True):
            near(g, o, dtype, floor=1e-6)
        # The gradient of the normalisation of one element is 0, up to rounding.
        for g, o in zip(gradients(got, seeds[: len(got)], mine), wanted, strict=True):
            near(g, o, dtype, floor=1e-5 if shape[-1] == 1 else 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_scales(dtype):
    w, b = torch.ones(100), torch.zeros(100)
    for scale, shift in ((1e-6, 0), (1e6, 0), (1, 100)):
        x = (scale * torch.randn(7, 100) + shift).to(dtype)
        for backend in backends_here("cpu"):
            near(layernorm(x, w, b, 1e-14, backend=backend), reference(x.double(), w, b, 1e-14), dtype)


def test_strided_inputs_and_gradients():
    x, w, b = torch.randn(5, 33, 6).transpose(1, 2), torch.randn(33), torch.randn(33)
    for backend in backends_here("cpu"):
        mine = leaves(w, b)
        got = layernorm(x, *mine, backend=backend)
        near(got, reference(x.double(), w.double(), b.double()))
        seed = torch.randn(33).expand(5, 6, 33)  # stride 0
        want = gradients([reference(x.double(), *(t.double() for t in mine))], [seed.double()], mine)
        for g, o in zip(gradients([got], [seed], mine), want, strict=True):
            near(g, o)


def test_the_gradient_that_comes_in_is_left_alone():
    x, w, b = leaves(torch.randn(4, 8), torch.ones(8), torch.zeros(8))
    for backend in backends_here("cpu"):
        seed = torch.randn(4, 8)
        before = seed.clone()
        layernorm(x, w, b, backend=backend).backward(seed)
        assert torch.equal(seed, before)


def test_no_rows_and_refusals():
    w, b = torch.ones(8), torch.zeros(8)
    for backend in backends_here("cpu"):
        x, weight, bias = leaves(torch.empty(2, 0, 8), w, b)
        y = layernorm(x, weight, bias, backend=backend)
        assert y.shape == (2, 0, 8)
        y.sum().backward()
        assert not weight.grad.any() and x.grad.shape == x.shape
    with pytest.raises(ValueError, match=r"weight \(7,\)"):
        layernorm(torch.ones(2, 8), torch.ones(7), b)
    with pytest.raises(ValueError, match="must match x"):
        layernorm(torch.ones(2, 8), w, b, residual=torch.ones(2, 8, dtype=torch.bfloat16))
    with pytest.raises(BackendError, match="no transformer backend 'cuda' for float32 on cpu"):
        layernorm(torch.ones(2, 8), w, b, backend="cuda")
    with pytest.raises(RuntimeError, match="once_differentiable|differentiate"):
        x = torch.randn(3, 8, requires_grad=True)
        (g,) = torch.autograd.grad(layernorm(x, w, b).square().sum(), x, create_graph=True)
        g.sum().backward()
