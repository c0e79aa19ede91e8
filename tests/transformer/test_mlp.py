"""mlp on every available backend, against its definition in float64."""

import pytest
import torch
from support.block_cases import DEVICES, DTYPES, gradients, near
from support.tensors import leaves
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from lift_fast.errors import BackendError
from lift_fast.ops.transformer.contract import ACTIVATIONS, FUSED_GEMM, BiasAct, BiasActGrad, backends_here, load
from lift_fast.ops.transformer.eager import activate, slope
from lift_fast.ops.transformer.mlp import mlp, reference

SHAPES = [((1, 1), 1, 1), ((3, 17), 33, 5), ((1, 49, 24), 96, 24), ((2, 197, 64), 256, 64), ((50, 20), 172, 20)]


def case(shape, hidden, out, dtype, device="cpu"):
    width = shape[-1]
    weights = [torch.randn(hidden, width) / width**0.5, torch.randn(hidden), torch.randn(out, hidden) / hidden**0.5]
    return [t.to(device, dtype) for t in (2 * torch.randn(shape), *weights, torch.randn(out))]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("sizes", SHAPES, ids=str)
def test_values_and_gradients_are_the_definition_s(sizes, activation, dtype, device):
    inputs = case(*sizes, dtype, device)
    wide = leaves(*inputs, dtype=torch.float64)
    want = reference(*wide, activation)
    seed = torch.randn_like(want)
    wanted = gradients([want], [seed], wide)
    backends = backends_here(device) if dtype != torch.float64 else [None]
    for backend in backends:
        mine = leaves(*inputs)
        got = mlp(*mine, activation, backend=backend)
        assert got.dtype == dtype
        near(got, want, dtype)
        for g, o in zip(gradients([got], [seed], mine), wanted, strict=True):
            near(g, o, dtype, floor=1e-6)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_activation_everywhere(activation):
    """Value and slope elementwise, over the whole range."""
    z = torch.cat([torch.linspace(-12, 12, 4801), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1e4, -1e4])])
    wide = z.double().requires_grad_()
    value = activate(wide, activation)
    (gradient,) = torch.autograd.grad(value.sum(), wide)
    torch.testing.assert_close(slope(wide.detach(), activation), gradient, rtol=1e-9, atol=1e-12)
    for name in backends_here():
        launch = load(name)
        h, a, zero = z[:, None].contiguous(), torch.full((len(z), 1), torch.nan), torch.zeros(1)
        launch.bias_act(BiasAct(h, zero, activation, a))
        torch.testing.assert_close(a[:, 0].double(), value.detach(), rtol=2e-6, atol=1e-6)
        dh = torch.full_like(a, torch.nan)
        launch.bias_act_backward(BiasActGrad(torch.ones_like(h), h, zero, activation, dh, None))
        torch.testing.assert_close(dh[:, 0].double(), gradient, rtol=2e-6, atol=1e-6)


def test_large_values_and_nan():
    for name in backends_here():
        launch = load(name)
        for activation in ACTIVATIONS:
            h = torch.tensor([[float("nan"), 1e30]])
            a = torch.empty_like(h)
            launch.bias_act(BiasAct(h, torch.zeros(2), activation, a))
            assert a[0, 0].isnan() and a[0, 1] == h[0, 1], (name, activation, a)


def test_only_x_and_the_hidden_layer_are_kept():
    inputs = leaves(*case((7, 30, 64), 256, 64, torch.float32))
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        mlp(*inputs)
    weights = {t.untyped_storage().data_ptr() for t in inputs[1:]}
    assert sum(size for at, size in kept.items() if at not in weights) == 4 * 7 * 30 * (64 + 256)


def test_autocast_flops_and_refusals():
    inputs = leaves(*case((5, 9), 12, 4, torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        out = mlp(*inputs)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in inputs)
    with FlopCounterMode(display=False) as counter:
        mlp(*inputs).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 5 * 12 * (9 + 4)
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        fakes = [torch.zeros(t.shape, dtype=torch.bfloat16, requires_grad=True) for t in inputs]
        mlp(*fakes, backend=FUSED_GEMM).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 5 * 12 * (9 + 4)
    with pytest.raises(BackendError, match="no transformer backend 'triton_gemm' for bfloat16 on cpu"):
        mlp(*(t.bfloat16() for t in inputs), backend=FUSED_GEMM)
    with pytest.raises(ValueError, match="no activation 'relu'"):
        mlp(*inputs, "relu")
    with pytest.raises(ValueError, match=r"\[hidden, width\]"):
        mlp(inputs[0][:, 1:], *inputs[1:])
