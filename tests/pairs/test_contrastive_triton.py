"""The "triton" backend of the pair losses and its kernels against the dense definition in float64."""

import contextlib
import sys
from dataclasses import dataclass, replace

import pytest
import torch
from support.pair_cases import check_positives
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lift_fast.ops import tuned
from lift_fast.ops.pairs import contrastive as contrastive_op
from lift_fast.ops.pairs import sigmoid as sigmoid_op
from lift_fast.ops.pairs import triton as triton_pairs
from lift_fast.ops.pairs.contract import FeatureGradients, ScoreTile, SigmoidSums, SoftmaxGradient

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
STEP = {torch.float32: 2e-5, torch.bfloat16: 4e-3, torch.float16: 1e-3}  # of a gradient, in relative norm
SHAPES = [(1, 1, 1), (2, 3, 5), (127, 129, 100), (65, 200, 33)]
FORMS = {"stored": -1, "fused": 1 << 30, "persistent": 1 << 30}  # the dims whose scores the kernels form
CASES = [
    pytest.param(form, dtype, int8, id=f"{form}-{str(dtype).removeprefix('torch.')}{'-int8' if int8 else ''}")
    for form in FORMS
    for dtype in DTYPES
    for int8 in (False, True)
    if form != "persistent" or not (int8 or dtype == torch.float32)  # these would run as "fused"
]

SOAK = pytest.mark.soak


@contextlib.contextmanager
def settings(**values):
    with contextlib.ExitStack() as stack:
        for setting, value in values.items():
            stack.enter_context(tuned.using("pairs", setting, value))
        yield


pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture(params=FORMS)
def form(request, monkeypatch):
    """Its name. In the persistent form `score_tile` makes features that tensor descriptors can load."""
    if persistent := request.param == "persistent":
        make = score_tile
        monkeypatch.setattr(sys.modules[__name__], "score_tile", lambda *args, **more: described(make(*args, **more)))
    with settings(fused_up_to=FORMS[request.param], form="persistent" if persistent else "plain"):
        yield request.param


def score_tile(rows, cols, dim, dtype=torch.float32, int8=False, scaled=True, offset=0, device="cpu", scale=14.3):
    generator = torch.Generator().manual_seed(rows + 7 * cols + dim)
    x, t = (torch.randn(n, dim, generator=generator) / dim**0.5 for n in (rows, cols))
    a, q = (torch.rand(n, generator=generator) + 0.5 for n in (rows, cols))
    t = (t * 50 * dim**0.5).clamp(-128, 127).round().to(torch.int8) if int8 else t.to(dtype)
    q = q / (50 * dim**0.5) if int8 else q
    a, q = (a.to(device), q.to(device)) if scaled else (None, q.to(device) if int8 else None)
    scale, bias = torch.tensor(scale, device=device), torch.tensor(-0.7, device=device)
    return ScoreTile(x.to(device, dtype), t.to(device), a, q, scale, bias, offset)


def described(b):
    """b with its 16-bit features in rows a multiple of 32 bytes apart and NaN around them."""
    half = {name: one for name, one in (("x", b.x), ("t", b.t)) if one.element_size() == 2}
    return replace(b, **{name: guarded(one, *one.shape, dtype=one.dtype)[0].copy_(one) for name, one in half.items()})


@dataclass
class Dense:
    """The definition, in float64."""

    scores: ScoreTile

    def __post_init__(self):
        b = self.scores
        one = torch.ones((), device=b.x.device)
        self.a = (one if b.a is None else b.a).double().expand(len(b.x))
        self.q = (one if b.q is None else b.q).double().expand(len(b.t))
        self.p = b.x.double() @ b.t.double().T
        self.c = self.a[:, None] * self.q * self.p
        self.z = b.scale.double() * self.c + b.bias.double()
        columns = torch.arange(len(b.t), device=b.x.device)
        self.positive = columns == torch.arange(len(b.x), device=b.x.device)[:, None] + b.offset
        self.others = self.z.masked_fill(self.positive, -torch.inf)

    def features(self, g, alpha):
        """d_image, d_text"""
        g = alpha * self.scores.scale.double() * self.a[:, None] * self.q * g
        return g @ self.scores.t.double(), g.T @ self.scores.x.double()

    def whole(self, axis):
        """float32 (m, l) along an axis over all pairs, positives included, with a gap between the two."""
        m = self.z.amax(axis)
        l = (self.z - m.float().unsqueeze(axis)).exp().sum(axis)  # noqa: E741
        state, _ = guarded(m, 2, len(m))
        return state.copy_(torch.stack([m, l]))

    def contrastive(self, row_weight, col_weight, positive_g):
        g = row_weight * self.z.softmax(1) + col_weight * self.z.softmax(0)
        return torch.where(self.positive, positive_g.double()[:, None], g)

    def sigmoid(self):
        """loss by row, g"""
        y = self.positive * 2.0 - 1
        return -F.logsigmoid(y * self.z).sum(1), -y * torch.sigmoid(-y * self.z)


