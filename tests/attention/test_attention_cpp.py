"""csrc/attention on every instruction set of this CPU, against float64. test_attention.py tests the op itself."""

import pytest
import torch

from lift_fast import _C
from lift_fast.ops.attention import cpp
from lift_fast.ops.attention.contract import AttentionGrad
from lift_fast.ops.attention.op import reference

ISAS = _C.pairs_isa_levels()
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
TOLERANCE = {F32: 3e-6, F16: 1e-3, BF16: 6e-3}
# batch, tokens, heads, head_dim: every remainder of 6 rows, 16 columns, 2 bf16, and of a tile of queries
CASES = [
    (1, 1, 1, 64),
    (3, 2, 3, 64),
    (2, 49, 5, 64),
    (1, 50, 3, 72),
    (1, 196, 1, 80),
    (2, 197, 3, 64),
    (1, 257, 2, 128),
    (2, 33, 1, 1),
    (1, 97, 3, 5),
    (1, 67, 2, 129),
    (1, 40, 1, 300),
    (1, 600, 1, 16),
]


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch):
    """Runs the backend on this instruction set, with more threads than there may be work for."""
    for name in ("attention_forward", "attention_backward"):
        call = getattr(_C, name)
        monkeypatch.setattr(
            cpp._C, name, lambda *a, call=call, **k: call(*a, **{**k, "isa": request.param, "threads": 5})
        )
    return request.param


@pytest.fixture(autouse=True)
def poisoned_scratch(monkeypatch):
    """Fills with NaN what the backend allocates, and the scratch memory that it takes from the pool."""
    scratch = [torch.frombuffer(_C.Scratch(bytes=1 << power), dtype=F32).fill_(torch.nan) for power in range(14, 24)]
    del scratch
    new_empty, empty_like = torch.Tensor.new_empty, torch.empty_like
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: new_empty(*a, **k).fill_(torch.nan))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: empty_like(*a, **k).fill_(torch.nan))


def inputs(batch, tokens, heads, dim, dtype=F32):
    return torch.randn(batch, tokens, 3, heads, dim).to(dtype), torch.randn(batch, tokens, heads, dim).to(dtype)


def by_hand(qkv, d_out, scale, causal):
    """(out, lse, d_qkv, the largest score) in float64."""
    x = qkv.double().requires_grad_()
    out = reference(x, scale=scale, causal=causal)
    (d_qkv,) = torch.autograd.grad(out, x, d_out.double())
    q, k, _ = qkv.double().permute(2, 0, 3, 1, 4)
    scores = scale * q @ k.mT
    largest = scores.abs().max().item()
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores[0, 0]).triu(1).bool(), -torch.inf)
    return out.detach(), scores.logsumexp(-1), d_qkv, largest


def assert_near(got, wanted, tolerance):
    assert got.isfinite().all()
    assert (got.double() - wanted).norm() <= tolerance * wanted.norm()


def check(qkv, d_out, scale, causal, tolerance):
    out, lse, d_qkv, largest = by_hand(qkv, d_out, scale, causal)
    # A score is as exact as the float32 that holds it, and a probability as its score.
    tolerance = tolerance + 2e-7 * largest
    got, got_lse = cpp.forward(qkv, scale, causal)
    assert got.dtype == qkv.dtype and got.is_contiguous() and got_lse.dtype == F32
    assert_near(got, out, tolerance)
    torch.testing.assert_close(got_lse.double(), lse, rtol=1e-6, atol=1e-6 + 2e-7 * largest)
    d_got, again = cpp.backward(AttentionGrad(d_out, qkv, None, got_lse, scale, causal, True))
    assert d_got.dtype == again.dtype == qkv.dtype and d_got.shape == qkv.shape
    assert_near(again, out, tolerance)
    assert_near(d_got, d_qkv, tolerance)
    for part in range(3):  # dq, dk and dv; with one token dq and dk are zero
        if qkv.shape[1] > 1 or part == 2:
            assert_near(d_got[:, :, part], d_qkv[:, :, part], tolerance)
    alone, none = cpp.backward(AttentionGrad(d_out, qkv, None, got_lse, scale, causal, False))
    assert none is None and torch.equal(alone, d_got)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_and_backward(isa, case, dtype, causal):
    check(*inputs(*case, dtype), case[3] ** -0.5, causal, TOLERANCE[dtype])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("scale", [1.0, 30.0, -3.0])
