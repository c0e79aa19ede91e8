"""The "cuda" backend of the pair losses against the dense definition in float64.

Every test of values runs twice: on a GPU, and with the kernels compiled for the CPU by tests/cuda_on_cpu.h, which
runs them thread by thread as they are written.
"""

import contextlib
import re
import subprocess
from pathlib import Path

import pytest
import torch
from support.cuda_emulator import emulate
from support.pair_cases import check_positives

from lift_fast import _C
from lift_fast.ops import tuned
from lift_fast.ops.pairs import cuda as cuda_pairs
from lift_fast.ops.pairs.contract import FeatureGradients, ScoreTile, SigmoidSums, SoftmaxGradient, exact_float32

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
STEP = {torch.float32: 2e-5, torch.bfloat16: 4e-3, torch.float16: 1e-3}  # of a gradient, in relative norm
SHAPES = [(1, 1, 1), (3, 5, 7), (9, 128, 16), (17, 130, 33), (131, 515, 12), (20, 1100, 20), (290, 61, 9)]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    # So that thread blocks get several rows each although there are too few to fill a GPU.
    return emulate(
        tmp_path_factory.mktemp("emulated"),
        ["contrastive", "positives", "sigmoid", "score_tiles", "dequant"],
        ["pairs"],
        more='module.def("gemm", [] { return reinterpret_cast<std::uintptr_t>(&emulated::gemm_ex); });',
        edit=lambda text: text.replace("kMinBlocks = 512", "kMinBlocks = 3"),
    )


@pytest.fixture(params=[None, [24, 72]], ids=["whole", "in blocks"])
def on(request, monkeypatch):
    """on(device): makes the backend work on a device, poisons its scratch memory and returns the device.

    Twice: with the table's blocks, larger than any matrix of these tests, and with small blocks and bands of 24 rows.
    """

    def prepare(device: str) -> str:
        if device == "cpu":
            monkeypatch.setattr(cuda_pairs, "_C", request.getfixturevalue("emulated"))
            monkeypatch.setattr(cuda_pairs, "launch_on", lambda tensor: {"device": 0, "stream": 0})
            monkeypatch.setattr(cuda_pairs, "_gemm", lambda x: (cuda_pairs._C.gemm(), 0))
        elif cuda_pairs.why_not():
            pytest.skip(cuda_pairs.why_not())
        for name in ("_floats", "_matrix"):
            get = getattr(cuda_pairs, name)
            monkeypatch.setattr(cuda_pairs, name, lambda *args, get=get: get(*args).fill_(float("nan")))
        return device

    with contextlib.ExitStack() as settings:
        if request.param:
            settings.enter_context(tuned.using("pairs", "block", request.param))
            settings.enter_context(tuned.using("pairs", "band", {"bytes": 0}))
        yield prepare


def make(shape, dtype, device, offset=0, scaled="aq", codes=False, scale=14.3, bias=-3.0, seed=0):
    """A ScoreTile of normalized features, with gaps between the rows of x and t."""
    rows, cols, dim = shape
    generator = torch.Generator().manual_seed(seed + 7 * rows + cols)
    image = torch.randn(rows, dim + 8, generator=generator)[:, :dim]
    text = torch.randn(cols, dim + 8, generator=generator)[:, :dim]
    for i in range(rows):  # positives are similar
        if 0 <= i + offset < cols:
            text[i + offset] += image[i]
    a, q = 1 / image.norm(dim=1), 1 / text.norm(dim=1)
    if codes:
        peak = text.abs().amax(dim=1) / 127
        text, q = (text / peak[:, None]).round().to(torch.int8), q * peak
    else:
        text = text if "q" in scaled else text * q[:, None]
        text = padded(text.to(dtype))
    image = padded((image if "a" in scaled else image * a[:, None]).to(dtype))
    return ScoreTile(
        image.to(device),
        padded(text).to(device) if codes else text.to(device),
        a.to(device) if "a" in scaled else None,
        q.to(device) if "q" in scaled or codes else None,
        torch.tensor(scale, device=device),
        torch.tensor(bias, device=device),
        offset,
    )


