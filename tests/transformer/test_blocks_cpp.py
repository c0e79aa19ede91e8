"""csrc/transformer on every instruction set of this CPU, against the torch backend in float64."""

import os
import subprocess
import sys

import pytest
import torch

from lift_fast import _C
from lift_fast.ops.transformer import cpp, eager
from lift_fast.ops.transformer.contract import (
    ACTIVATIONS,
    BiasAct,
    BiasActGrad,
    LayerNorm,
    LayerNormGrad,
    backends_here,
    choose,
)

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
DTYPES = [F32, BF16, F16]
# Relative to the norm: half a unit in the last place of what is rounded to the dtype, for the smallest shape.
NEAR = {F32: 3e-6, BF16: 4e-3, F16: 5e-4}
# Rows: one, fewer and more than are computed at once, several groups and part of one. Width: every remainder of 4, 8
# and 16 lanes, and of four vectors.
SHAPES = [(1, 1), (3, 1), (1, 3), (2, 17), (5, 192), (33, 257), (131, 768), (70, 1152), (301, 65), (1, 4099)]
CALLS = ("layernorm_cpu", "layernorm_backward_cpu", "bias_act_cpu", "bias_act_backward_cpu")


@pytest.fixture(params=_C.blocks_isa_levels())
def isa(request, monkeypatch):
    """Runs the backend on this instruction set, with more threads than there may be work for."""
    for name in CALLS:
        call = getattr(_C, name)
        monkeypatch.setattr(cpp._C, name, lambda call=call, **k: call(**{**k, "isa": request.param, "threads": 5}))
    return request.param


class Guarded:
    """Allocates tensors of NaN between guards, and checks that nothing around them was written."""

    def __init__(self):
        self.all = []

    def __call__(self, *shape, dtype=F32, like=None):
        count = torch.Size(shape).numel()
        whole = torch.full((count + 128,), 7.0, dtype=dtype)
        inner = whole[64 : 64 + count].view(shape)
        inner.copy_(torch.full(shape, torch.nan) if like is None else like)
        self.all.append((whole, count))
        return inner

    def untouched(self):
        return all((whole[:64] == 7).all() and (whole[64 + count :] == 7).all() for whole, count in self.all)


@pytest.fixture
def guarded():
    return Guarded()


def assert_near(got, wanted, tolerance):
    assert (got.double() - wanted).norm() <= tolerance * wanted.norm()


def parameters(width, scale=1.0):
    return torch.randn(width) * scale + 1, torch.randn(width)


def tokens(rows, width, dtype, spread=1.0, mean=0.0):
    return (torch.randn(rows, width) * spread + mean).to(dtype)


def exact_layernorm(stream, weight, bias, eps):
    """y, mean, rstd in float64."""
    y, (mean, rstd) = torch.empty_like(stream, dtype=F64), torch.empty(2, len(stream), dtype=F64)
    eager.layernorm(LayerNorm(stream.double(), None, weight.double(), bias.double(), eps, y, None, mean, rstd))
    return y, mean, rstd


def layernorm(guarded, x, residual, weight, bias, eps=1e-6):
    rows, width = x.shape
    y, stream = guarded(rows, width, dtype=x.dtype), guarded(rows, width, dtype=x.dtype)
    mean, rstd = guarded(rows), guarded(rows)
    cpp.layernorm(LayerNorm(x, residual, weight, bias, eps, y, None if residual is None else stream, mean, rstd))
    assert guarded.untouched()
    return y, stream, mean, rstd


