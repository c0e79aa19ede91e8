"""Attention on every available backend, against its definition in float64."""

import pytest
import torch
from support.block_cases import DEVICES, DTYPES, TOKENS, gradients, near
from support.tensors import leaves
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from lift_fast.errors import BackendError
from lift_fast.ops.attention import eager
from lift_fast.ops.attention.contract import AttentionGrad, backends_here, keeps_out, load
from lift_fast.ops.attention.op import attention, reference


def backends(device, tokens, head_dim, dtype):
    """The available backends that take these sizes and this dtype."""
    names = backends_here(device)
    return [name for name in names if load(name).refuses(tokens, head_dim, dtype) is None]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("sizes", [(1, 1, 64), (2, 3, 16), (1, 5, 7)], ids=str)
def test_values_and_gradients_are_the_definition_s(sizes, tokens, causal, dtype, device):
    batch, heads, head_dim = sizes
    qkv = torch.randn(batch, tokens, 3, heads, head_dim).to(device, dtype)
    (wide,) = leaves(qkv, dtype=torch.float64)
    want = reference(wide, causal=causal)
    seed = torch.randn_like(want)
    (wanted,) = gradients([want], [seed], [wide])
    tried = backends(device, tokens, head_dim, dtype)
    assert tried
    for backend in tried:
        (mine,) = leaves(qkv)
        got = attention(mine, causal=causal, backend=backend)
        assert got.dtype == dtype and got.is_contiguous()
        near(got, want, dtype)
        near(gradients([got], [seed], [mine])[0], wanted, dtype)


@pytest.mark.parametrize("head_dim", [64, 72, 80, 96, 128])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_head_dims_of_vits(head_dim, dtype):
    qkv = torch.randn(1, 50, 3, 2, head_dim).to(dtype)
    for backend in backends("cpu", 50, head_dim, dtype):
        near(attention(qkv, backend=backend), reference(qkv.double()), dtype)


def test_scores_that_would_overflow():
    qkv = 10 * torch.randn(2, 49, 3, 2, 16)
    for backend in backends("cpu", 49, 16, torch.float32):
        (mine,) = leaves(qkv)
        (wide,) = leaves(qkv, dtype=torch.float64)
        got, want = attention(mine, backend=backend), reference(wide)
        assert got.isfinite().all()
        near(got, want, floor=1e-4)
        seed = torch.randn_like(want)
        near(gradients([got], [seed], [mine])[0], gradients([want], [seed], [wide])[0], floor=1e-3)


def test_a_scale_of_its_own_and_strided_inputs():
    qkv = torch.randn(3, 3, 9, 2, 8).transpose(1, 2)
    for backend in backends("cpu", 9, 8, torch.float32):
        near(attention(qkv, scale=0.7, backend=backend), reference(qkv.double(), scale=0.7))


def test_the_output_is_computed_again():
    """`out`, which the projection's weight gradient needs and the block does not keep."""
    for dtype in DTYPES:
        qkv, d_out = torch.randn(2, 50, 3, 3, 16).to(dtype), torch.randn(2, 50, 3, 16).to(dtype)
        for name in backends("cpu", 50, 16, dtype):
            if not keeps_out(name):
                out, lse = torch.ops.lift_fast.attention(qkv, 0.25, False, name)
                _, again = torch.ops.lift_fast.attention_backward(d_out, qkv, None, lse, 0.25, False, True, name)
                near(again, reference(qkv.double(), scale=0.25), dtype)


def test_fake_tensors_flops_and_refusals():
    flops = 4 * 2 * 3 * 17**2 * 8
    for mode in (FakeTensorMode, torch.no_grad):
        with mode(), FlopCounterMode(display=False) as counter, torch.enable_grad():
            qkv = torch.zeros(2, 17, 3, 3, 8, requires_grad=True)
            out = attention(qkv)
            assert out.shape == (2, 17, 3, 8)
            out.sum().backward()
        assert counter.get_total_flops() == flops + 5 * flops // 2
    with pytest.raises(ValueError, match=r"\[batch, tokens, 3, heads, head_dim\]"):
        attention(torch.zeros(2, 17, 3, 24))
    with pytest.raises(BackendError, match="no attention backend 'flash_attn_3' for float32 on cpu"):
        attention(torch.zeros(1, 2, 3, 1, 8), backend="flash_attn_3")


def test_plain_torch_takes_a_few_pictures_at_a_time(monkeypatch):
    qkv, d_out = torch.randn(5, 9, 3, 2, 8), torch.randn(5, 9, 2, 8)
    whole = eager.forward(qkv, 0.3, False)
    gradients_of_all = eager.backward(AttentionGrad(d_out, qkv, None, whole[1], 0.3, False, True))
    monkeypatch.setattr(eager, "SCORES", 2 * 4 * 2 * 9 * 9)  # two images
    few = eager.forward(qkv, 0.3, False)
    for got, want in zip(few, whole, strict=True):
        torch.testing.assert_close(got, want)
    again = eager.backward(AttentionGrad(d_out, qkv, None, few[1], 0.3, False, True))
    for got, want in zip(again, gradients_of_all, strict=True):
        torch.testing.assert_close(got, want)
    assert [(s.start, s.stop) for s in eager._few(qkv)] == [(0, 2), (2, 4), (4, 6)]