def padded(matrix):
    wide = torch.zeros(matrix.shape[0], matrix.shape[1] + 3, dtype=matrix.dtype)
    wide[:, : matrix.shape[1]] = matrix
    return wide[:, : matrix.shape[1]]


def dense(scores):
    """c, z and the mask of positives, in float64 on the CPU."""
    c = scores.x.cpu().double() @ scores.t.cpu().double().T
    if scores.a is not None:
        c = c * scores.a.cpu().double()[:, None]
    if scores.q is not None:
        c = c * scores.q.cpu().double()
    positive = torch.arange(c.shape[0])[:, None] + scores.offset == torch.arange(c.shape[1])
    return c, c * scores.scale.cpu().double() + scores.bias.cpu().double(), positive


def features(scores, g, alpha):
    """The features' gradients of g, in float64 on the CPU."""
    a = torch.ones(len(scores.x)).double() if scores.a is None else scores.a.cpu().double()
    q = torch.ones(len(scores.t)).double() if scores.q is None else scores.q.cpu().double()
    k = alpha * scores.scale.cpu().double() * a[:, None] * g * q
    return k @ scores.t.cpu().double(), k.T @ scores.x.cpu().double()


def close(found, expected, tolerance):
    found, expected = found.cpu().double(), expected.double()
    error, size = (found - expected).norm(), expected.norm()
    assert error <= tolerance * size + 1e-30, (float(error), float(size))


def level(expected):
    """A tenth of the largest magnitude, as a float32 has it."""
    return float((0.1 * expected.abs().max()).float())


def guarded(rows, cols, dtype, device, gap=0):
    """A poisoned [rows, cols] with rows cols + gap apart in a larger buffer, and a check that the rest is untouched."""
    buffer = torch.full((rows + 2, cols + gap), float("nan"), dtype=dtype, device=device)
    outside = torch.ones(buffer.shape, dtype=torch.bool)
    outside[1:-1, :cols] = False

    def untouched():
        assert buffer.cpu()[outside].isnan().all()

    return buffer[1:-1, :cols], untouched


def states(rows, cols, device):
    """Initial row and column statistics, as views with gaps between their three rows, and unwritten positives."""
    row, col = (torch.full((3, n + 5), 7.0, device=device)[:, 2 : n + 2] for n in (rows, cols))
    for state in (row, col):
        state[0], state[1:] = -torch.inf, 0
    return row, col, torch.full((rows,), 5.0, device=device)