def guarded(like, *shape, dtype=torch.float32, fill=float("nan")):
    """A tensor surrounded by NaN rows (and followed by NaN columns, if it has two dimensions), and a check on those."""
    inside = (slice(1, 1 + shape[0]), slice(0, shape[1])) if len(shape) == 2 else slice(1, 1 + shape[0])
    width = [-(-n // 16) * 16 + 16 for n in shape[1:]]  # rows as far apart as aligned ones
    outer = torch.full([shape[0] + 2, *width], float("nan"), dtype=dtype, device=like.device)
    outer[inside] = fill
    mask = torch.ones_like(outer, dtype=torch.bool)
    mask[inside] = False
    return outer[inside], lambda: bool(outer[mask].isnan().all())


def state(n, like):
    view, untouched = guarded(like, 3, n, fill=0)
    view[0] = -torch.inf
    return view, untouched


def near(got, want, step):
    assert got.shape == want.shape
    assert (got.double() - want).norm() <= step * want.norm() + 1e-6 * want.numel() ** 0.5, (got, want)


def near_states(state, others, c, axis):
    """(m, l, w) of the negatives; where there are none: as they were."""
    some = (others > -torch.inf).any(axis)
    m, l, w = state.double()  # noqa: E741
    assert (m[~some] == -torch.inf).all() and (l[~some] == 0).all() and (w[~some] == 0).all()
    wrong = (m + l.log() - others.logsumexp(axis)).abs() - 2e-6 * (1 + m.abs())
    assert (wrong[some] <= 0).all()
    e = others.softmax(axis)
    near((w / l)[some], (e * c).sum(axis)[some], 1e-5)


def cuts(n, parts):
    edges = [n * part // parts for part in range(parts + 1)]
    return list(zip(edges, edges[1:], strict=False))


def check(b, parts=1, keep=False, narrow=False):
    """The backend's stats, grads and sigmoid on a tile cut in parts × parts; narrow: d_image in x's dtype."""
    want, (rows, dim), cols = Dense(b), b.x.shape, len(b.t)
    step, like = STEP[b.x.dtype], b.x
    row, row_untouched = state(rows, like)
    col, col_untouched = state(cols, like)
    positive, positive_untouched = guarded(like, rows, fill=7.0)
    kept, kept_untouched = guarded(like, rows, cols) if keep else (None, lambda: True)
    tiles = []
    for low, high in cuts(rows, parts):
        for first, last in cuts(cols, parts):
            q = None if b.q is None else b.q[first:last]
            part = replace(b.rows(low, high), t=b.t[first:last], q=q)
            part = replace(part, offset=part.offset - first)
            here = None if kept is None else kept[low:high, first:last]
            tiles.append((part, slice(low, high), slice(first, last), here))
    for part, i, j, here in tiles:
        triton_pairs.stats(part, row[:, i], col[:, j], positive[i], here)
    assert row_untouched() and col_untouched() and positive_untouched() and kept_untouched()
    near_states(row, want.others, want.c, 1)
    near_states(col, want.others, want.c, 0)
    near(positive, torch.where(want.positive.any(1), (want.positive * want.c).sum(1), 7.0), 1e-5)
    if kept is not None:
        near(kept, want.p, 1e-6)

    row, col, positive_g = want.whole(1), want.whole(0), torch.linspace(-0.2, 0.1, rows, device=like.device)
    dtype = b.x.dtype if narrow else torch.float32
    d_image, d_text = torch.zeros(rows, dim, device=like.device).double(), torch.ones(cols, dim, device=like.device)
    for part, i, j, here in tiles:
        one, one_untouched = guarded(like, len(part.x), dim, dtype=dtype)
        one, before = one if narrow else one.clone(), None if here is None else here.clone()
        g = SoftmaxGradient(row[:, i], col[:, j], 0.3, 0.2, positive_g[i])
        triton_pairs.grads(part, g, 0.5, here, FeatureGradients(one, d_text[j]))
        assert one_untouched() and (before is None or torch.equal(here, before))
        d_image[i] += one.double()
    want_image, want_text = want.features(want.contrastive(0.3, 0.2, positive_g), 0.5)
    near(d_image, want_image, step)
    near(d_text - 1, want_text, step)

    sums, sums_untouched = guarded(like, 3, rows, fill=1.0)
    d_image.zero_(), d_text.fill_(1)
    for part, i, j, _ in tiles:
        one = torch.full((len(part.x), dim), float("nan"), dtype=dtype, device=like.device)
        triton_pairs.sigmoid(part, 0.5, SigmoidSums(*sums[:, i]), FeatureGradients(one, d_text[j]))
        d_image[i] += one.double()
    assert sums_untouched()
    loss, g = want.sigmoid()
    want_image, want_text = want.features(g, 0.5)
    near(sums[0] - 1, loss, 1e-6)
    near(sums[1] - 1, 0.5 * (g * want.c).sum(1), 1e-5)
    near(sums[2] - 1, 0.5 * g.sum(1), 1e-5)
    near(d_image, want_image, step)
    near(d_text - 1, want_text, step)


def check_nan(device):
    for side in "xt":
        b = score_tile(70, 130, 40, device=device)
        getattr(b, side)[3, 5] = torch.nan
        row, col, positive = state(70, b.x)[0], state(130, b.x)[0], torch.empty(70, device=device)
        triton_pairs.stats(b, row, col, positive, None)
        mine, others = (row, col) if side == "x" else (col, row)
        assert others[1].isnan().sum() == others.shape[1] - 1 and not others[1, 3].isnan()  # 3: its positive
        assert positive.isnan().nonzero().tolist() == [[3]]
        assert mine[1, 3].isnan() and mine[1].isnan().sum() == 1
        loss, rest = torch.zeros(70, device=device), torch.zeros(2, 70, device=device)
        triton_pairs.sigmoid(b, 1.0, SigmoidSums(loss, *rest), FeatureGradients(None, None))
        assert loss.isnan().sum() == (1 if side == "x" else 70)


def test_triton_in_its_interpreter(run_interpreted):
    run_interpreted(__file__)


@pytest.mark.interpret
@pytest.mark.parametrize(("form", "dtype", "int8"), CASES, indirect=["form"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_backend(shape, form, dtype, int8):
    last = shape == SHAPES[-1]
    check(score_tile(*shape, dtype, int8, scaled=not last, offset=shape[0] % 3 - 1), keep=not last)


@pytest.mark.interpret
def test_what_is_asked_for_is_what_runs(monkeypatch):
    """Persistent programs, but not for int8 codes, float32, rows without alignment or scores that are kept."""
    from lift_fast.kernels import persistent

    ran = []
    for name in ("scores_stats", "scores_grad"):
        launch = getattr(persistent, name)
        monkeypatch.setattr(persistent, name, lambda *args, launch=launch: ran.append(len(args[0])) or launch(*args))
    with settings(form="persistent", fused_up_to=1 << 30):
        check(described(score_tile(20, 30, 9, torch.float16)))
        check(score_tile(21, 30, 24, torch.bfloat16))
        assert ran == [20, 20, 21, 21]
        check(score_tile(22, 30, 9, torch.bfloat16))
        check(described(score_tile(23, 30, 16, torch.bfloat16, int8=True)))
        check(score_tile(24, 30, 16))
        check(score_tile(25, 30, 16, torch.bfloat16), keep=True)
        assert ran == [20, 20, 21, 21]


@pytest.mark.interpret
@pytest.mark.parametrize("n", [1, 2, 255, 257, 1000])
def test_own_pairs(n):
    check_positives(triton_pairs, n, "cpu")


@pytest.mark.interpret
@pytest.mark.parametrize("budget", [None, 0, 4 * 70 * 33])
@pytest.mark.parametrize("normalize", [False, True])
def test_the_losses_as_a_whole(normalize, budget):
    features = [F.normalize(torch.randn(70, 40), dim=1) for _ in range(2)]
    for module in (contrastive_op, sigmoid_op):
        got, want = (
            [x.to(dtype).clone().requires_grad_() for x in features] for dtype in (torch.float32, torch.double)
        )
        op = getattr(module, module.__name__.rpartition(".")[2])
        loss = op(*got, 14.3, -0.7, normalize=normalize, budget=budget, backend="triton")
        right = module.reference(*want, 14.3, -0.7, normalize=normalize)
        assert abs(loss.item() - right.item()) <= 1e-5 * max(1, abs(right.item()))
        loss.backward(), right.backward()
        for x, y in zip(got, want, strict=True):
            near(x.grad, y.grad, STEP[torch.float32])


@pytest.mark.gpu
def test_own_pairs_on_a_gpu():
    for n in (1, 2, 255, 257, 1000):
        check_positives(triton_pairs, n, "cuda")


@pytest.mark.interpret
@pytest.mark.parametrize("offset", [-30, -19, -1, 3, 39, 40, 5000])
def test_own_pairs_anywhere(offset, form):
    check(score_tile(20, 40, 5, torch.bfloat16, offset=offset))


@pytest.mark.interpret
@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_are_merged(dtype, form):
    check(score_tile(34, 21, 20, dtype, offset=-7), parts=2, keep=True, narrow=True)


SMALL = {"tile": [4, 16, 8, 4, 1], "stored": [4, 16, 0, 4, 1], "merge": [2, 8]}


@pytest.mark.interpret
def test_every_tile_of_a_kernel_is_right(form):
    """Small tiles, so that there are many: several groups of row tiles, and tiles across the edge on both sides."""
    tile = {"tile": [4, 32, 8, 4, 1]} if form == "persistent" else {}  # a gradient's box has at least 16 bytes
    with settings(**(SMALL | tile)):
        check(score_tile(37, 21, 9, torch.bfloat16, offset=-5), keep=True)
        check(score_tile(18, 33, 8, torch.bfloat16, int8=True, offset=-3))
        check(score_tile(43, 150, 19, torch.float16, offset=40))


@pytest.mark.interpret
def test_tiles_that_take_their_columns_in_another_order():
    with settings(**(SMALL | {"tile": [8, 128, 8, 4, 1], "fused_up_to": 9})):
        check(score_tile(19, 150, 9, torch.bfloat16, offset=100), keep=True)


@pytest.mark.interpret
@pytest.mark.parametrize("keep", [False, True], ids=["", "keep"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bands_and_blocks_are_cut_anywhere(dtype, keep, form, monkeypatch):
    """Several bands of G, several blocks of scores in each, several bands of partial sums; none divides the sizes."""
    from lift_fast.kernels import pairs

    monkeypatch.setattr(pairs, "PAD", 32)
    cut = {"block": [16, 32], "band": {"bytes": 5000}, "parts": {"bytes": 1000}}
    tiles = {"tile": [32, 32, 16, 4, 1], "stored": [16, 32, 0, 4, 1]}
    with settings(**(tiles | cut)):
        check(score_tile(77, 90, 9, dtype, int8=keep, offset=3), keep=keep, narrow=True)


@pytest.mark.interpret
def test_only_one_gradient_or_none(form):
    b = score_tile(33, 20, 12, torch.bfloat16)
    want, positive_g = Dense(b), torch.linspace(-0.2, 0.1, 33)
    softmax = want.whole(1), want.whole(0), 0.3, 0.2, positive_g
    d_image, d_text = want.features(want.contrastive(0.3, 0.2, positive_g), 2.0)
    got = torch.full((33, 12), torch.nan), torch.zeros(20, 12)
    triton_pairs.grads(b, SoftmaxGradient(*softmax), 2.0, None, FeatureGradients(got[0], None))
    triton_pairs.grads(b, SoftmaxGradient(*softmax), 2.0, None, FeatureGradients(None, got[1]))
    triton_pairs.grads(b, SoftmaxGradient(*softmax), 2.0, None, FeatureGradients(None, None))
    near(got[0], d_image, STEP[torch.bfloat16])
    near(got[1], d_text, STEP[torch.bfloat16])
    sums, only = torch.zeros(2, 3, 33)
    triton_pairs.sigmoid(b, 0.5, SigmoidSums(*sums), FeatureGradients(got[0], None))
    triton_pairs.sigmoid(b, 0.5, SigmoidSums(*only), FeatureGradients(None, None))
    near(only, sums.double(), 1e-6)
    near(got[0], want.features(want.sigmoid()[1], 0.5)[0], STEP[torch.bfloat16])


@pytest.mark.interpret
def test_a_weight_of_zero_hides_its_side(form):
    b = replace(score_tile(33, 20, 12, offset=-3), bias=torch.tensor(100.0))  # exp(z − 0) overflows
    want, positive_g = Dense(b), torch.linspace(-0.2, 0.1, 33)
    sides = want.whole(1), want.whole(0)
    for weights in [(0.3, 0.0), (0.0, 0.3), (0.0, 0.0)]:
        for hidden in (torch.nan, torch.inf, -torch.inf):
            row, col = (side if weight else side * 0 + hidden for side, weight in zip(sides, weights, strict=True))
            d_image, d_text = torch.full((33, 12), torch.nan), torch.zeros(20, 12)
            triton_pairs.grads(
                b, SoftmaxGradient(row, col, *weights, positive_g), 1.0, None, FeatureGradients(d_image, d_text)
            )
            for got, right in zip(
                (d_image, d_text), want.features(want.contrastive(*weights, positive_g), 1.0), strict=True
            ):
                near(got, right, STEP[torch.float32])


@pytest.mark.interpret
@pytest.mark.parametrize("offset", [-3, 36])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_own_pair_that_overflows_stays_out_of_the_others(dtype, offset, form):
    """The product of row 3's positive is inf − inf; it lies in the first column, or in the last before the edge."""
    b = score_tile(20, 40, 8, dtype, scaled=False, offset=offset)
    b.x[:, :2], b.t[:, :2] = 0, 0
    b.x[3, :2] = b.t[3 + offset, :2] = 3e30
    b.t[3 + offset, 1] *= -1
    row, col, positive = state(20, b.x)[0], state(40, b.x)[0], torch.zeros(20)
    triton_pairs.stats(b, row, col, positive, None)
    assert not positive[3].isfinite() and positive.isfinite().sum() == 19
    want = Dense(replace(b, x=b.x.index_fill(0, torch.tensor(3), 0)))
    without = torch.arange(20) != 3
    near_states(row[:, without], want.others[without], want.c[without], 1)
    assert row.isfinite().all() and col.isfinite().all() and (col[1] > 0).all()

    positive_g, d_image, d_text = torch.full((20,), 1e-3), torch.full((20, 8), torch.nan), torch.zeros(40, 8)
    whole = torch.stack([row[0], row[1]]), torch.stack([col[0], col[1]])
    triton_pairs.grads(b, SoftmaxGradient(*whole, 0.3, 0.2, positive_g), 1.0, None, FeatureGradients(d_image, d_text))
    assert d_image.isfinite().all() and d_text.isfinite().all()


@pytest.mark.interpret
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_converged_pairs_keep_the_digits_of_their_gradient(dtype, form):
    """p is closer to 1 than float32 resolves."""
    b = replace(score_tile(24, 24, 32, dtype, scaled=False), scale=torch.tensor(30.0), bias=torch.tensor(-5.0))
    b.x[:], b.t[:] = torch.eye(24, 32), torch.eye(24, 32) + 1e-3
    want = Dense(b)
    row, col, positive = state(24, b.x)[0], state(24, b.x)[0], torch.empty(24)
    triton_pairs.stats(b, row, col, positive, None)
    z = positive.double() * b.scale.double() + b.bias.double()
    off = sum((side[0].double() - z).exp() * side[1].double() for side in (row, col))
    positive_g = (-0.5 * off).float()
    d_image, d_text = torch.full((24, 32), torch.nan), torch.zeros(24, 32)
    triton_pairs.grads(
        b,
        SoftmaxGradient(want.whole(1), want.whole(0), 0.5, 0.5, positive_g),
        1.0,
        None,
        FeatureGradients(d_image, d_text),
    )
    g = 0.5 * (want.z.softmax(1) + want.z.softmax(0))
    g = g.masked_fill(want.positive, 0)
    g -= torch.diag(0.5 * sum(want.z.softmax(axis).masked_fill(want.positive, 0).sum(axis) for axis in (1, 0)))
    for got, right in zip((d_image, d_text), want.features(g, 1.0), strict=True):
        assert 0 < right.norm() < 1e-9 and (got.double() - right).norm() <= STEP[dtype] * right.norm()


@pytest.mark.interpret
def test_a_sum_is_not_lost_beside_a_large_maximum(form):
    """All scores are 1e12 or so, where float32 counts in steps of 65 536: m + log l would be m."""
    b = replace(score_tile(24, 40, 8, scaled=False, offset=100), scale=torch.tensor(1e13))
    b.x[:], b.t[:] = b.x[0].abs(), b.x[0].abs()
    row, col, positive = state(24, b.x)[0], state(40, b.x)[0], torch.zeros(24)
    triton_pairs.stats(b, row, col, positive, None)
    assert (row[0] > 1e12).all() and (row[1] == 40).all() and (col[1] == 24).all()
    d_image, d_text = torch.empty(24, 8), torch.zeros(40, 8)
    triton_pairs.grads(
        b, SoftmaxGradient(row[:2], col[:2], 0.3, 0.2, positive), 1.0, None, FeatureGradients(d_image, d_text)
    )
    g = torch.full((24, 40), 0.3 / 40 + 0.2 / 24, dtype=torch.float64)
    for got, right in zip((d_image, d_text), Dense(b).features(g, 1.0), strict=True):
        near(got, right, STEP[torch.float32])


@pytest.fixture
def fused_up_to_31():
    with tuned.using("pairs", "fused_up_to", 31):
        yield


@pytest.mark.interpret
def test_codes_that_cublas_multiplies_are_widened_once(fused_up_to_31):
    codes = {dim: torch.arange(-128, 128).to(torch.int8).repeat(dim)[: 9 * dim].view(9, dim) for dim in (16, 48)}
    for dtype in DTYPES:
        for dim, t in codes.items():
            got = triton_pairs.operand(t, dtype)
            if dim < 32 and dtype != torch.float32:
                assert got is t
            else:
                assert got.dtype == dtype and torch.equal(got.int(), t.int())
    for dtype in DTYPES:
        t = torch.zeros(9, 48, dtype=dtype)
        assert triton_pairs.operand(t, torch.bfloat16) is t
    b = score_tile(20, 40, 48, torch.bfloat16, int8=True)
    check(replace(b, t=triton_pairs.operand(b.t, b.x.dtype)), keep=True)


@pytest.mark.interpret
def test_float32_is_exact(monkeypatch):
    """Every product of float32 matrices is formed where tf32 is off."""
    inside, products = [], []

    @contextlib.contextmanager
    def exact():
        inside.append(True)
        yield
        inside.pop()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
                products.append(bool(inside))
            return func(*args, **(kwargs or {}))

    monkeypatch.setattr(triton_pairs, "exact_float32", exact)
    b = score_tile(20, 40, 8)
    row, col, positive = state(20, b.x)[0], state(40, b.x)[0], torch.empty(20)
    d_image, d_text = torch.empty(20, 8), torch.zeros(40, 8)
    with Watch():
        triton_pairs.stats(b, row, col, positive, None)
        triton_pairs.grads(
            b, SoftmaxGradient(row[:2], col[:2], 0.5, 0.5, positive), 1.0, None, FeatureGradients(d_image, d_text)
        )
        triton_pairs.sigmoid(b, 1.0, SigmoidSums(*torch.zeros(3, 20)), FeatureGradients(d_image, d_text))
    assert products == [True] * 7


@pytest.mark.interpret
@pytest.mark.parametrize("shape", [(0, 4, 3), (4, 0, 3)])
def test_nothing_to_do(shape):
    b = score_tile(*shape)
    rows, cols, dim = shape
    row, col = state(rows, b.x)[0], state(cols, b.x)[0]
    triton_pairs.stats(b, row, col, torch.empty(rows), None)
    assert (row[1] == 0).all() and (col[0] == -torch.inf).all()
    d_image, sums = torch.full((2, rows, dim), torch.nan), torch.ones(3, rows)
    triton_pairs.grads(
        b,
        SoftmaxGradient(row[:2], col[:2], 0.5, 0.5, sums[0]),
        1.0,
        None,
        FeatureGradients(d_image[0], torch.zeros(cols, dim)),
    )
    triton_pairs.sigmoid(b, 1.0, SigmoidSums(*sums), FeatureGradients(d_image[1], torch.zeros(cols, dim)))
    assert (d_image == 0).all() and (sums == 1).all()


@pytest.mark.interpret
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("keep_dims", [False, True])
def test_the_faster_interpreter_reduces_as_triton_s_own(axis, keep_dims, monkeypatch):
    from support import interpreter

    found = []
    x = torch.randn(4, 8)
    for reduce in (interpreter.by_elements, interpreter.by_slices):
        monkeypatch.setattr(interpreter.ReduceOps, "generic_reduce", reduce)
        out = torch.full((2, 4, 8), torch.nan)
        interpreter.reduced[(1,)](x, out[0], out[1], axis, keep_dims)
        found.append(out)
    assert torch.equal(*found) and not found[0].isnan().any()


@pytest.mark.interpret
def test_nan_is_never_a_finite_number(form):
    check_nan("cpu")


@pytest.mark.interpret
@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_features_and_scales(dtype, form):
    """Zero rows, duplicates, entries of 1e4 under their norms, scale 100."""
    b = score_tile(40, 50, 12, dtype, scale=100.0)
    b.x[3], b.t[4], b.t[8] = 0, 0, b.t[7]
    b.x[10:20] *= 2e4
    b.t[10:20] *= 2e4
    for x, a in ((b.x, b.a), (b.t, b.q)):
        a.copy_(1 / x.float().norm(dim=1).clamp_min(1e-12))
    check(replace(b, offset=2))


@pytest.mark.interpret
def test_far_pairs_keep_their_loss():
    """log(1 + e) in float32 would round e = exp(−17) to 0."""
    b = replace(score_tile(30, 40, 8), bias=torch.tensor(-17.0), offset=100, scale=torch.tensor(1e-3))
    sums = torch.zeros(3, 30)
    triton_pairs.sigmoid(b, 1.0, SigmoidSums(*sums), FeatureGradients(None, None))
    loss, g = Dense(b).sigmoid()
    assert ((sums[0] - loss).abs() <= 1e-5 * loss).all() and ((sums[2] - g.sum(1)).abs() <= 1e-5 * loss).all()


KINDS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int8: "i8"}
LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}  # bytes of shared memory
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.bfloat16}  # of the images
WHAT = {"stats": "scores_stats", "keep": "scores_stats", "grad": "scores_grad", "sigmoid": "scores_sigmoid"}


@pytest.fixture
def usage(triton_usage, monkeypatch):
    """usage(kernel, capability, tile, pointers, absent, aligned): `triton_usage`, and "asm".

    absent: pointers that are None. Types and alignment are those of a real launch.
    """
    triton = pytest.importorskip("triton")
    compile = triton.compile

    def use(kernel, capability, tile, pointers, absent=(), aligned=True):
        sizes = {"ROWS": tile.rows, "COLS": tile.cols, "DEPTH": tile.depth, "TILES": 32, "N": 32, "NARROW": False}
        sizes |= {"ALIGNED": aligned, "EVEN": aligned}
        constexprs = {name: sizes.get(name) for name in kernel.arg_names if name in sizes or name in absent}
        boxes = {"x": (tile.rows, tile.depth), "t": (tile.cols, tile.depth), "out": (tile.rows, tile.cols // 4)}
        boxes = boxes if kernel.fn.__module__.endswith(".persistent") else {}
        signature, even = {}, []
        for param in kernel.params:
            name = param.name
            if name in constexprs:
                signature[name] = "constexpr"
            elif name in boxes:
                signature[name] = f"tensordesc<{KINDS[pointers[name]]}{list(boxes[name])}>"
            elif name in ("row_weight", "col_weight", "alpha", "weight"):
                signature[name] = "fp32"
            elif param.do_not_specialize:
                signature[name] = "i32"
            else:
                signature[name] = "*" + KINDS[pointers.get(name, torch.float32)]
                if not param.do_not_specialize_on_alignment and (aligned or name not in ("x", "t", "keep", "p")):
                    even.append(name)
        compiled = []

        def with_options(source, target, options):
            more = {"num_stages": tile.stages, "maxnreg": tile.registers, "enable_fp_fusion": "alpha" in signature}
            compiled.append(compile(source, target=target, options=options | more))
            return compiled[0]

        monkeypatch.setattr(triton, "compile", with_options)
        found = triton_usage(kernel, signature, constexprs, capability, even, tile.warps)
        # Dynamic shared memory is part of the launch, not of the binary.
        return found | {"shared": max(found["shared"], compiled[0].metadata.shared), "asm": compiled[0].asm}

    return use


def tile_of(capability, setting, **facts):
    from lift_fast.kernels.pairs import TileConfig

    return TileConfig(*tuned.lookup("pairs", f"sm_{capability}", setting, **facts))


@pytest.mark.parametrize("aligned", [True, pytest.param(False, marks=SOAK)], ids=["even", "odd"])
@pytest.mark.parametrize("name", HALF)
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_kernels_that_form_scores_compile_for_gpus_that_are_not_here(capability, name, aligned, usage):
    from lift_fast.kernels import contrastive, sigmoid

    pointers = {"x": HALF[name], "t": torch.int8 if name == "int8" else HALF[name], "out": HALF[name]}
    for kind, absent in [("stats", ["keep"]), ("keep", []), ("grad", []), ("sigmoid", ["out"]), ("sigmoid", [])]:
        kernel = getattr(sigmoid if kind == "sigmoid" else contrastive, f"{WHAT[kind]}_kernel")
        tile = tile_of(capability, "tile", kind=kind, aligned=aligned)
        found = usage(kernel, capability, tile, pointers, absent, aligned)
        asm = found.pop("asm")
        assert found["spills"] == 0, (kind, absent, found)
        assert found["shared"] <= LIMIT[capability], (kind, absent, found)
        if not aligned:
            continue
        if name != "int8":
            on_tensor_cores = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}[capability]
            assert on_tensor_cores in asm["ptx"]
        if capability == 90:  # two programs share a multiprocessor, and the gradient is stored 16 bytes at once
            assert tile.warps == 8 and found["registers"] <= 128 and found["shared"] <= 113 << 10, (kind, absent, found)
            if kind == "grad" or (kind == "sigmoid" and not absent):
                assert "st.global.v4.b32" in asm["ptx"]


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_kernels_whose_programs_stay_compile_for_a_gpu_that_is_not_here(name, usage):
    from lift_fast.kernels import persistent

    for kind, kernel in [("stats", persistent.scores_stats_kernel), ("grad", persistent.scores_grad_kernel)]:
        tile = tile_of(90, "tile", kind=kind, aligned=True)
        found = usage(kernel, 90, tile, dict.fromkeys(("x", "t", "out"), HALF[name]))
        ptx = found.pop("asm")["ptx"]
        # Two programs share a multiprocessor, as in contrastive.py.
        assert tile.warps == 8 and found["registers"] <= 128 and found["shared"] <= 113 << 10, (kind, found)
        assert found["spills"] == 0, (kind, found)
        # Features are loaded, and gradients stored, by tensor descriptors only; a thread writes 16 bytes at once.
        assert "wgmma.mma_async" in ptx
        assert "cp.async.bulk.tensor.2d.shared" in ptx and "cp.async.ca" not in ptx and "cp.async.cg" not in ptx
        assert ("cp.async.bulk.tensor.2d.global.shared" in ptx) == ("stmatrix" in ptx) == (kind == "grad")


def test_the_smallest_shared_memory_of_a_table_is_enough(usage):
    """12.0 has the tiles of 8.0, and 99 KB."""
    from lift_fast.kernels import contrastive

    pointers = dict.fromkeys(("x", "t"), torch.bfloat16)
    tile = tile_of(120, "tile", kind="keep", aligned=True)
    assert usage(contrastive.scores_stats_kernel, 80, tile, pointers)["shared"] <= LIMIT[120]


@pytest.mark.parametrize("aligned", [True, False], ids=["even", "odd"])
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_kernels_over_scores_compile_for_gpus_that_are_not_here(capability, aligned, usage):
    from lift_fast.kernels import contrastive, pairs, sigmoid

    for kernel, out, absent in [
        (contrastive.stats_kernel, torch.float32, []),
        (contrastive.grad_kernel, torch.bfloat16, []),
        (contrastive.grad_kernel, torch.float32, []),
        (contrastive.positives_kernel, torch.float32, []),
        (sigmoid.sigmoid_kernel, torch.bfloat16, []),
        (sigmoid.sigmoid_kernel, torch.float32, ["out"]),
        (pairs.terms_kernel, torch.float32, []),
        (pairs.merge_softmax_kernel, torch.float32, []),
        (pairs.merge_sums_kernel, torch.float32, []),
    ]:
        tile = tile_of(capability, "stored") if "ROWS" in kernel.arg_names else pairs.TileConfig(0, 0, 0, 4, 3)
        found = usage(kernel, capability, tile, {"out": out}, absent, aligned)
        found.pop("asm")
        assert found["spills"] == 0, (kernel.fn.__name__, found)
        if aligned:  # the usual case; at least two programs of 256 threads
            assert found["registers"] <= 128, (kernel.fn.__name__, found)


def test_a_kernel_is_compiled_once_for_all_sizes():
    pytest.importorskip("triton")
    from lift_fast.kernels import contrastive, pairs, persistent, sigmoid

    for module in (contrastive, pairs, persistent, sigmoid):
        for name in dir(module):
            if name.endswith("_kernel"):
                numbers = [
                    param
                    for param in getattr(module, name).params
                    if not param.is_constexpr and not param.do_not_specialize
                ]
                pointers = "x t p q a row col row_terms col_terms row_parts col_parts parts positive positive_g".split()
                pointers += ["keep", "out", "scale", "bias", "factor", "first", "second", "third"]
                assert {param.name for param in numbers} <= set(pointers), name


@pytest.mark.gpu
@pytest.mark.parametrize(("form", "dtype", "int8"), CASES, indirect=["form"])
@pytest.mark.parametrize("shape", [*SHAPES, (520, 1100, 256), (512, 1024, 128), (300, 700, 1024)])
def test_the_backend_on_a_gpu(shape, form, dtype, int8):
    if triton_pairs.why_not():
        pytest.skip(triton_pairs.why_not())
    check(score_tile(*shape, dtype, int8, device="cuda"), keep=True)
    check(score_tile(*shape, dtype, int8, scaled=False, offset=-3, device="cuda"), narrow=True)
    if min(shape) > 2:
        check(score_tile(*shape, dtype, int8, device="cuda", scale=100.0), parts=2, keep=True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_programs_that_stay_on_a_gpu(dtype):
    """Each with several tiles."""
    if triton_pairs.why_not():
        pytest.skip(triton_pairs.why_not())
    with settings(form="persistent", fused_up_to=1 << 30):
        check(score_tile(2900, 3100, 80, dtype, offset=150, device="cuda"))


@pytest.mark.gpu
def test_nan_on_a_gpu(form):
    check_nan("cuda")


@pytest.mark.gpu
def test_tf32_does_not_reach_float32():
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        check(score_tile(200, 300, 256, device="cuda", scale=100.0), keep=True)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.gpu
def test_the_host_does_not_wait_for_a_gpu(form):
    b = score_tile(300, 400, 64, torch.bfloat16, device="cuda")
    row, col, positive = state(300, b.x)[0], state(400, b.x)[0], torch.empty(300, device="cuda")
    d_image, d_text = torch.empty(300, 64, device="cuda"), torch.zeros(400, 64, device="cuda")
    triton_pairs._addmm_widens()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        triton_pairs.stats(b, row, col, positive, None)
        triton_pairs.grads(
            b, SoftmaxGradient(row[:2], col[:2], 0.5, 0.5, positive), 1.0, None, FeatureGradients(d_image, d_text)
        )
        triton_pairs.sigmoid(b, 0.5, SigmoidSums(positive, row[0], row[1]), FeatureGradients(d_image, d_text))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_the_same_bits_every_time(form):
    b = score_tile(520, 1100, 256, torch.bfloat16, device="cuda")
    states = []
    for _ in range(2):
        row, col = state(520, b.x)[0], state(1100, b.x)[0]
        triton_pairs.stats(b, row, col, torch.empty(520, device="cuda"), None)
        states.append(torch.cat([row, col], dim=1))
    assert torch.equal(*states)
