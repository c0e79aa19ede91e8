"""`contrastive` and `sigmoid` against their definitions, by hand and in float64, on every available backend."""

from typing import Any, NamedTuple

import pytest
import torch
from support.pair_cases import (
    BACKENDS,
    DEVICES,
    GPU_BACKENDS,
    PLACES,
    SCALES,
    SHAPES,
    Spy,
    check_by_hand,
    check_gradient,
    check_loss,
    check_no_waiting,
    loss_inputs,
    many_rows,
    skip_without,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from lift_fast.cache import encode
from lift_fast.errors import BackendError
from lift_fast.ops import tuned
from lift_fast.ops.pairs import contrastive as contrastive_op
from lift_fast.ops.pairs import policy
from lift_fast.ops.pairs import sigmoid as sigmoid_op
from lift_fast.ops.pairs.contrastive import contrastive
from lift_fast.ops.pairs.sigmoid import sigmoid
from lift_fast.ops.rows.quantized import QuantizedRows


class Loss(NamedTuple):
    name: str
    op: Any
    reference: Any


@pytest.fixture(params=[contrastive_op, sigmoid_op], ids=["contrastive", "sigmoid"])
def loss(request):
    name = request.param.__name__.rpartition(".")[2]
    return Loss(name, getattr(request.param, name), request.param.reference)


@pytest.mark.parametrize(("device", "backend"), PLACES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(("rows", "dim"), SHAPES)
def test_value_and_gradients(loss, rows, dim, scale, dtype, device, backend):
    check_by_hand(loss.op, rows, dim, dtype, scale, backend, device=device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("device", "backend", "rows", "dim"), many_rows())
def test_many_rows(device, backend, rows, dim, dtype):
    for scale in SCALES:
        check_by_hand(contrastive, rows, dim, dtype, scale, backend, trained=dim < 4096, device=device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("device", "backend", "rows", "dim"), many_rows(pytest.mark.soak))
def test_many_rows_of_sigmoid(device, backend, rows, dim, dtype):
    for scale in SCALES:
        check_by_hand(sigmoid, rows, dim, dtype, scale, backend, trained=dim < 4096, device=device)


@pytest.mark.parametrize(("device", "backend"), PLACES)
@pytest.mark.parametrize("scale", SCALES)
def test_normalize(loss, scale, device, backend):
    skip_without(backend)
    torch.manual_seed(0)
    image, text = torch.exp(torch.randn(129, 1)) * torch.randn(129, 100), 30 * torch.randn(129, 100)
    got, want = loss_inputs(image, text, scale, 0.3, device), loss_inputs(image.double(), text.double(), scale, 0.3)
    value, right = loss.op(*got, normalize=True, backend=backend), loss.reference(*want, normalize=True)
    check_loss(value, right)
    for x, d, d_right in zip(got, torch.autograd.grad(value, got), torch.autograd.grad(right, want), strict=True):
        check_gradient(d, d_right, x.dtype)


@pytest.mark.parametrize("normalize", [False, True])
def test_gradcheck(loss, normalize):
    torch.manual_seed(0)
    image, text = (torch.randn(5, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    scale = torch.tensor([1.9], dtype=torch.float64, requires_grad=True)
    bias = torch.tensor(-0.7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *args: loss.op(*args, normalize=normalize), (image, text, scale, bias))


def test_a_second_derivative_is_refused(loss):
    image, text = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4)
    (d_image,) = torch.autograd.grad(loss.op(image, text, 2.0), image, create_graph=True)
    with pytest.raises(RuntimeError, match="once only"):
        d_image.square().sum().backward()


@pytest.mark.parametrize(("device", "backend"), PLACES)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("what", ["duplicates", "zero rows", "large", "large ties", "strided", "one dim"])
def test_unusual_features(loss, what, normalize, device, backend):
    skip_without(backend)
    torch.manual_seed(0)
    image, text = torch.randn(40, 24), torch.randn(40, 24)
    if what == "duplicates":
        image[:], text[1::2] = image[0], text[::2].clone()
    elif what == "zero rows":
        image[3], text[5] = 0, 0
    elif what == "large":
        image, text = (2e4 * torch.rand(40, 24) - 1e4 for _ in range(2))
    elif what == "large ties":  # logits of 1e10, of which several are the largest
        image, text = (1e4 * torch.randn(40, 24).sign() for _ in range(2))
        text[1::2] = text[::2].clone()
    elif what == "strided":
        image, text = torch.randn(24, 40).to(device).T, torch.randn(40, 48).to(device)[:, ::2]
    else:
        image, text = (x[:, :1] + x[:, :1].sign() for x in (image, text))
    bias = 0.0 if what.startswith("large") else -0.7
    got, want = (
        loss_inputs(image, text, 3.0, bias, device),
        loss_inputs(image.double(), text.double(), 3.0, bias, "cpu"),
    )
    if what == "strided":
        got[:2] = [x.requires_grad_() for x in (image, text)]
    value, right = loss.op(*got, normalize=normalize, backend=backend), loss.reference(*want, normalize=normalize)
    check_loss(value, right)
    for d, d_right in zip(torch.autograd.grad(value, got), torch.autograd.grad(right, want), strict=True):
        assert d.isfinite().all()
        check_gradient(d, d_right)


@pytest.mark.parametrize(("device", "backend"), PLACES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("where", ["image", "text", "scale"])
def test_nan_does_not_become_a_number(loss, where, dtype, device, backend):
    skip_without(backend)
    image, text, scale = torch.randn(33, 20).to(dtype), torch.randn(33, 20).to(dtype), torch.tensor(2.0)
    {"image": image[7], "text": text[32], "scale": scale[None]}[where][-1] = torch.nan
    image, text, scale = (x.to(device) for x in (image, text, scale))
    for normalize in (False, True):
        assert loss.op(image.requires_grad_(), text, scale, normalize=normalize, backend=backend).isnan()


@pytest.mark.parametrize(("device", "backend"), PLACES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("normalize", [False, True])
def test_int8_text_is_its_widened_text(loss, normalize, dtype, device, backend):
    skip_without(backend)
    torch.manual_seed(0)
    image, text = (F.normalize(torch.randn(257, 100), dim=1) for _ in range(2))
    image, rows = image.to(dtype), encode(text, "int8")
    got, want = (
        loss_inputs(image, text, 14.3, -0.7, device),
        loss_inputs(image.double(), rows.widen(torch.float64), 14.3, -0.7),
    )
    got[1] = rows.to(device)
    loss.op(*got, normalize=normalize, backend=backend).backward()
    loss.reference(*want, normalize=normalize).backward()
    bound = 1e-3 if dtype == torch.float32 else 5e-3  # a bfloat16 gradient alone is rounded by 2e-3
    assert (got[0].grad.double().cpu() - want[0].grad).norm() <= bound * want[0].grad.norm()
    assert (got[2].grad.cpu() - want[2].grad).abs() <= 1e-3 * want[2].grad.abs()


@pytest.mark.parametrize(("device", "backend"), PLACES)
def test_float16_keeps_what_is_small(loss, device, backend):
    """1 / rows times a probability is subnormal in float16."""
    skip_without(backend)
    torch.manual_seed(0)
    image, text = (F.normalize(torch.randn(1500, 64), dim=1).half() for _ in range(2))
    got, want = loss_inputs(image, text, 100.0, 0.0, device), loss_inputs(image.double(), text.double(), 100.0, 0.0)
    value, right = loss.op(*got, backend=backend), loss.reference(*want)
    check_loss(value, right)
    (1024 * value).backward()  # as a GradScaler would
    (1024 * right).backward()
    for x, y in zip(got[:2], want[:2], strict=True):
        assert x.grad.dtype == torch.float16
        assert (x.grad.double().cpu() - y.grad).norm() <= 2e-3 * y.grad.norm()


@pytest.mark.parametrize(("device", "backend"), PLACES)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_change_nothing(loss, dtype, normalize, device, backend):
    skip_without(backend)
    torch.manual_seed(0)
    image, text = (F.normalize(torch.randn(65, 48), dim=1).to(dtype) for _ in range(2))

    def run(step, budget):
        inputs = loss_inputs(image, text, 14.3, -0.7, device)
        with tuned.using("pairs", "chunk", {"of": "scores", "bytes": 0, "least": step, "multiple": 1}):
            value = loss.op(*inputs, normalize=normalize, budget=budget, backend=backend)
        return [value, *torch.autograd.grad(value, inputs)]

    whole = run(65, None)
    for step, budget in ((65, 0), (1, None), (7, 0), (7, 4 * 65 * 30), (64, 4 * 65 * 64)):
        for x, y in zip(run(step, budget), whole, strict=True):
            # bfloat16 gradients differ by a rounding in a few places at most.
            assert (x - y).float().norm() <= (2e-6 if x.dtype == torch.float32 else 1e-3) * y.float().norm()


def test_mixed_dtypes_meet_in_the_wider(loss):
    torch.manual_seed(0)
    image, text = torch.randn(9, 8).bfloat16().requires_grad_(), torch.randn(9, 8).half().requires_grad_()
    value = loss.op(image, text, 2.0)
    assert value.item() == loss.op(image.float(), text.float(), 2.0).item()
    value.backward()
    assert image.grad.dtype == torch.bfloat16 and text.grad.dtype == torch.float16
    assert loss.op(image.double(), encode(text.detach().float(), "int8"), 2.0).dtype == torch.float64


@pytest.mark.parametrize("device", DEVICES)
def test_autocast_multiplies_in_its_dtype_and_nothing_else(loss, device):
    torch.manual_seed(0)
    image, text = (F.normalize(torch.randn(64, 128), dim=1).to(device) for _ in range(2))
    narrow = [x.bfloat16() for x in (image, text)]
    image.requires_grad_()
    with torch.autocast(device, dtype=torch.bfloat16):
        value = loss.op(image, text, 100.0)
    assert value.dtype == torch.float32
    assert value.item() == loss.op(*narrow, 100.0).item()
    check_loss(value, loss.reference(*(x.double() for x in narrow), 100.0))
    value.backward()
    assert image.grad.dtype == torch.float32


@pytest.mark.parametrize("shapes", [((3, 4), (4, 4)), ((3, 4), (3, 5)), ((0, 4), (0, 4)), ((4,), (4,))])
def test_shapes_that_do_not_match_are_refused(loss, shapes):
    with pytest.raises(ValueError, match="rows"):
        loss.op(torch.zeros(shapes[0]), torch.zeros(shapes[1]), 1.0)


def test_what_else_is_refused(loss):
    image = torch.zeros(3, 4)
    with pytest.raises(ValueError, match="floating"):
        loss.op(image.long(), image, 1.0)
    with pytest.raises(ValueError, match="floating"):
        loss.op(image, image.to(torch.int8), 1.0)
    with pytest.raises(ValueError, match="hold one"):
        loss.op(image, image, torch.ones(2))
    with pytest.raises(BackendError, match="no pair loss backend 'cuda' for float32 on cpu"):
        loss.op(image, image, 1.0, backend="cuda")
    with pytest.raises(BackendError, match="float64"):
        loss.op(image.double(), image, 1.0, backend="cpp")


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles_as_one_graph(loss, compiler):
    torch.manual_seed(0)
    image, text = torch.randn(9, 10), torch.randn(9, 10)
    rows = encode(text, "int8")

    def step(image, text, codes, scales, log_scale):
        whole = loss.op(2 * image, text, log_scale.exp(), -1.0, normalize=True)
        return whole + loss.op(2 * image, QuantizedRows(codes, scales, "int8", 10), log_scale.exp(), torch.ones(1))

    inputs = [image.requires_grad_(), text.requires_grad_(), torch.tensor(1.2, requires_grad=True)]
    arguments = *inputs[:2], rows.codes, rows.scales, inputs[2]
    compiled = torch.compile(step, fullgraph=True, backend=compiler)
    for x, y in zip(
        torch.autograd.grad(compiled(*arguments), inputs), torch.autograd.grad(step(*arguments), inputs), strict=True
    ):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_opcheck(loss, dtype):
    torch.manual_seed(0)
    image, text = (torch.randn(6, 5).to(dtype).requires_grad_() for _ in range(2))
    scale, bias = (torch.tensor(value, requires_grad=True) for value in (2.0, -1.0))
    rows = encode(text.detach().float(), "int8")
    op = getattr(torch.ops.lift_fast, loss.name).default
    rest = (None, False, False, None, None) if loss.name == "contrastive" else (None, None)
    torch.library.opcheck(op, (image, text, None, scale, bias, True, True, True, *rest))
    torch.library.opcheck(op, (image, rows.codes, rows.scales, scale, None, False, True, False, *rest))
    nothing = image.detach(), text.detach(), None, scale, None, False, False, False
    torch.library.opcheck(op, (*nothing, *rest))


def test_fake_tensors_and_flops(loss):
    with FakeTensorMode():
        image, text = torch.empty(7, 5, requires_grad=True), torch.empty(7, 5, dtype=torch.float16)
        value = loss.op(image, text, torch.tensor(2.0))
        value.backward()
        assert (value.shape, value.dtype, image.grad.shape) == ((), torch.float32, (7, 5))
        elsewhere = torch.empty(7, 5, device="cuda")
        assert loss.op(elsewhere, elsewhere, 2.0).device.type == "cuda"
        for trained, products in ((False, 2), (True, 3)):
            text = torch.empty(7, 5, requires_grad=trained)
            with FlopCounterMode(display=False) as counter:
                loss.op(image, text, 2.0).backward()
            assert counter.get_total_flops() == products * 2 * 7 * 7 * 5


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_what_is_asked_for_is_computed(backend, monkeypatch):
    spy = Spy(monkeypatch, backend)
    image, text = (torch.randn(9, 80, requires_grad=True) for _ in range(2))
    for needs_image, needs_text in ((True, True), (True, False), (False, True), (False, False)):
        spy.calls.clear()
        scale = torch.tensor(2.0, requires_grad=True)
        a, b = image.detach().requires_grad_(needs_image), text.detach().requires_grad_(needs_text)
        contrastive(a, b, scale, backend=backend).backward()
        assert len(spy.named("grads")) == (needs_image or needs_text)
        assert all(call["keep"] is None for call in spy.named("stats")) == (not needs_image and not needs_text)
        for call in spy.named("grads"):
            assert (call["d_image"] is not None, call["d_text"] is not None) == (needs_image, needs_text)
    spy.calls.clear()
    with torch.no_grad():
        contrastive(image, text, 2.0, backend=backend)
    assert not spy.named("grads")


@pytest.mark.parametrize("backend", BACKENDS)
def test_sigmoid_computes_only_what_is_asked_for(backend, monkeypatch):
    spy = Spy(monkeypatch, backend)
    image, text = torch.randn(9, 8), torch.randn(9, 8)
    for needs_image, needs_text in ((True, True), (True, False), (False, True), (False, False)):
        spy.calls.clear()
        a, b = image.clone().requires_grad_(needs_image), text.clone().requires_grad_(needs_text)
        scale = torch.tensor(2.0, requires_grad=True)
        sigmoid(a, b, scale, backend=backend).backward()
        (call,) = spy.named("sigmoid")
        assert (call["d_image"] is not None, call["d_text"] is not None) == (needs_image, needs_text)
        assert scale.grad.isfinite()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("budget", [0, 4 * 9 * 5 + 3, None])
def test_budget_bounds_what_is_kept(budget, backend, monkeypatch):
    spy = Spy(monkeypatch, backend)
    contrastive(torch.randn(9, 80, requires_grad=True), torch.randn(9, 80), 2.0, budget=budget, backend=backend)
    kept = [call["kept"] for call in spy.named("grads")]
    rows = sum(len(one) for one in kept if one is not None)
    assert rows == {0: 0, None: 9}.get(budget, 5)


@pytest.mark.parametrize("device", ["cpu", "sm_80", "sm_90", "sm_100", "sm_120"])
@pytest.mark.parametrize(("rows", "cols"), [(100, 100), (5000, 70000), (65536, 65536)])
def test_plan_covers_the_rows_within_the_budget(device, rows, cols):
    free = 10**10
    for name in ("cpp", "torch") if device == "cpu" else ("cuda", "triton", "torch"):
        for budget in (None, 0, 10**6, 10**12):
            for itemsize in (2, 4):
                plan = policy.plan(rows, cols, 4096, itemsize, name, budget, True, device, lambda: free)
                assert [start for start, _ in plan.chunks] == [0, *(stop for _, stop in plan.chunks[:-1])]
                assert plan.chunks[-1][1] == rows
                assert all(start < stop for start, stop in plan.chunks)
                assert not any(start < plan.kept < stop for start, stop in plan.chunks)
                default = max(256 << 20, rows * cols * itemsize) if device == "cpu" else free / 2
                assert 4 * plan.kept * cols <= (default if budget is None else budget)
                assert budget != 10**12 or plan.kept == min(rows, 10**12 // (4 * cols))
                few = policy.plan(rows, cols, 16, itemsize, name, None, True, device, lambda: free)
                assert (few.kept == 0) == (name != "torch" or device != "cpu")  # dim 16 is cheap to recompute
                if name == "torch":
                    assert max(stop - start for start, stop in plan.chunks) <= max(16, (16 << 20) // (4 * cols))


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_on_a_gpu_what_memory_allows_is_kept_where_that_saves_time(backend):
    """80 GB, frozen text: at most 2.05 products of rows x cols x dim are formed, or 3.05 if scores are recomputed.

    There is one chunk of rows, or two if the scores of the first are kept.
    """
    for rows, dim, products in [(65536, 4096, 2.05), (65536, 768, 3.05), (16384, 4096, 2.05), (16384, 768, 3.05)]:
        plan = policy.plan(rows, rows, dim, 2, backend, None, True, "sm_90", lambda: 80 * 10**9)
        assert 2 + (rows - plan.kept) / rows <= products
        assert len(plan.chunks) <= 2
    full = policy.plan(65536, 65536, 4096, 2, backend, None, True, "sm_90", lambda: 0)
    assert full.kept == 0


def test_the_scales_gradient_at_zero():
    torch.manual_seed(0)
    got = loss_inputs(torch.randn(9, 8), torch.randn(9, 8), 0.0, 0.0)
    want = loss_inputs(got[0].double(), got[1].double(), 0.0, 0.0)
    contrastive(*got).backward()
    contrastive_op.reference(*want).backward()
    check_gradient(got[2].grad, want[2].grad)
    assert got[3].grad == 0


def test_gradients_are_kept_for_a_second_backward():
    image, text = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3)
    loss = contrastive(image, text, 2.0)
    first, second = (torch.autograd.grad(factor * loss, image, retain_graph=True)[0] for factor in (1, 2))
    assert torch.equal(2 * first, second)


def test_features_without_a_dimension_and_a_negative_budget_are_refused():
    with pytest.raises(ValueError, match="dim > 0"):
        contrastive(torch.zeros(8, 0), torch.zeros(8, 0), 1.0)
    with pytest.raises(ValueError, match="budget must be bytes"):
        contrastive(torch.ones(8, 4), torch.ones(8, 4), 1.0, budget=-1)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_the_host_does_not_wait_for_a_gpu(loss, backend):
    check_no_waiting(loss.op, backend)