def pieces(scores):
    """The tile in four pieces (fewer if it has one row or column), with their slices."""
    rows, cols = len(scores.x), len(scores.t)
    for i in (slice(0, rows // 3), slice(rows // 3, rows)):
        for j in (slice(0, cols // 2), slice(cols // 2, cols)):
            if i.stop > i.start and j.stop > j.start:
                a = None if scores.a is None else scores.a[i]
                q = None if scores.q is None else scores.q[j]
                offset = scores.offset + i.start - j.start
                yield i, j, ScoreTile(scores.x[i], scores.t[j], a, q, scores.scale, scores.bias, offset)


def softmax(z, device, part=0.9):
    """(m, l) of the rows and columns of which z is a part, as views with a gap between their two rows."""
    for dim in (1, 0):
        m = z.amax(dim)
        state = torch.full((2, len(m) + 5), torch.nan, dtype=torch.float64)
        state[0, 2:-3], state[1, 2:-3] = m + 0.1, (z - m.unsqueeze(dim) - 0.1).exp().sum(dim) / part
        yield state.float().to(device)[:, 2:-3]


def gradient(z, positive, row, col, row_weight, col_weight, positive_g):
    """g, in float64 on the CPU."""
    (m_row, l_row), (m_col, l_col) = row.cpu().double(), col.cpu().double()
    g = torch.zeros_like(z)
    if row_weight:
        g += row_weight * (z - m_row[:, None]).exp() / l_row[:, None]
    if col_weight:
        g += col_weight * (z - m_col).exp() / l_col
    return torch.where(positive, positive_g.cpu().double()[:, None], g)


def check_states(row, col, positive, scores):
    c, z, mask = dense(scores)
    others = z.masked_fill(mask, -torch.inf)
    for state, dim in ((row, 1), (col, 0)):
        lonely = others.amax(dim) == -torch.inf  # no negatives
        assert (state[0, lonely] == -torch.inf).all() and (state[1:, lonely] == 0).all()
        m, total, w = state.cpu().double()[:, ~lonely]
        lse = others.logsumexp(dim)
        weighted = ((others - lse.unsqueeze(dim)).exp() * c).sum(dim)[~lonely]
        lse = lse[~lonely]
        close(m, others.amax(dim)[~lonely], 1e-6)
        assert ((m + total.log() - lse).abs() <= 1e-5 + 5e-7 * lse.abs()).all()
        # Weights of a softmax, each to the rounding of a float32 z.
        assert ((w / total - weighted).abs() <= 2e-5).all()
    here = mask.any(dim=1)
    close(positive.cpu()[here], c[mask], 1e-5)
    assert (positive.cpu()[~here] == 5.0).all()


# Which side has scales, and whether the text is int8; cases alternate between WANTED[0::2] and WANTED[1::2].
CASES = [("", False), ("a", False), ("q", False), ("aq", False), ("", True), ("a", True), ("aq", False)]
WANTED = [(True, True), (False, True), (True, False), (False, False)]  # the images' gradient, the texts'


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES)
def test_statistics_whole_and_in_pieces(device, shape, on):
    device = on(device)
    rows, cols, _ = shape
    for number, offset in enumerate([0, 3, -2, cols, -rows, 2**40]):
        scaled, codes = CASES[(number + rows) % len(CASES)]
        scores = make(shape, DTYPES[number % 3], device, offset if offset != 2**40 else 0, scaled, codes)
        scores = ScoreTile(scores.x, scores.t, scores.a, scores.q, scores.scale, scores.bias, offset)
        row, col, positive = states(rows, cols, device)
        cuda_pairs.stats(scores, row, col, positive, None)
        check_states(row, col, positive, scores)
        for state in (row, col):
            edges = state._base.cpu()
            assert (edges[:, :2] == 7).all() and (edges[:, -3:] == 7).all()
        if number == 0:  # the same bits at every run
            again = states(rows, cols, device)
            cuda_pairs.stats(scores, *again, None)
            assert all(torch.equal(x, y) for x, y in zip((row, col, positive), again, strict=True))
        row, col, positive = states(rows, cols, device)
        for i, j, piece in pieces(scores):
            cuda_pairs.stats(piece, row[:, i], col[:, j], positive[i], None)
        check_states(row, col, positive, scores)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_kept_and_recomputed(device, shape, dtype, on):
    device = on(device)
    rows, cols, dim = shape
    for number, (scaled, codes) in enumerate(CASES):
        offset = [0, 2, -1][number % 3]
        scores = make(shape, dtype, device, offset, scaled, codes)
        _, z, positive = dense(scores)
        weights, alpha = (0.5 / rows, 0.3 / cols), 0.7
        row, col = softmax(z, device)
        positive_g = -torch.rand(rows, generator=torch.Generator().manual_seed(number)) / rows
        positive_g[~positive.any(dim=1)] = torch.nan  # not in this tile
        positive_g = positive_g.to(device)
        expected = features(scores, gradient(z, positive, row, col, *weights, positive_g), alpha)

        keep, keep_untouched = guarded(rows, cols, torch.float32, device, gap=number % 4)
        cuda_pairs.stats(scores, *states(rows, cols, device), keep)
        kept_before = keep.clone()
        close(keep, scores.x.cpu().double() @ scores.t.cpu().double().T, 1e-6)
        for kept, out_dtype in ((None, dtype), (keep, torch.float32)):
            for want_image, want_text in WANTED[number % 2 :: 2]:
                image, image_untouched = guarded(rows, dim, out_dtype, device)
                text, text_untouched = guarded(cols, dim, torch.float32, device)
                before = level(
                    expected[1]
                )  # the initial value, small enough that the sum keeps the digits of what is added
                text.fill_(before)
                wanted = image if want_image else None, text if want_text else None
                cuda_pairs.grads(
                    scores, SoftmaxGradient(row, col, *weights, positive_g), alpha, kept, FeatureGradients(*wanted)
                )
                if want_image:  # rounded once more unless it is float32
                    close(image, expected[0], STEP[dtype] * (1 if out_dtype == torch.float32 else 2))
                else:
                    assert image.isnan().all()
                if want_text:
                    close(text - before, expected[1], STEP[dtype] + 1e-6)
                else:
                    assert (text == before).all()
                image_untouched(), text_untouched()
        assert torch.equal(keep, kept_before)
        keep_untouched()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_side_of_weight_zero_is_not_read(device, dtype, on):
    device = on(device)
    rows, cols, dim = shape = 19, 131, 10
    scores = make(shape, dtype, device, 1)
    _, z, positive = dense(scores)
    positive_g = torch.full((rows,), -0.3, device=device)
    for weights in ((0.4, 0.0), (0.0, 0.4), (0.0, 0.0)):
        row, col = softmax(z, device)
        for state, weight in zip((row, col), weights, strict=True):
            for i, wrong in enumerate(((torch.nan, torch.nan), (torch.inf, 1), (-torch.inf, 0), (0, 0), (1e30, -1))):
                if not weight:
                    state[:, i::5] = torch.tensor(wrong, device=device)[:, None]
        image, text = torch.empty(rows, dim, device=device), torch.zeros(cols, dim, device=device)
        cuda_pairs.grads(
            scores, SoftmaxGradient(row, col, *weights, positive_g), 1.0, None, FeatureGradients(image, text)
        )
        expected = features(scores, gradient(z, positive, row, col, *weights, positive_g), 1.0)
        close(image, expected[0], STEP[dtype])
        close(text, expected[1], STEP[dtype])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 2, 9, 131])
def test_own_pairs_of_any_size_stay_apart(device, dtype, n, on):
    device = on(device)
    x = 200 * torch.eye(n, dtype=dtype, device=device)
    positive_g = -torch.rand(n, generator=torch.Generator().manual_seed(n)).to(device)
    for huge in (1e38, -1e38):  # the positives' z is infinite, the negatives' is the bias
        scores = ScoreTile(x, x, None, None, torch.tensor(huge, device=device), torch.tensor(-3.0, device=device), 0)
        row, col, positive = states(n, n, device)
        cuda_pairs.stats(scores, row, col, positive, None)
        for state in (row, col):
            assert (state[0] == (-3.0 if n > 1 else -torch.inf)).all()
            assert (state[1] == n - 1).all() and (state[2] == 0).all()
        assert (positive == 4e4).all()
        states_ = torch.tensor([[-3.0], [n]], device=device).repeat(1, n)
        image, text = torch.empty(n, n, device=device), torch.zeros(n, n, device=device)
        cuda_pairs.grads(
            scores,
            SoftmaxGradient(states_, states_, 0.5 / n, 0.5 / n, positive_g),
            1e-36,
            None,
            FeatureGradients(image, text),
        )
        g = torch.full((n, n), 1 / n**2).double()
        g.diagonal().copy_(positive_g)
        for found, expected in zip((image, text), features(scores, g, 1e-36), strict=True):
            close(found, expected, STEP[dtype])
    # The same with infinite or NaN products.
    a, middle = torch.full((n,), 1e30, device=device), torch.arange(n, device=device) == n // 2
    for broken in (middle & False, middle):
        image = x.masked_fill(broken[:, None], torch.nan)
        scores = ScoreTile(image, x, a, a, torch.tensor(2.0, device=device), torch.tensor(1.0, device=device), 0)
        row, col, positive = states(n, n, device)
        cuda_pairs.stats(scores, row, col, positive, None)
        assert positive[broken].isnan().all() and (positive[~broken] == torch.inf).all()
        for state, bad in ((row, broken), (col, broken.any() & ~middle)):
            bad = bad & (n > 1)
            assert state[1, bad].isnan().all() and (state[1, ~bad] == n - 1).all() and (state[2, ~bad] == 0).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("n", [1, 2, 255, 257, 1000])
def test_own_pairs(device, n, on):
    check_positives(cuda_pairs, n, on(device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_sigmoid_in_one_pass(device, shape, dtype, on):
    device = on(device)
    rows, cols, dim = shape
    for number, (scaled, codes) in enumerate(CASES):
        offset = [0, 2, -1, cols][number % 4]
        scores = make(shape, dtype, device, offset, scaled, codes, scale=10.0, bias=-5.0)
        c, z, positive = dense(scores)
        y = positive.double() * 2 - 1
        alpha, g = 0.3, -y * torch.sigmoid(-y * z)
        expected = features(scores, g, alpha)
        for want_image, want_text in WANTED[number % 2 :: 2]:
            sums = [torch.full((rows + 4,), 0.5, device=device) for _ in range(3)]
            image, image_untouched = guarded(rows, dim, dtype if want_text else torch.float32, device)
            text, text_untouched = guarded(cols, dim, torch.float32, device)
            before = level(expected[1])
            text.fill_(before)
            cuda_pairs.sigmoid(
                scores,
                alpha,
                SigmoidSums(*(x[2:-2] for x in sums)),
                FeatureGradients(image if want_image else None, text if want_text else None),
            )
            true = torch.nn.functional.softplus(-y * z), alpha * g * c, alpha * g
            for found, terms in zip(sums, true, strict=True):
                error = (found[2:-2].cpu().double() - 0.5 - terms.sum(1)).abs()
                assert (error <= 2e-6 * terms.abs().sum(1) + 2e-7).all()
                assert (found[:2] == 0.5).all() and (found[-2:] == 0.5).all()
            if want_image:
                close(image, expected[0], STEP[dtype])
            if want_text:
                close(text - before, expected[1], STEP[dtype] + 1e-6)
            image_untouched(), text_untouched()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [40, -30, 150, -90, 520])
def test_own_pairs_among_interior_tiles(device, dtype, offset, on):
    """Positives in the middle of a strip, before and after tiles without any, and next to a ragged edge; the second
    block of columns starts where rows are not aligned."""
    device = on(device)
    rows, cols, dim = shape = 137, 700, 6
    for width in (cols, 323):
        with tuned.using("pairs", "block", [rows, width]), tuned.using("pairs", "band", {"bytes": 1 << 30}):
            scores = make(shape, dtype, device, offset, "aq")
            _, z, positive = dense(scores)
            state_row, state_col, positive_c = states(rows, cols, device)
            keep, keep_untouched = guarded(rows, cols, torch.float32, device)
            cuda_pairs.stats(scores, state_row, state_col, positive_c, keep)
            keep_untouched()
            check_states(state_row, state_col, positive_c, scores)

            row, col = softmax(z, device)
            positive_g = torch.full((rows,), -0.01, device=device)
            expected = features(scores, gradient(z, positive, row, col, 0.01, 0.02, positive_g), 0.7)
            for kept in (None, keep):
                image, text = torch.empty(rows, dim, device=device), torch.zeros(cols, dim, device=device)
                cuda_pairs.grads(
                    scores, SoftmaxGradient(row, col, 0.01, 0.02, positive_g), 0.7, kept, FeatureGradients(image, text)
                )
                close(image, expected[0], STEP[dtype])
                close(text, expected[1], STEP[dtype])

            scores = make(shape, dtype, device, offset, "aq", scale=20.0, bias=-6.0)
            c, z, positive = dense(scores)
            y = positive.double() * 2 - 1
            g = -y * torch.sigmoid(-y * z)
            for wanted in (True, False):
                sums = [torch.zeros(rows, device=device) for _ in range(3)]
                image, text = torch.empty(rows, dim, device=device), torch.zeros(cols, dim, device=device)
                cuda_pairs.sigmoid(
                    scores, 1.0, SigmoidSums(*sums), FeatureGradients(*((image, text) if wanted else (None, None)))
                )
                for found, terms in zip(sums, (torch.nn.functional.softplus(-y * z), g * c, g), strict=True):
                    assert ((found.cpu() - terms.sum(1)).abs() <= 2e-6 * terms.abs().sum(1)).all()
                if wanted:
                    expected = features(scores, g, 1.0)
                    close(image, expected[0], STEP[dtype])
                    close(text, expected[1], STEP[dtype])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("u", [-80.0, -16.0, -1e-3, 0.0, 1e-3, 16.0, 80.0, 3e4])
def test_losses_of_every_size_in_a_product(device, u, on):
    """The logarithm is taken of a product of 32 factors 1 + exp(-|u|): all of one size, or one of another."""
    device = on(device)
    rows, cols = 8, 160
    for others in (u, -40.0, 0.0):
        x, t = torch.ones(rows, 1, device=device), torch.full((cols, 1), others, device=device)
        t[17] = u
        one, zero = torch.tensor(1.0, device=device), torch.tensor(0.0, device=device)
        sums = [torch.zeros(rows, device=device) for _ in range(3)]
        cuda_pairs.sigmoid(
            ScoreTile(x, t, None, None, one, zero, -rows), 1.0, SigmoidSums(*sums), FeatureGradients(None, None)
        )
        z = t[:, 0].cpu().double()
        true = torch.nn.functional.softplus(z), torch.sigmoid(z) * z, torch.sigmoid(z)
        for found, terms in zip(sums, true, strict=True):
            assert ((found.cpu().double() - terms.sum()).abs() <= 2e-6 * terms.abs().sum() + 1e-37).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(1100, 5, 4), (2, 4700, 4)])