def check_layernorm(guarded, x, residual, weight, bias, eps=1e-6):
    y, stream, mean, rstd = layernorm(guarded, x, residual, weight, bias, eps)
    if residual is None:
        assert stream.isnan().all()
        stream = x
    else:
        assert torch.equal(stream, x + residual)
    wanted = exact_layernorm(stream, weight, bias, eps)
    assert_near(y, wanted[0], NEAR[y.dtype])
    assert_near(rstd, wanted[2], 1e-6)
    assert ((mean - wanted[1]).abs() <= 1e-6 * stream.double().abs().amax(1)).all()


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_layernorm(isa, guarded, shape, dtype, with_residual):
    x = tokens(*shape, dtype)
    residual = tokens(*shape, dtype) if with_residual else None
    check_layernorm(guarded, x, residual, *parameters(shape[1]), eps=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spread, mean", [(1.0, 1e4), (1.0, -1e4), (1e3, 0.0), (1e3, 1e4), (1e-3, 1.0), (1e-4, 0.0)])
def test_layernorm_of_extreme_rows(isa, guarded, spread, mean, dtype):
    check_layernorm(guarded, tokens(40, 771, dtype, spread, mean), None, *parameters(771))


def test_layernorm_of_rows_of_one_value(isa, guarded):
    weight, bias = parameters(97)
    x = tokens(6, 1, F32, 1e3).expand(6, 97).contiguous()
    y, *_, rstd = layernorm(guarded, x, None, weight, bias)
    torch.testing.assert_close(y, bias.expand(6, 97), rtol=0, atol=1e-4)
    torch.testing.assert_close(rstd, torch.full((6,), 1e3), rtol=1e-3, atol=0)


def test_a_nan_stays_in_its_row(isa, guarded):
    x = tokens(35, 100, BF16)
    x[33, 97] = torch.nan
    y, _, mean, rstd = layernorm(guarded, x, None, *parameters(100))
    for out in (y[:, 0], y[:, 99], mean, rstd):
        assert out[33].isnan() and out.isnan().sum() == 1


def backward_case(rows, width, dtype, spread=1.0, mean=0.0):
    """dy, stream, mean, rstd, weight, bias; the last four in float32."""
    stream, (weight, bias) = tokens(rows, width, dtype, spread, mean), parameters(width)
    _, average, rstd = exact_layernorm(stream, weight, bias, 1e-5)
    return tokens(rows, width, dtype), stream, average.float(), rstd.float(), weight, bias


def exact_backward(case, d_stream):
    """dx, y, d_weight, d_bias in float64, from the same mean and rstd."""
    dy = case[0].double()
    dx, y = torch.empty_like(dy), torch.empty_like(dy)
    d_stream = None if d_stream is None else d_stream.double()
    sums = eager.layernorm_backward(LayerNormGrad(*(t.double() for t in case), d_stream, dx, y))
    return dx, y, *sums


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("with_d_stream", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_layernorm_backward(isa, guarded, shape, dtype, with_d_stream, again):
    case = backward_case(*shape, dtype)
    d_stream = tokens(*shape, dtype) if with_d_stream else None
    dx, y = guarded(*shape, dtype=dtype), guarded(*shape, dtype=dtype)
    got = cpp.layernorm_backward(LayerNormGrad(*case, d_stream, dx, y if again else None))
    assert guarded.untouched()
    wanted = exact_backward(case, d_stream)
    assert y.isnan().all() or again
    for out, exact in zip((dx, y if again else wanted[1], *got), wanted, strict=True):
        assert_near(out, exact, NEAR.get(out.dtype, 0))


@pytest.mark.parametrize("spread, mean", [(1.0, 1e4), (1e3, 0.0), (1e-3, 1.0)])
def test_layernorm_backward_of_extreme_rows(isa, spread, mean):
    case = backward_case(50, 771, F32, spread, mean)
    dx, y = torch.full((2, 50, 771), torch.nan)
    got = cpp.layernorm_backward(LayerNormGrad(*case, None, dx, y))
    for out, exact in zip((dx, y, *got), exact_backward(case, None), strict=True):
        assert_near(out, exact, 2e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("alias", ["dy", "d_stream"])
def test_dx_may_be_dy_or_d_stream(isa, alias, dtype):
    case, d_stream = backward_case(45, 83, dtype), tokens(45, 83, dtype)
    apart = torch.full_like(d_stream, torch.nan)
    wanted = cpp.layernorm_backward(LayerNormGrad(*case, d_stream, apart, None))
    dx = case[0] if alias == "dy" else d_stream
    got = cpp.layernorm_backward(LayerNormGrad(*case, d_stream, dx, None))
    for out, exact in zip((dx, *got), (apart, *wanted), strict=True):
        assert torch.equal(out, exact)


def exact_bias_act(da, h, bias, activation):
    """a, dh, d_bias in float64."""
    a, dh = torch.empty_like(h, dtype=F64), torch.empty_like(h, dtype=F64)
    d_bias = eager.bias_act_backward(BiasActGrad(da.double(), h.double(), bias.double(), activation, dh, a))
    return a, dh, d_bias


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bias_act(isa, guarded, shape, dtype, activation):
    h, da, bias = tokens(*shape, dtype, 2), tokens(*shape, dtype), torch.randn(shape[1])
    a, again, dh, alone = (guarded(*shape, dtype=dtype) for _ in range(4))
    cpp.bias_act(BiasAct(h, bias, activation, a))
    d_bias = cpp.bias_act_backward(BiasActGrad(da, h, bias, activation, dh, again))
    only = cpp.bias_act_backward(BiasActGrad(da, h, bias, activation, alone, None))
    assert guarded.untouched()
    assert torch.equal(a, again) and torch.equal(dh, alone) and torch.equal(d_bias, only)
    for out, exact in zip((a, dh, d_bias), exact_bias_act(da, h, bias, activation), strict=True):
        assert_near(out, exact, NEAR[out.dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_outputs_may_be_inputs(isa, activation, dtype):
    h, da, bias = tokens(45, 83, dtype), tokens(45, 83, dtype), torch.randn(83)
    a, dh = torch.full((2, 45, 83), torch.nan, dtype=dtype)
    d_bias = cpp.bias_act_backward(BiasActGrad(da, h, bias, activation, dh, a))
    inplace, other = h.clone(), da.clone()
    cpp.bias_act(BiasAct(inplace, bias, activation, inplace))
    assert torch.equal(inplace, a)
    got = cpp.bias_act_backward(BiasActGrad(other, h, bias, activation, other, h))
    assert torch.equal(other, dh) and torch.equal(h, a) and torch.equal(got, d_bias)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_everywhere(isa, activation):
    """From subnormals to the largest float32: within 1.2e-7 of the value, or 3e-7 where it or its slope is below 1."""
    sizes = torch.logspace(-44, 38.5, 3001, dtype=F64)
    z = torch.cat([torch.linspace(-110, 110, 20001, dtype=F64), torch.linspace(-7, 7, 50001, dtype=F64), sizes, -sizes])
    z = z.clamp(-3.4e38, 3.4e38).float()[None]
    a, dh = torch.full((2, *z.shape), torch.nan)
    cpp.bias_act_backward(BiasActGrad(torch.ones_like(z), z, torch.zeros(z.shape[1]), activation, dh, a))
    wide = z.double()
    # Far from zero, the plain slope of the tanh form is inf - inf, in float64 too.
    slope = torch.where(wide.abs() > 1e3, (wide > 0).double(), eager.slope(wide, activation))
    exact = eager.activate(wide, activation)
    assert ((a - exact).abs() <= 1.2e-7 * exact.abs().clamp_min(2.5)).all()
    assert ((dh - slope).abs() <= 3e-7).all()
    small = (wide.abs() < 1) & (wide.abs() > 1e-36)
    assert ((a - exact).abs() <= 1e-6 * exact.abs())[small].all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_ends_of_activations(isa, activation, dtype):
    """z where the activation is z, 0 where it is 0, at infinity too. A NaN stays NaN and affects no other element."""
    ends = torch.tensor([torch.inf, -torch.inf, 100.0, -100.0, 0.0, torch.nan, 1.0], dtype=dtype)
    h = ends.repeat(3)[None].contiguous()
    a, dh = torch.full((2, *h.shape), torch.nan, dtype=dtype)
    cpp.bias_act_backward(BiasActGrad(torch.ones_like(h), h, torch.zeros(21), activation, dh, a))
    wanted = torch.tensor([torch.inf, 0, 100, 0, 0, torch.nan], dtype=dtype).repeat(3)
    slopes = torch.tensor([1, 0, 1, 0, 0.5, torch.nan], dtype=dtype).repeat(3)
    kept = torch.arange(21) % 7 != 6
    torch.testing.assert_close(a[0, kept], wanted, rtol=0, atol=1e-30, equal_nan=True)
    torch.testing.assert_close(dh[0, kept], slopes, rtol=0, atol=2e-7, equal_nan=True)
    assert a[0, ~kept].isfinite().all()


def test_a_nan_of_any_kind_stays_one(isa):
    """Rounding to bfloat16 must not carry from a NaN's bits into the sign."""
    bias = torch.full((33,), -1, dtype=torch.int32).view(F32)
    a = torch.zeros(2, 33, dtype=BF16)
    cpp.bias_act(BiasAct(tokens(2, 33, BF16), bias, "gelu", a))
    assert a.isnan().all()


def everything(rows, width, dtype):
    """All outputs of one call of each function."""
    torch.manual_seed(1)
    x, residual, (weight, bias) = tokens(rows, width, dtype), tokens(rows, width, dtype), parameters(width)
    y, stream, dx, a, dh = torch.empty(5, rows, width, dtype=dtype)
    mean, rstd = torch.empty(2, rows)
    cpp.layernorm(LayerNorm(x, residual, weight, bias, 1e-6, y, stream, mean, rstd))
    sums = cpp.layernorm_backward(LayerNormGrad(x, stream, mean, rstd, weight, bias, residual, dx, None))
    d_bias = cpp.bias_act_backward(BiasActGrad(residual, x, bias, "gelu", dh, a))
    return [t.float().numpy().tobytes() for t in (y, stream, mean, rstd, dx, *sums, a, dh, d_bias)]


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_the_same_bits_every_time_with_any_number_of_threads(dtype):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first = everything(1100, 640, dtype)
        for threads in (1, 2, 2, 5, 5, 5):
            torch.set_num_threads(threads)
            assert everything(1100, 640, dtype) == first, threads
    finally:
        torch.set_num_threads(before)


def test_sums_over_many_rows(isa):
    """200 000 terms of one sign, for which a single float32 sum would be off by 1e-5 at best."""
    rows = 200_000
    dy, stream = torch.rand(rows, 5), torch.randn(rows, 5)
    mean, rstd, weight, bias = torch.zeros(rows), torch.ones(rows), torch.ones(5), torch.zeros(5)
    dx = torch.empty_like(dy)
    _, d_bias = cpp.layernorm_backward(LayerNormGrad(dy, stream, mean, rstd, weight, bias, None, dx, None))
    assert_near(d_bias, dy.double().sum(0), 1e-6)
    d_bias = cpp.bias_act_backward(BiasActGrad(dy, stream, bias, "gelu", torch.empty_like(dy), None))
    assert_near(d_bias, exact_bias_act(dy, stream, bias, "gelu")[2], 1e-6)


@pytest.mark.parametrize("rows, width", [(0, 8), (0, 0)])
def test_no_rows(isa, rows, width):
    x, of_width, of_rows = torch.empty(rows, width), torch.ones(width), torch.empty(rows)
    cpp.layernorm(LayerNorm(x, None, of_width, of_width, 1e-6, x, None, of_rows, of_rows))
    sums = cpp.layernorm_backward(LayerNormGrad(x, x, of_rows, of_rows, of_width, of_width, None, x, None))
    cpp.bias_act(BiasAct(x, of_width, "gelu", x))
    for out in (*sums, cpp.bias_act_backward(BiasActGrad(x, x, of_width, "gelu", x, None))):
        assert torch.equal(out, torch.zeros(width))


def test_it_is_the_first_choice_on_the_cpu_but_for_float64():
    assert backends_here("cpu")[0] == "cpp" and choose("cpu", BF16) is cpp
    assert choose("cpu", F64) is eager


def test_what_it_does_not_have_is_an_error():
    job = {"h": 0, "bias": 0, "a": 0, "rows": 0, "width": 0, "activation": 0, "type": 0, "threads": 1}
    with pytest.raises(ValueError, match="no 'mmx'"):
        _C.bias_act_cpu(**job, isa="mmx")
    with pytest.raises(ValueError, match="type must be 0"):
        _C.bias_act_cpu(**{**job, "type": 3})
    with pytest.raises(ValueError, match="activation must be 0"):
        _C.bias_act_cpu(**{**job, "activation": 3})


FORK = """
import os, signal, time, torch
from lift_fast.ops.transformer import cpp
from lift_fast.ops.transformer.contract import LayerNorm
torch.set_num_threads(2)
torch.randn(300, 300) @ torch.randn(300, 300)  # starts torch's OpenMP team
def run():
    x, w, b = torch.randn(4000, 768), torch.ones(768), torch.zeros(768)
    y, mean, rstd = torch.full_like(x, torch.nan), torch.empty(4000), torch.empty(4000)
    cpp.layernorm(LayerNorm(x, None, w, b, 1e-5, y, None, mean, rstd))
    deviation = x - x.mean(dim=1, keepdim=True) if PARENT else x - mean[:, None]
    return bool((y - deviation * rstd[:, None]).abs().max() < 1e-4)
PARENT = True
assert run()
child = os.fork()
if not child:
    signal.alarm(20)
    PARENT = False
    torch.set_num_threads(1)  # torch's own operations hang in a fork with more
    good = True
    for threads in (1, 2, 5):
        torch.get_num_threads = lambda: threads
        good &= run()
    os._exit(0 if good else 3)
_, status = os.waitpid(child, 0)
assert status == 0, status
assert run()
print("fine")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_process_has_threads_of_its_own():
    """torch's OpenMP team stays with the parent: a child that waits for it hangs."""
    done = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "fine", done.stderr
