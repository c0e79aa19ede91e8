"""The "cuda" backend of the pair losses against the dense definition in float64.

Every test of values runs twice: on a GPU, and here with the kernels compiled for the CPU by tests/cuda_on_cpu.h,
which runs them thread by thread as they are written.
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
    # Thread blocks of many rows are had with fewer of them than would fill a GPU.
    return emulate(
        tmp_path_factory.mktemp("emulated"),
        ["contrastive", "positives", "sigmoid", "score_tiles", "dequant"],
        ["pairs"],
        "pairs",
        more='module.def("gemm", [] { return reinterpret_cast<std::uintptr_t>(&emulated::gemm_ex); });',
        edit=lambda text: text.replace("kMinBlocks = 512", "kMinBlocks = 3"),
    )


@pytest.fixture(params=[None, [24, 72]], ids=["whole", "in blocks"])
def on(request, monkeypatch):
    """on(device): the device, with the backend made to work there and its scratch memory poisoned.

    Twice: with the table's blocks, larger than any matrix here, and with small ones and bands of 24 rows.
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
    """A block of normalised features; rows of x and t lie further apart than they are long."""
    rows, cols, dim = shape
    generator = torch.Generator().manual_seed(seed + 7 * rows + cols)
    image = torch.randn(rows, dim + 8, generator=generator)[:, :dim]
    text = torch.randn(cols, dim + 8, generator=generator)[:, :dim]
    for i in range(rows):  # own pairs are alike
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


def dense(block):
    """c, z and the mask of own pairs, in float64 on the CPU."""
    c = block.x.cpu().double() @ block.t.cpu().double().T
    if block.a is not None:
        c = c * block.a.cpu().double()[:, None]
    if block.q is not None:
        c = c * block.q.cpu().double()
    own = torch.arange(c.shape[0])[:, None] + block.offset == torch.arange(c.shape[1])
    return c, c * block.scale.cpu().double() + block.bias.cpu().double(), own


def features(block, g, alpha):
    """The features' gradients of g, in float64 on the CPU."""
    a = torch.ones(len(block.x)).double() if block.a is None else block.a.cpu().double()
    q = torch.ones(len(block.t)).double() if block.q is None else block.q.cpu().double()
    k = alpha * block.scale.cpu().double() * a[:, None] * g * q
    return k @ block.t.cpu().double(), k.T @ block.x.cpu().double()


def close(found, expected, tolerance):
    found, expected = found.cpu().double(), expected.double()
    error, size = (found - expected).norm(), expected.norm()
    assert error <= tolerance * size + 1e-30, (float(error), float(size))


def level(expected):
    """A tenth of the largest magnitude, as a float32 has it."""
    return float((0.1 * expected.abs().max()).float())


def guarded(rows, cols, dtype, device, gap=0):
    """A poisoned [rows, cols] inside a larger buffer, rows cols + gap apart, and a check that nothing else changed."""
    buffer = torch.full((rows + 2, cols + gap), float("nan"), dtype=dtype, device=device)
    outside = torch.ones(buffer.shape, dtype=torch.bool)
    outside[1:-1, :cols] = False

    def untouched():
        assert buffer.cpu()[outside].isnan().all()

    return buffer[1:-1, :cols], untouched


def states(rows, cols, device):
    """Row and column states at their start, as views whose three rows lie apart, and own pairs yet unknown."""
    row, col = (torch.full((3, n + 5), 7.0, device=device)[:, 2 : n + 2] for n in (rows, cols))
    for state in (row, col):
        state[0], state[1:] = -torch.inf, 0
    return row, col, torch.full((rows,), 5.0, device=device)