def test_more_parts_than_threads_that_merge_them(device, shape, on):
    device = on(device)
    rows, cols, _ = shape
    scores = make(shape, torch.float32, device, scale=5.0, bias=-2.0)
    row, col, positive = states(rows, cols, device)
    cuda_pairs.stats(scores, row, col, positive, None)
    check_states(row, col, positive, scores)
    _, z, mask = dense(scores)
    sums = [torch.zeros(rows, device=device) for _ in range(3)]
    cuda_pairs.sigmoid(scores, 1.0, SigmoidSums(*sums), FeatureGradients(None, None))
    close(sums[0], torch.nn.functional.softplus(torch.where(mask, -z, z)).sum(1), 3e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_far_negatives_all_count(device, on):
    device = on(device)
    scores = make((2, 3000, 4), torch.float32, device, offset=-9, scale=1.0, bias=-17.0)
    _, z, _ = dense(scores)
    sums = [torch.zeros(2, device=device) for _ in range(3)]
    cuda_pairs.sigmoid(scores, 1.0, SigmoidSums(*sums), FeatureGradients(None, None))
    close(sums[0], torch.nn.functional.softplus(z).sum(1), 3e-6)
    close(sums[2], torch.sigmoid(z).sum(1), 3e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scale", [1.0, 100.0, -100.0])
def test_sharp_softmax(device, scale, on):
    device = on(device)
    scores = make((70, 300, 24), torch.float32, device, scale=scale, bias=0.0)
    row, col, positive = states(70, 300, device)
    cuda_pairs.stats(scores, row, col, positive, None)
    check_states(row, col, positive, scores)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("side", ["x", "t"])
def test_nan_shows(device, side, on):
    device = on(device)
    scores = make((20, 150, 6), torch.float32, device)
    getattr(scores, side)[13, 2] = float("nan")
    row, col, positive = states(20, 150, device)
    for _, j, piece in pieces(scores):  # NaN survives every merge
        i = slice(0, 6) if len(piece.x) == 6 else slice(6, 20)
        cuda_pairs.stats(piece, row[:, i], col[:, j], positive[i], None)
    wrong, right = (row, col) if side == "x" else (col, row)
    assert wrong[1, 13].isnan() and wrong[1].isnan().sum() == 1
    assert right[1].isnan().sum() == right.shape[1] - 1 and not right[1, 13].isnan()  # all but the positive's
    assert positive[13].isnan() and positive.isnan().sum() == 1
    image, text = torch.empty(20, 6, device=device), torch.zeros(150, 6, device=device)
    ones = torch.ones(2, 150, device=device)
    cuda_pairs.grads(
        scores, SoftmaxGradient(ones[:, :20], ones, 1.0, 1.0, 0 * positive), 1.0, None, FeatureGradients(image, text)
    )
    assert image[13].isnan().all() and text[13].isnan().all()
    sums = [torch.zeros(20, device=device) for _ in range(3)]
    cuda_pairs.sigmoid(scores, 1.0, SigmoidSums(*sums), FeatureGradients(None, None))
    assert all(x[13].isnan() for x in sums)
    row, col, positive = states(20, 150, device)
    nan = float("nan")
    row[1, 4], col[1, 5] = nan, nan
    clean = make((20, 150, 6), torch.float32, device)
    cuda_pairs.stats(clean, row, col, positive, None)
    assert row[1].isnan().sum() == 1 and col[1].isnan().sum() == 1


@pytest.mark.parametrize("device", DEVICES)
def test_products_that_overflow(device, on):
    device = on(device)
    x = torch.tensor([[1e30], [1.0], [-1e30]], device=device)
    t = torch.tensor([[-1e30], [0.5], [1.0], [-1e30], [2.0]], device=device)
    one, zero = torch.tensor(1e-30, device=device), torch.tensor(0.0, device=device)
    row, col, positive = states(3, 5, device)
    cuda_pairs.stats(ScoreTile(x, t, None, None, one, zero, 0), row, col, positive, None)
    # Row 0: -inf twice, which weighs nothing. Row 2: +inf, whose softmax is undefined.
    z = torch.tensor([0.5, 1.0, 2.0]).double()
    close(row[0, 0] + row[1, 0].log(), z.logsumexp(0), 1e-6)
    assert row[1, 2].isnan() and not row[1, 1].isnan()
    assert positive[0] == -torch.inf
    # A column of nothing but -inf.
    row, col, positive = states(1, 2, device)
    cuda_pairs.stats(ScoreTile(x[:1], t[[0, 0]], None, None, one, zero, 0), row, col, positive, None)
    assert (col[0] == -torch.inf).all() and (col[1] == 0).all() and row[1, 0] == 0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_zeros_have_finite_gradients(device, dtype, on):
    device = on(device)
    scores = make((12, 40, 16), dtype, device)
    for features_, scales in ((scores.x, scores.a), (scores.t, scores.q)):
        features_[3] = 0
        scales[3] = 1e12
    _, z, positive = dense(scores)
    seen = states(12, 40, device)
    cuda_pairs.stats(scores, *seen, None)
    check_states(*seen, scores)
    row, col = softmax(z, device)
    positive_g = torch.full((12,), -0.1, device=device)
    image, text = torch.empty(12, 16, device=device), torch.zeros(40, 16, device=device)
    cuda_pairs.grads(scores, SoftmaxGradient(row, col, 0.1, 0.1, positive_g), 1.0, None, FeatureGradients(image, text))
    expected = features(scores, gradient(z, positive, row, col, 0.1, 0.1, positive_g), 1.0)
    for found, true in zip((image, text), expected, strict=True):
        others = torch.arange(len(found)) != 3
        assert found.isfinite().all()
        close(found.cpu()[others], true[others], STEP[dtype])
        close(found[3], true[3], STEP[dtype])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_are_widened_exactly(device, dtype, on):
    device = on(device)
    codes = torch.arange(-128, 128, dtype=torch.int16).to(torch.int8).repeat(5, 3)
    for view in (codes, codes[:, 3:-2], codes[:1, :1], codes[::2]):
        there = codes.to(device)[:: 2 if len(view) == 3 else 1][: len(view)]
        there = there[:, 3:-2] if view.shape[1] == 763 else there[:, : view.shape[1]]
        wide = cuda_pairs.widen(there, dtype)
        assert wide.dtype == dtype and torch.equal(wide.cpu().float(), view.float())
        assert torch.equal(cuda_pairs.operand(there, dtype), wide) and cuda_pairs.operand(wide, dtype) is wide


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="torch before 2.9")
def test_tf32_is_off_inside_and_as_before_outside():
    matmul = torch.backends.cuda.matmul
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("high", "highest"):
            torch.set_float32_matmul_precision(precision)
            setting = matmul.fp32_precision
            with exact_float32():
                assert matmul.fp32_precision != "tf32"
            assert matmul.fp32_precision == setting
            assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)


