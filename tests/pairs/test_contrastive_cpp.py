"""csrc/pairs/pairs.cpp on every instruction set of this CPU, against dense float64; the ops' tests cover the rest."""

import math

import pytest
import torch
from torch.nn import functional as F

from lift_fast import _C
from lift_fast.ops.pairs import cpp as cpp_pairs
from lift_fast.ops.pairs.contract import FeatureGradients, ScoreTile, SigmoidSums, SoftmaxGradient
from lift_fast.ops.pairs.contrastive import contrastive

ISAS = _C.pairs_isa_levels()
F32, BF16, F16, I8 = torch.float32, torch.bfloat16, torch.float16, torch.int8
#        rows, cols, dim, image, text, scale, bias, offset, row scales: every tail of 6 rows, 64 columns and 2 words
CASES = [
    (1, 1, 1, F32, F32, 1.0, 0.0, 0, False),
    (5, 3, 7, F32, F32, 10.0, -1.0, 0, True),
    (200, 700, 100, F32, F32, 100.0, 0.0, 0, False),
    (300, 601, 65, BF16, BF16, 14.3, 0.5, 10, True),
    (300, 601, 65, F32, I8, 14.3, 0.0, -20, True),
    (403, 1301, 515, BF16, I8, 100.0, 0.0, 700, False),
    (129, 127, 33, F16, F16, 14.3, 0.0, 0, False),
    (193, 127, 33, BF16, BF16, 100.0, -3.0, 0, True),
    (7, 1100, 64, F32, F32, 14.3, -10.0, 1090, True),
    (13, 64, 300, F32, F16, 14.3, 0.0, 64, True),
]


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch):
    """Runs all calls of the backend on this instruction set, with more threads than some cases have work for."""
    for name in ("pairs_stats", "pairs_softmax_gradient", "pairs_sigmoid"):
        call = getattr(_C, name)
        monkeypatch.setattr(
            cpp_pairs._C, name, lambda *a, call=call, **k: call(*a, **{**k, "isa": request.param, "threads": 5})
        )
    return request.param


def scores_of(rows, cols, dim, image, text, scale, bias, offset, scaled):
    """A ScoreTile with gaps between its rows, and its dense float64 c, z and positives."""

    def features(n, dtype):
        if dtype == I8:
            return torch.randint(-127, 128, (n, dim + 3), dtype=I8)[:, :dim]
        return F.pad(F.normalize(torch.randn(n, dim), dim=1), (0, 3)).to(dtype)[:, :dim]

    x, t = features(rows, image), features(cols, text)
    a = torch.rand(rows) + 0.5 if scaled else None
    q = (torch.rand(cols) + 0.5) / (127 * dim**0.5 if text == I8 else 1) if scaled or text == I8 else None
    scores = ScoreTile(x, t, a, q, torch.tensor(scale), torch.tensor(bias), offset)
    c = x.double() @ t.double().T
    c = c * (1 if a is None else a.double()[:, None]) * (1 if q is None else q.double())
    positive = torch.zeros(rows, cols, dtype=torch.float64)
    for i in range(rows):
        if 0 <= i + offset < cols:
            positive[i, i + offset] = 1
    return scores, c, scale * c + bias, positive


def guarded(rows, cols, dtype=F32):
    """A poisoned [rows, cols] and a check that nothing around it was written."""
    whole = torch.full((rows + 2, cols + 5), 7.0, dtype=dtype)
    inner = whole[1:-1, :cols]
    inner.fill_(torch.nan)
    return inner, lambda: bool((whole[0] == 7).all() and (whole[-1] == 7).all() and (whole[:, cols:] == 7).all())


def started(n):
    state = torch.zeros(3, n)
    state[0] = -torch.inf
    return state


def state_of(z, dim):
    """(m, l) [2, n] in float64."""
    m = z.amax(dim)
    return torch.stack([m, (z - m.unsqueeze(dim)).exp().sum(dim)])


def features_gradients(scores, g):
    x, t = scores.x.double(), scores.t.double()
    a = torch.ones(len(x), 1).double() if scores.a is None else scores.a.double()[:, None]
    q = torch.ones(len(t), 1).double() if scores.q is None else scores.q.double()[:, None]
    scale = scores.scale.double()
    return scale * a * ((g * q.T) @ t), scale * q * ((g * a).T @ x)


def assert_near(got, wanted, tolerance):
    assert (got.double() - wanted).norm() <= tolerance * wanted.norm() + 1e-9