def pieces(block):
    """The block cut in four (fewer where it is one row or column), with their slices."""
    rows, cols = len(block.x), len(block.t)
    for i in (slice(0, rows // 3), slice(rows // 3, rows)):
        for j in (slice(0, cols // 2), slice(cols // 2, cols)):
            if i.stop > i.start and j.stop > j.start:
                a = None if block.a is None else block.a[i]
                q = None if block.q is None else block.q[j]
                offset = block.offset + i.start - j.start
                yield i, j, ScoreTile(block.x[i], block.t[j], a, q, block.scale, block.bias, offset)


def softmax(z, device, part=0.9):
    """(m, l) of rows and columns of which z is a part, as views whose two rows lie apart."""
    for dim in (1, 0):
        m = z.amax(dim)
        state = torch.full((2, len(m) + 5), torch.nan, dtype=torch.float64)
        state[0, 2:-3], state[1, 2:-3] = m + 0.1, (z - m.unsqueeze(dim) - 0.1).exp().sum(dim) / part
        yield state.float().to(device)[:, 2:-3]


def gradient(z, own, row, col, row_weight, col_weight, own_g):
    """g, in float64 on the CPU."""
    (m_row, l_row), (m_col, l_col) = row.cpu().double(), col.cpu().double()
    g = torch.zeros_like(z)
    if row_weight:
        g += row_weight * (z - m_row[:, None]).exp() / l_row[:, None]
    if col_weight:
        g += col_weight * (z - m_col).exp() / l_col
    return torch.where(own, own_g.cpu().double()[:, None], g)


def check_states(row, col, own, block):
    c, z, mask = dense(block)
    others = z.masked_fill(mask, -torch.inf)
    for state, dim in ((row, 1), (col, 0)):
        lonely = others.amax(dim) == -torch.inf  # nothing but its own pair
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
    close(own.cpu()[here], c[mask], 1e-5)
    assert (own.cpu()[~here] == 5.0).all()


# Which side has scales, and whether the text is int8; every other one meets the first and third, or second and fourth.
CASES = [("", False), ("a", False), ("q", False), ("aq", False), ("", True), ("a", True), ("aq", False)]
WANTED = [(True, True), (False, True), (True, False), (False, False)]  # the images' gradient, the texts'


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES)
def test_statistics_whole_and_in_pieces(device, shape, on):
    device = on(device)
    rows, cols, _ = shape
    for number, offset in enumerate([0, 3, -2, cols, -rows, 2**40]):
        scaled, codes = CASES[(number + rows) % len(CASES)]
        block = make(shape, DTYPES[number % 3], device, offset if offset != 2**40 else 0, scaled, codes)
        block = ScoreTile(block.x, block.t, block.a, block.q, block.scale, block.bias, offset)
        row, col, own = states(rows, cols, device)
        cuda_pairs.stats(block, row, col, own, None)
        check_states(row, col, own, block)
        for state in (row, col):
            edges = state._base.cpu()
            assert (edges[:, :2] == 7).all() and (edges[:, -3:] == 7).all()
        if number == 0:  # the same bits at every run
            again = states(rows, cols, device)
            cuda_pairs.stats(block, *again, None)
            assert all(torch.equal(x, y) for x, y in zip((row, col, own), again, strict=True))
        row, col, own = states(rows, cols, device)
        for i, j, piece in pieces(block):
            cuda_pairs.stats(piece, row[:, i], col[:, j], own[i], None)
        check_states(row, col, own, block)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_kept_and_recomputed(device, shape, dtype, on):
    device = on(device)
    rows, cols, dim = shape
    for number, (scaled, codes) in enumerate(CASES):
        offset = [0, 2, -1][number % 3]
        block = make(shape, dtype, device, offset, scaled, codes)
        _, z, own = dense(block)
        weights, alpha = (0.5 / rows, 0.3 / cols), 0.7
        row, col = softmax(z, device)
        own_g = -torch.rand(rows, generator=torch.Generator().manual_seed(number)) / rows
        own_g[~own.any(dim=1)] = torch.nan  # not of this block
        own_g = own_g.to(device)
        expected = features(block, gradient(z, own, row, col, *weights, own_g), alpha)

        keep, keep_untouched = guarded(rows, cols, torch.float32, device, gap=number % 4)
        cuda_pairs.stats(block, *states(rows, cols, device), keep)
        kept_before = keep.clone()
        close(keep, block.x.cpu().double() @ block.t.cpu().double().T, 1e-6)
        for kept, out_dtype in ((None, dtype), (keep, torch.float32)):
            for want_image, want_text in WANTED[number % 2 :: 2]:
                image, image_untouched = guarded(rows, dim, out_dtype, device)
                text, text_untouched = guarded(cols, dim, torch.float32, device)
                before = level(expected[1])  # what is added to: of a size at which the sum keeps what is added
                text.fill_(before)
                wanted = image if want_image else None, text if want_text else None
                cuda_pairs.grads(
                    block, SoftmaxGradient(row, col, *weights, own_g), alpha, kept, FeatureGradients(*wanted)
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
    block = make(shape, dtype, device, 1)
    _, z, own = dense(block)
    own_g = torch.full((rows,), -0.3, device=device)
    for weights in ((0.4, 0.0), (0.0, 0.4), (0.0, 0.0)):
        row, col = softmax(z, device)
        for state, weight in zip((row, col), weights, strict=True):
            for i, wrong in enumerate(((torch.nan, torch.nan), (torch.inf, 1), (-torch.inf, 0), (0, 0), (1e30, -1))):
                if not weight:
                    state[:, i::5] = torch.tensor(wrong, device=device)[:, None]
        image, text = torch.empty(rows, dim, device=device), torch.zeros(cols, dim, device=device)
        cuda_pairs.grads(block, SoftmaxGradient(row, col, *weights, own_g), 1.0, None, FeatureGradients(image, text))
        expected = features(block, gradient(z, own, row, col, *weights, own_g), 1.0)
        close(image, expected[0], STEP[dtype])
        close(text, expected[1], STEP[dtype])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 2, 9, 131])
def test_own_pairs_of_any_size_stay_apart(device, dtype, n, on):
    device = on(device)
    x = 200 * torch.eye(n, dtype=dtype, device=device)
    own_g = -torch.rand(n, generator=torch.Generator().manual_seed(n)).to(device)
    for huge in (1e38, -1e38):  # own pairs' z is infinite, others' is the bias
        block = ScoreTile(x, x, None, None, torch.tensor(huge, device=device), torch.tensor(-3.0, device=device), 0)
        row, col, own = states(n, n, device)
        cuda_pairs.stats(block, row, col, own, None)
        for state in (row, col):
            assert (state[0] == (-3.0 if n > 1 else -torch.inf)).all()
            assert (state[1] == n - 1).all() and (state[2] == 0).all()
        assert (own == 4e4).all()
        states_ = torch.tensor([[-3.0], [n]], device=device).repeat(1, n)
        image, text = torch.empty(n, n, device=device), torch.zeros(n, n, device=device)
        cuda_pairs.grads(
            block,
            SoftmaxGradient(states_, states_, 0.5 / n, 0.5 / n, own_g),
            1e-36,
            None,
            FeatureGradients(image, text),
        )
        g = torch.full((n, n), 1 / n**2).double()
        g.diagonal().copy_(own_g)
        for found, expected in zip((image, text), features(block, g, 1e-36), strict=True):
            close(found, expected, STEP[dtype])
    # The same of products that are infinite or NaN.
    a, middle = torch.full((n,), 1e30, device=device), torch.arange(n, device=device) == n // 2
    for broken in (middle & False, middle):
        image = x.masked_fill(broken[:, None], torch.nan)
        block = ScoreTile(image, x, a, a, torch.tensor(2.0, device=device), torch.tensor(1.0, device=device), 0)
        row, col, own = states(n, n, device)
        cuda_pairs.stats(block, row, col, own, None)
        assert own[broken].isnan().all() and (own[~broken] == torch.inf).all()
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
        block = make(shape, dtype, device, offset, scaled, codes, scale=10.0, bias=-5.0)
        c, z, own = dense(block)
        y = own.double() * 2 - 1
        alpha, g = 0.3, -y * torch.sigmoid(-y * z)
        expected = features(block, g, alpha)
        for want_image, want_text in WANTED[number % 2 :: 2]:
            sums = [torch.full((rows + 4,), 0.5, device=device) for _ in range(3)]
            image, image_untouched = guarded(rows, dim, dtype if want_text else torch.float32, device)
            text, text_untouched = guarded(cols, dim, torch.float32, device)
            before = level(expected[1])
            text.fill_(before)
            cuda_pairs.sigmoid(
                block,
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
    """Own pairs in the middle of a strip, before and after tiles that have none, and beside a ragged edge; the second
    block of columns starts where rows are not aligned."""
    device = on(device)
    rows, cols, dim = shape = 137, 700, 6
    for width in (cols, 323):
        with tuned.using("pairs", "block", [rows, width]), tuned.using("pairs", "band", {"bytes": 1 << 30}):
            block = make(shape, dtype, device, offset, "aq")
            _, z, own = dense(block)
            state_row, state_col, own_c = states(rows, cols, device)
            keep, keep_untouched = guarded(rows, cols, torch.float32, device)
            cuda_pairs.stats(block, state_row, state_col, own_c, keep)
            keep_untouched()
            check_states(state_row, state_col, own_c, block)

            row, col = softmax(z, device)
            own_g = torch.full((rows,), -0.01, device=device)
            expected = features(block, gradient(z, own, row, col, 0.01, 0.02, own_g), 0.7)
            for kept in (None, keep):
                image, text = torch.empty(rows, dim, device=device), torch.zeros(cols, dim, device=device)
                cuda_pairs.grads(
                    block, SoftmaxGradient(row, col, 0.01, 0.02, own_g), 0.7, kept, FeatureGradients(image, text)
                )
                close(image, expected[0], STEP[dtype])
                close(text, expected[1], STEP[dtype])

            block = make(shape, dtype, device, offset, "aq", scale=20.0, bias=-6.0)
            c, z, own = dense(block)
            y = own.double() * 2 - 1
            g = -y * torch.sigmoid(-y * z)
            for wanted in (True, False):
                sums = [torch.zeros(rows, device=device) for _ in range(3)]
                image, text = torch.empty(rows, dim, device=device), torch.zeros(cols, dim, device=device)
                cuda_pairs.sigmoid(
                    block, 1.0, SigmoidSums(*sums), FeatureGradients(*((image, text) if wanted else (None, None)))
                )
                for found, terms in zip(sums, (torch.nn.functional.softplus(-y * z), g * c, g), strict=True):
                    assert ((found.cpu() - terms.sum(1)).abs() <= 2e-6 * terms.abs().sum(1)).all()
                if wanted:
                    expected = features(block, g, 1.0)
                    close(image, expected[0], STEP[dtype])
                    close(text, expected[1], STEP[dtype])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("u", [-80.0, -16.0, -1e-3, 0.0, 1e-3, 16.0, 80.0, 3e4])
def test_losses_of_every_size_in_a_product(device, u, on):
    """32 factors 1 + exp(-|u|) are multiplied before their logarithm is taken: all of one size, or one of its own."""
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
    block = make(shape, torch.float32, device, scale=5.0, bias=-2.0)
    row, col, own = states(rows, cols, device)
    cuda_pairs.stats(block, row, col, own, None)
    check_states(row, col, own, block)
    _, z, mask = dense(block)
    sums = [torch.zeros(rows, device=device) for _ in range(3)]
    cuda_pairs.sigmoid(block, 1.0, SigmoidSums(*sums), FeatureGradients(None, None))
    close(sums[0], torch.nn.functional.softplus(torch.where(mask, -z, z)).sum(1), 3e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_far_negatives_all_count(device, on):
    device = on(device)
    block = make((2, 3000, 4), torch.float32, device, offset=-9, scale=1.0, bias=-17.0)
    _, z, _ = dense(block)
    sums = [torch.zeros(2, device=device) for _ in range(3)]
    cuda_pairs.sigmoid(block, 1.0, SigmoidSums(*sums), FeatureGradients(None, None))
    close(sums[0], torch.nn.functional.softplus(z).sum(1), 3e-6)
    close(sums[2], torch.sigmoid(z).sum(1), 3e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scale", [1.0, 100.0, -100.0])
def test_sharp_softmax(device, scale, on):
    device = on(device)
    block = make((70, 300, 24), torch.float32, device, scale=scale, bias=0.0)
    row, col, own = states(70, 300, device)
    cuda_pairs.stats(block, row, col, own, None)
    check_states(row, col, own, block)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("side", ["x", "t"])
def test_nan_shows(device, side, on):
    device = on(device)
    block = make((20, 150, 6), torch.float32, device)
    getattr(block, side)[13, 2] = float("nan")
    row, col, own = states(20, 150, device)
    for _, j, piece in pieces(block):  # and survives every merge
        i = slice(0, 6) if len(piece.x) == 6 else slice(6, 20)
        cuda_pairs.stats(piece, row[:, i], col[:, j], own[i], None)
    wrong, right = (row, col) if side == "x" else (col, row)
    assert wrong[1, 13].isnan() and wrong[1].isnan().sum() == 1
    assert right[1].isnan().sum() == right.shape[1] - 1 and not right[1, 13].isnan()  # all but the own pair's
    assert own[13].isnan() and own.isnan().sum() == 1
    image, text = torch.empty(20, 6, device=device), torch.zeros(150, 6, device=device)
    ones = torch.ones(2, 150, device=device)
    cuda_pairs.grads(
        block, SoftmaxGradient(ones[:, :20], ones, 1.0, 1.0, 0 * own), 1.0, None, FeatureGradients(image, text)
    )
    assert image[13].isnan().all() and text[13].isnan().all()
    sums = [torch.zeros(20, device=device) for _ in range(3)]
    cuda_pairs.sigmoid(block, 1.0, SigmoidSums(*sums), FeatureGradients(None, None))
    assert all(x[13].isnan() for x in sums)
    row, col, own = states(20, 150, device)
    nan = float("nan")
    row[1, 4], col[1, 5] = nan, nan
    clean = make((20, 150, 6), torch.float32, device)
    cuda_pairs.stats(clean, row, col, own, None)
    assert row[1].isnan().sum() == 1 and col[1].isnan().sum() == 1


@pytest.mark.parametrize("device", DEVICES)
def test_products_that_overflow(device, on):
    device = on(device)
    x = torch.tensor([[1e30], [1.0], [-1e30]], device=device)
    t = torch.tensor([[-1e30], [0.5], [1.0], [-1e30], [2.0]], device=device)
    one, zero = torch.tensor(1e-30, device=device), torch.tensor(0.0, device=device)
    row, col, own = states(3, 5, device)
    cuda_pairs.stats(ScoreTile(x, t, None, None, one, zero, 0), row, col, own, None)
    # Row 0: -inf twice, which weighs nothing. Row 2: +inf, whose softmax is undefined.
    z = torch.tensor([0.5, 1.0, 2.0]).double()
    close(row[0, 0] + row[1, 0].log(), z.logsumexp(0), 1e-6)
    assert row[1, 2].isnan() and not row[1, 1].isnan()
    assert own[0] == -torch.inf
    # A column of nothing but -inf.
    row, col, own = states(1, 2, device)
    cuda_pairs.stats(ScoreTile(x[:1], t[[0, 0]], None, None, one, zero, 0), row, col, own, None)
    assert (col[0] == -torch.inf).all() and (col[1] == 0).all() and row[1, 0] == 0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_zeros_have_finite_gradients(device, dtype, on):
    device = on(device)
    block = make((12, 40, 16), dtype, device)
    for features_, scales in ((block.x, block.a), (block.t, block.q)):
        features_[3] = 0
        scales[3] = 1e12
    _, z, own = dense(block)
    seen = states(12, 40, device)
    cuda_pairs.stats(block, *seen, None)
    check_states(*seen, block)
    row, col = softmax(z, device)
    own_g = torch.full((12,), -0.1, device=device)
    image, text = torch.empty(12, 16, device=device), torch.zeros(40, 16, device=device)
    cuda_pairs.grads(block, SoftmaxGradient(row, col, 0.1, 0.1, own_g), 1.0, None, FeatureGradients(image, text))
    expected = features(block, gradient(z, own, row, col, 0.1, 0.1, own_g), 1.0)
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
        block = make((200, 300, 256), torch.float32, device, scale=100.0)
        row, col, own = states(200, 300, device)
        cuda_pairs.stats(block, row, col, own, None)
        check_states(row, col, own, block)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.gpu
def test_more_scores_than_31_bits_count(on):
    device = on("cuda")
    n = 47000
    if torch.cuda.mem_get_info()[0] < 12 * n * n:
        pytest.skip("too little memory")
    block = make((8, n, 2), torch.float32, device, offset=40, scaled="")
    block = ScoreTile(block.x.repeat(n // 8, 1), block.t, None, None, block.scale, block.bias, 40)
    row, col, own = states(n // 8 * 8, n, device)
    cuda_pairs.stats(block, row, col, own, None)
    z = block.x[:8].cpu().double() @ block.t.cpu().double().T * block.scale.item() + block.bias.item()
    mask = torch.arange(8)[:, None] + 40 == torch.arange(n)
    lse = z.logsumexp(1)  # rows repeat, and the last ones have no own pair
    close(row[0, -8:] + row[1, -8:].log(), lse, 1e-6)
    close(row[0, :8] + row[1, :8].log(), z.masked_fill(mask, -torch.inf).logsumexp(1), 1e-6)
    sums = z.exp().sum(0) * (n // 8)
    j = torch.arange(40, n)
    sums[j] -= z[(j - 40) % 8, j].exp()
    close(col[0] + col[1].log(), sums.log(), 1e-6)
    image = torch.empty(n // 8 * 8, 2, device=device)
    full = torch.stack([lse, torch.ones(8).double()]).float().repeat(1, n // 8).to(device)
    own_g = torch.full((n // 8 * 8,), -0.5, device=device)
    cuda_pairs.grads(block, SoftmaxGradient(full, col[:2], 1.0, 0.0, own_g), 1.0, None, FeatureGradients(image, None))
    g = (z - lse[:, None]).exp().masked_fill(mask, -0.5)
    close(
        image[:8], features(ScoreTile(block.x[:8], block.t, None, None, block.scale, block.bias, 40), g, 1.0)[0], 2e-5
    )