def test_cuda_compiles_without_spills():
    """Read from the extension that is installed, which setup.py compiled for every GPU."""
    if not _C.build_info()["cuda"]:
        pytest.skip(_C.build_info()["reason"])
    nvidia = pytest.importorskip("triton.backends.nvidia")  # its wheel has a cuobjdump
    cuobjdump = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    done = subprocess.run([cuobjdump, "-res-usage", _C.__file__], capture_output=True, text=True, check=True)
    # kernel -> (registers at most, how many of them): 128 registers let four blocks of 128 threads share a
    # multiprocessor, 102 five, 168 three (statistics of rows that are not aligned), each with 16 KB of loads in
    # flight. Three dtypes for the gradients, and none for the sigmoid loss, each with and without 16-byte accesses.
    allowed = {
        ("contrastive", "stats"): (128, 2),
        ("contrastive", "gradient"): (128, 6),
        ("contrastive", "merge"): (64, 1),
        ("sigmoid", "sigmoid"): (102, 8),
        ("sigmoid", "add"): (64, 1),
    }
    counts: dict[str, dict] = {arch: dict.fromkeys(allowed, 0) for arch in _C.build_info()["archs"].split(";")}
    for code in done.stdout.split("Fatbin elf code:")[1:]:
        arch = re.search(r"arch = sm_(\w+)", code)[1]
        found = re.findall(
            r"Function \S*?_(contrastive|sigmoid)_cu_\S*?(gradient|stats|merge|sigmoid|add)_kernel(\S*):\s+"
            r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)",
            code,
        )
        for source, name, of, registers, stack, shared, local in found:
            kind = next((kind for kind in ("half", "bfloat16") if kind in of), "none" if "IvLb" in of else "float")
            print(f"sm_{arch:3} {name:8} {kind:8} registers {registers:3}, shared memory {shared}, stack {stack}")
            assert (stack, local) == ("0", "0"), (name, of, arch)  # where registers are spilled to
            most = 168 if name == "stats" and "Lb0E" in of else allowed[source, name][0]
            assert int(registers) <= most, (name, of, arch)
            counts[arch][source, name] += 1
    assert all(there == {name: n for name, (_, n) in allowed.items()} for there in counts.values()), counts