@pytest.mark.parametrize("case", CASES, ids=str)
def test_stats(isa, case):
    scores, c, z, positive = scores_of(*case)
    rows, cols = c.shape
    row, col, mine = started(rows), started(cols + 3)[:, :cols], torch.full((rows,), 5.0)
    keep, untouched = guarded(rows, cols)
    cpp_pairs.stats(scores, row, col, mine, keep)
    others = z.masked_fill(positive.bool(), -torch.inf)
    for state, dim in ((row.double(), 1), (col.double(), 0)):
        lse = others.logsumexp(dim)
        some = lse.isfinite()
        assert (state[0, ~some] == -torch.inf).all() and (state[1:, ~some] == 0).all()
        assert_near((state[0] + state[1].log())[some], lse[some], 1e-6)
        expected = (others - lse.unsqueeze(dim)).exp().mul(c).sum(dim)
        torch.testing.assert_close((state[2] / state[1])[some], expected[some], rtol=1e-4, atol=1e-5)
    assert untouched()
    assert_near(keep, scores.x.double() @ scores.t.double().T, 1e-6)
    has = positive.any(dim=1)
    torch.testing.assert_close(mine[has].double(), (c * positive).sum(dim=1)[has], rtol=1e-5, atol=1e-6)
    assert (mine[~has] == 5).all()
    # Merged once more: every sum doubles, every mean stays.
    before = row.clone(), col.clone()
    cpp_pairs.stats(scores, row, col, mine, None)
    for state, old in zip((row, col), before, strict=True):
        torch.testing.assert_close(state[0] + state[1].log(), old[0] + (2 * old[1]).log(), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.0, 0.0), (0.0, 2.0)])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_grads(isa, case, weights):
    scores, c, z, positive = scores_of(*case)
    rows, cols = c.shape
    positive_g = torch.randn(rows)
    row, col = state_of(z, 1), state_of(z, 0)
    g = weights[0] * (z - row[0][:, None]).exp() / row[1][:, None] + weights[1] * (z - col[0]).exp() / col[1]
    g = torch.where(positive.bool(), positive_g.double()[:, None], g)
    d_image, d_text = features_gradients(scores, 0.7 * g)
    states = [row.float(), col.float()]
    for weight, state in zip(weights, states, strict=True):
        if not weight:
            state.fill_(torch.nan)  # not to be read
    kept, _ = guarded(rows, cols)
    kept.copy_(scores.x.double() @ scores.t.double().T)
    narrow = scores.x.dtype != F32
    tolerance = 5e-3 if narrow else 5e-5
    for stored in (kept, None):
        for dtype in {F32, scores.x.dtype}:
            out = torch.full((rows, scores.x.shape[1]), torch.nan, dtype=dtype)
            cpp_pairs.grads(
                scores, SoftmaxGradient(*states, *weights, positive_g), 0.7, stored, FeatureGradients(out, None)
            )
            assert_near(out, d_image, tolerance)
        if scores.t.dtype != I8:
            text = torch.ones(cols, scores.x.shape[1])
            cpp_pairs.grads(
                scores, SoftmaxGradient(*states, *weights, positive_g), 0.7, stored, FeatureGradients(None, text)
            )
            assert_near(text - 1, d_text, tolerance + 1e-6)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_sigmoid(isa, case, monkeypatch):
    scores, c, z, positive = scores_of(*case)
    rows, cols = c.shape
    y = 2 * positive - 1
    g = -y * torch.sigmoid(-y * z)
    d_image, d_text = features_gradients(scores, 0.7 * g)
    tolerance = 5e-3 if scores.x.dtype != F32 else 5e-5
    trained = scores.t.dtype != I8
    for kept_rows in (rows, 7):  # scores are kept for the texts' gradient as a whole, or chunk by chunk
        monkeypatch.setattr(cpp_pairs, "KEEP_BYTES", 0)
        monkeypatch.setattr(cpp_pairs, "KEEP_ROWS", kept_rows)
        loss, d_scale, d_bias = torch.ones(3, rows)
        out = torch.full((rows, scores.x.shape[1]), torch.nan)
        text = torch.ones(cols, scores.x.shape[1])
        cpp_pairs.sigmoid(
            scores, 0.7, SigmoidSums(loss, d_scale, d_bias), FeatureGradients(out, text if trained else None)
        )
        assert_near(loss - 1, F.softplus(-y * z).sum(1), 1e-6)
        assert_near(d_scale - 1, 0.7 * (g * c).sum(1), 1e-5)
        assert_near(d_bias - 1, 0.7 * g.sum(1), 1e-5)
        assert_near(out, d_image, tolerance)
        if trained:
            assert_near(text - 1, d_text, tolerance + 1e-6)
    loss = torch.zeros(rows)
    cpp_pairs.sigmoid(scores, 0.7, SigmoidSums(loss, d_scale, d_bias), FeatureGradients(None, None))
    assert_near(loss, F.softplus(-y * z).sum(1), 1e-6)