def test_scores_up_to_a_thousand_and_more(isa, dtype, scale, causal):
    qkv, d_out = inputs(1, 101, 3, 64, dtype)
    check(qkv, d_out, scale, causal, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_huge_means_and_values(isa, dtype):
    """All scores of a row are near 1e3, or near -1e3; values are a thousand times as large as usual."""
    qkv, d_out = inputs(2, 53, 3, 64, dtype)
    qkv[:, :, 0] += torch.tensor([12.0, -12.0])[:, None, None, None].to(dtype)
    qkv[:, :, 1] += 10
    qkv[:, :, 2] *= 1e3
    check(qkv, d_out, 0.125, False, TOLERANCE[dtype])


def test_probabilities_sum_to_one_however_large_the_scores(isa):
    """lse near 1e3 is rounded by 3e-5; the backward's probabilities must be more exact than that."""
    qkv, d_out = inputs(1, 90, 2, 64)
    qkv[:, :, :2] += 11
    qkv[:, :, 2] = 1
    out, lse = cpp.forward(qkv, 0.125, False)
    assert lse.min() > 800
    _, again = cpp.backward(AttentionGrad(d_out, qkv, None, lse, 0.125, False, True))
    assert (out - 1).abs().max() < 1e-6 and (again - 1).abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_tiny_gradients(isa, dtype):
    qkv, d_out = inputs(1, 60, 2, 64, dtype)
    check(qkv, d_out * 1e-12, 0.125, False, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_one_key_above_all_others(isa, dtype):
    """Probabilities are 1 and 0: gradients of queries and keys are zero, and not NaN."""
    qkv, d_out = inputs(1, 50, 1, 64, dtype)
    qkv[:, :, 0] = 10
    qkv[:, 7, 1] = 100
    out, lse = cpp.forward(qkv, 1.0, False)
    assert torch.equal(out, qkv[:, 7:8, 2].expand_as(out))
    d_qkv, again = cpp.backward(AttentionGrad(d_out, qkv, None, lse, 1.0, False, True))
    assert torch.equal(again, out)
    assert_near(d_qkv[:, 7, 2], d_out.double().sum(1), TOLERANCE[dtype])
    # d_out v^T, of size 64 or so, minus itself leaves its rounding, times keys of 100.
    assert d_qkv[:, :, :2].isfinite().all() and d_qkv[:, :, :2].norm() <= 100 * TOLERANCE[dtype] * d_qkv[:, 7, 2].norm()


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("part", [0, 1, 2])
def test_nan_stays_in_its_head(isa, dtype, part):
    qkv, d_out = inputs(2, 50, 3, 16, dtype)
    clean = cpp.forward(qkv, 0.25, False)
    clean_d = cpp.backward(AttentionGrad(d_out, qkv, None, clean[1], 0.25, False, False))[0]
    qkv[1, 11, part, 2, 3] = torch.nan
    out, lse = cpp.forward(qkv, 0.25, False)
    d_qkv = cpp.backward(AttentionGrad(d_out, qkv, None, lse, 0.25, False, False))[0]
    assert out[1, 11, 2].isnan().any() and d_qkv[1, :, :, 2].isnan().any()
    for got, wanted, heads in ((out, clean[0], 2), (d_qkv, clean_d, 3)):
        kept = torch.ones_like(wanted, dtype=torch.bool)
        kept.select(heads, 2)[1] = False
        assert torch.equal(got[kept], wanted[kept])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("batch", [1, 3])
def test_the_same_bits_whatever_the_threads(batch, dtype, causal):
    qkv, d_out = inputs(batch, 197, 3, 64, dtype)
    threads, seen = torch.get_num_threads(), []
    try:
        for n in (1, 2, 5, 64):
            torch.set_num_threads(n)
            out, lse = cpp.forward(qkv, 0.125, causal)
            d_qkv, again = cpp.backward(AttentionGrad(d_out, qkv, None, lse, 0.125, causal, True))
            seen.append((out, lse, d_qkv, again))
    finally:
        torch.set_num_threads(threads)
    for some in seen[1:]:
        for got, wanted in zip(some, seen[0], strict=True):
            assert torch.equal(got, wanted)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_nothing_else_is_written(isa, dtype):
    """Outputs lie inside larger buffers."""
    batch, tokens, heads, dim = 2, 19, 3, 21
    qkv, d_out = inputs(batch, tokens, heads, dim, dtype)
    sizes = {"out": d_out.numel(), "lse": batch * heads * tokens, "d_qkv": qkv.numel()}
    whole = {name: torch.full((n + 128,), 7.0, dtype=F32 if name == "lse" else dtype) for name, n in sizes.items()}
    inner = {name: buffer[64:-64] for name, buffer in whole.items()}
    attention = cpp._attention(qkv, 0.2, False)
    _C.attention_forward(attention, out=inner["out"].data_ptr(), lse=inner["lse"].data_ptr(), threads=1, isa=isa)
    wanted, lse = cpp.forward(qkv, 0.2, False)
    assert torch.equal(inner["out"].view_as(wanted), wanted) and torch.equal(inner["lse"].view_as(lse), lse)
    inner["out"].fill_(torch.nan)
    _C.attention_backward(
        attention,
        d_out=d_out.data_ptr(),
        lse=lse.data_ptr(),
        d_qkv=inner["d_qkv"].data_ptr(),
        out=inner["out"].data_ptr(),
        threads=1,
        isa=isa,
    )
    for got, wanted in zip(
        (inner["d_qkv"], inner["out"]),
        cpp.backward(AttentionGrad(d_out, qkv, None, lse, 0.2, False, True)),
        strict=True,
    ):
        assert torch.equal(got.view_as(wanted), wanted)
    for buffer in whole.values():
        assert (buffer[:64] == 7).all() and (buffer[-64:] == 7).all()


@pytest.mark.parametrize("shape", [(0, 5, 3, 2, 8), (2, 0, 3, 2, 8), (2, 5, 3, 0, 8)])
def test_nothing_to_do(shape):
    qkv = torch.empty(shape)
    out, lse = cpp.forward(qkv, 1.0, False)
    d_qkv, again = cpp.backward(AttentionGrad(out, qkv, None, lse, 1.0, False, True))
    assert d_qkv.shape == qkv.shape and again.shape == out.shape


def test_what_it_refuses():
    assert cpp.why_not() is None
    for dtype in (F32, BF16, F16):
        assert cpp.refuses(1, 1, dtype) is None and cpp.refuses(5000, 256, dtype) is None
    assert "float64" in cpp.refuses(197, 64, torch.float64)


def test_an_unknown_instruction_set_is_an_error():
    qkv, d_out = inputs(1, 2, 1, 4)
    attention = cpp._attention(qkv, 1.0, False)
    with pytest.raises(ValueError, match="no 'mmx'"):
        _C.attention_forward(attention, out=0, lse=0, threads=1, isa="mmx")