@pytest.mark.gpu
def test_tf32_does_not_reach_the_scores(on):
    device = on("cuda")
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        scores = make((200, 300, 256), torch.float32, device, scale=100.0)
        row, col, positive = states(200, 300, device)
        cuda_pairs.stats(scores, row, col, positive, None)
        check_states(row, col, positive, scores)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.gpu
def test_more_scores_than_31_bits_count(on):
    device = on("cuda")
    n = 47000
    if torch.cuda.mem_get_info()[0] < 12 * n * n:
        pytest.skip("too little memory")
    scores = make((8, n, 2), torch.float32, device, offset=40, scaled="")
    scores = ScoreTile(scores.x.repeat(n // 8, 1), scores.t, None, None, scores.scale, scores.bias, 40)
    row, col, positive = states(n // 8 * 8, n, device)
    cuda_pairs.stats(scores, row, col, positive, None)
    z = scores.x[:8].cpu().double() @ scores.t.cpu().double().T * scores.scale.item() + scores.bias.item()
    mask = torch.arange(8)[:, None] + 40 == torch.arange(n)
    lse = z.logsumexp(1)  # rows repeat, and the last ones have no positive
    close(row[0, -8:] + row[1, -8:].log(), lse, 1e-6)
    close(row[0, :8] + row[1, :8].log(), z.masked_fill(mask, -torch.inf).logsumexp(1), 1e-6)
    sums = z.exp().sum(0) * (n // 8)
    j = torch.arange(40, n)
    sums[j] -= z[(j - 40) % 8, j].exp()
    close(col[0] + col[1].log(), sums.log(), 1e-6)
    image = torch.empty(n // 8 * 8, 2, device=device)
    full = torch.stack([lse, torch.ones(8).double()]).float().repeat(1, n // 8).to(device)
    positive_g = torch.full((n // 8 * 8,), -0.5, device=device)
    cuda_pairs.grads(
        scores, SoftmaxGradient(full, col[:2], 1.0, 0.0, positive_g), 1.0, None, FeatureGradients(image, None)
    )
    g = (z - lse[:, None]).exp().masked_fill(mask, -0.5)
    close(
        image[:8],
        features(ScoreTile(scores.x[:8], scores.t, None, None, scores.scale, scores.bias, 40), g, 1.0)[0],
        2e-5,
    )