@pytest.mark.parametrize("scale", [3.0, 300.0])
def test_rows_and_columns_of_very_different_size(isa, scale):
    """Tiles whose maxima are too far apart for a common reference, so that an element takes two exponentials."""
    rows, cols, dim = 100, 600, 16
    x, t = torch.randn(rows, dim), torch.randn(cols, dim)
    x[::7] *= 0.01
    t[::5] *= 30
    x[3] = 0
    t[4] = 0
    scores = ScoreTile(x, t, None, None, torch.tensor(scale), torch.tensor(0.0), 0)
    z = scale * (x.double() @ t.double().T)
    row, col = started(rows), started(cols)
    cpp_pairs.stats(scores, row, col, torch.empty(rows), None)
    positive = torch.eye(rows, cols, dtype=torch.bool)
    others = z.masked_fill(positive, -torch.inf)
    row_lse, col_lse = (state[0] + state[1].log() for state in (row, col))
    for got, wanted in ((row_lse, others.logsumexp(1)), (col_lse, others.logsumexp(0))):
        assert ((got - wanted).abs() <= 1e-6 * z.abs().max()).all()
    out, positive_g = torch.empty(rows, dim), torch.randn(rows)
    states = state_of(z, 1), state_of(z, 0)
    cpp_pairs.grads(
        scores,
        SoftmaxGradient(*(state.float() for state in states), 1.0, 1.0, positive_g),
        1.0,
        None,
        FeatureGradients(out, None),
    )
    assert out.isfinite().all()
    g = (z - states[0][0][:, None]).exp() / states[0][1][:, None] + (z - states[1][0]).exp() / states[1][1]
    g = torch.where(positive, positive_g.double()[:, None], g)
    # Probabilities of logits this large are no better than the float32 that holds the logits.
    assert_near(out, scale * (g @ t.double()), 2e-7 * z.abs().max().item() + 1e-5)


@pytest.mark.parametrize("side", ["image", "text"])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_nan_goes_through(isa, dtype, side):
    scores, c, *_ = scores_of(50, 70, 9, dtype, dtype, 10.0, 0.0, 0, False)
    (scores.x if side == "image" else scores.t)[11, 3] = torch.nan
    row, col = started(50), started(70)
    cpp_pairs.stats(scores, row, col, torch.empty(50), None)
    # Row 11 (or column 11) is NaN, and so is every column (or row) except perhaps that of its positive.
    one, others = (row[1], col[1]) if side == "image" else (col[1], row[1])
    assert one[11].isnan() and others.isnan().sum() >= len(others) - 1
    loss = torch.zeros(3, 50)
    cpp_pairs.sigmoid(scores, 1.0, SigmoidSums(*loss), FeatureGradients(None, None))
    assert loss[0].isnan().any()


def test_the_number_of_threads_does_not_change_an_images_gradient():
    scores, c, z, positive = scores_of(500, 500, 40, F32, F32, 14.3, 0.0, 0, False)
    states = state_of(z, 1).float(), state_of(z, 0).float()
    outs = []
    threads = torch.get_num_threads()
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            out = torch.empty(500, 40)
            cpp_pairs.grads(
                scores, SoftmaxGradient(*states, 1.0, 1.0, torch.zeros(500)), 1.0, None, FeatureGradients(out, None)
            )
            outs.append(out)
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(*outs, rtol=1e-5, atol=1e-7)


def test_the_same_bits_every_time():
    """Whichever thread is faster: a resumed run must equal an uninterrupted one."""
    torch.manual_seed(0)
    text, values = F.normalize(torch.randn(1200, 16), dim=1), torch.randn(1200, 16)
    scale, threads, seen = torch.tensor(14.3, requires_grad=True), torch.get_num_threads(), set()
    torch.set_num_threads(5)  # usually more than there are cores, so that they finish in any order
    try:
        for turn in range(60):
            image = values.clone().requires_grad_()
            loss = contrastive(image, text, scale, normalize=True)
            d_image, d_scale = torch.autograd.grad(loss, (image, scale))
            seen.add((loss.item(), d_scale.item(), d_image.numpy().tobytes()))
            assert len(seen) == 1, turn
    finally:
        torch.set_num_threads(threads)


def test_scratch_is_used_again_and_released():
    first = torch.frombuffer(_C.Scratch(bytes=1 << 20), dtype=torch.float32)
    assert first.numel() * 4 >= 1 << 20 and first.data_ptr() % 64 == 0
    first.fill_(math.pi)
    address = first.data_ptr()
    del first
    again = torch.frombuffer(_C.Scratch(bytes=1 << 20), dtype=torch.float32)
    assert again.data_ptr() == address
    del again
    _C.release_scratch()


def test_an_unknown_instruction_set_is_an_error():
    scores, *_ = scores_of(*CASES[0])
    with pytest.raises(ValueError, match="no 'mmx'"):
        _C.pairs_stats(
            cpp_pairs._pairs(scores),
            row=0,
            row_stride=0,
            col=0,
            col_stride=0,
            own=0,
            keep=0,
            keep_stride=0,
            threads=1,
            isa="mmx",
        )
