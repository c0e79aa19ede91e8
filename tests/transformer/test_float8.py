"""The products of linear layers in float8: the rounding that float8.py documents, and its effect on training."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from lift_fast.nn import Vit, VitConfig
from lift_fast.ops.transformer import float8, linear

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
CPU = torch.device("cpu")
needs_float8 = pytest.mark.skipif(float8.why_not(CPU) is not None, reason="this torch multiplies no float8 on CPUs")
pytestmark = pytest.mark.threads(1)  # the products here are too small for more


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.double() - want).norm() / want.norm()).item()


def rounded(x: torch.Tensor, kind: torch.dtype) -> torch.Tensor:
    """The definition: float64 x rounded to float8, scaled by the largest power of two at which its maximum fits."""
    largest, scale = x.double().abs().max().item(), 1.0
    while largest * scale > torch.finfo(kind).max:
        scale /= 2
    while 0 < largest * scale * 2 <= torch.finfo(kind).max:
        scale *= 2
    return (x.double() * scale).to(kind).double() / scale


def operands(rows: int, width: int, out: int, dtype=torch.bfloat16, device="cpu", scale=1.0):
    """x [rows, width], weight [out, width], bias [out], g [rows, out]."""
    x, weight = torch.randn(rows, width), torch.randn(out, width) * width**-0.5
    return [(t * scale).to(device, dtype) for t in (x, weight, torch.randn(out), torch.randn(rows, out))]


@needs_float8
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 3e-3), (torch.float16, 4e-4), (torch.float32, 1e-6)])
@pytest.mark.parametrize("rows, width, out", [(1, 16, 16), (37, 64, 16), (64, 32, 144), (50, 80, 240)])
def test_products_round_once_and_sum_in_float32(rows, width, out, dtype, tolerance):
    x, weight, bias, g = operands(rows, width, out, dtype)
    x8, w8, g8 = rounded(x, E4M3), rounded(weight, E4M3), rounded(g, E5M2)
    got = float8.product(x, weight, bias)
    assert got.dtype == dtype and got.is_contiguous()
    assert error(got, x8 @ w8.T + bias.double()) < tolerance
    assert error(float8.product(x, weight, None), x8 @ w8.T) < tolerance
    assert error(float8.input_product(g, weight), g8 @ w8) < tolerance
    assert error(float8.weight_product(g, x), g8.T @ x8) < tolerance


@needs_float8
@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e3, 1e25])
def test_products_are_near_the_plain_ones_at_any_scale(scale):
    x, weight, bias, g = operands(96, 128, 64, torch.float32)
    x, g = x * scale, g / scale
    assert error(float8.product(x, weight, None), x.double() @ weight.double().T) < 0.045
    assert error(float8.input_product(g, weight), g.double() @ weight.double()) < 0.07
    assert error(float8.weight_product(g, x), g.double().T @ x.double()) < 0.07


@needs_float8
def test_an_outlier_costs_the_others_little():
    """e4m3 spans 2^-9 to 448: next to an element 1 000 times as large, other elements keep most of their bits."""
    x, weight, *_ = operands(64, 64, 64)
    x[3, 5] = 1000 * x.abs().max()
    want = x.double() @ weight.double().T
    others = torch.arange(64) != 3
    assert error(float8.product(x, weight, None)[others], want[others]) < 0.15


@needs_float8
def test_zeros_and_what_is_not_finite():
    x, weight, bias, g = operands(32, 48, 64)
    assert torch.equal(float8.product(torch.zeros_like(x), weight, bias), bias.expand(32, 64))
    assert torch.equal(float8.product(x, torch.zeros_like(weight), bias), bias.expand(32, 64))
    assert float8.weight_product(torch.zeros_like(g), x).eq(0).all()
    for bad in (torch.nan, torch.inf, -torch.inf):
        for position in (0, 7):
            y, h = x.clone(), g.clone()
            y[position, 3], h[position, 3] = bad, bad
            for result in (
                float8.product(y, weight, bias),
                float8.input_product(h, weight),
                float8.weight_product(h, x),
                float8.weight_product(g, y),
            ):
                assert result.isnan().all()


@needs_float8
def test_what_does_not_fit_is_multiplied_as_it_is():
    x, weight, bias, g = operands(32, 40, 24)
    assert torch.equal(float8.product(x, weight, bias), F.linear(x, weight, bias))
    assert torch.equal(float8.input_product(g, weight), g @ weight)
    assert torch.equal(float8.weight_product(g, x), g.T @ x)
    x, weight, bias, g = (t.double() for t in operands(32, 32, 16))
    assert torch.equal(float8.product(x, weight, bias), F.linear(x, weight, bias))
    assert torch.equal(float8.weight_product(g, x), g.T @ x)
    x, weight, bias, g = operands(0, 32, 16)
    assert float8.product(x, weight, bias).shape == (0, 16)
    assert float8.input_product(g, weight).shape == (0, 32)
    assert torch.equal(float8.weight_product(g, x), torch.zeros(16, 32, dtype=x.dtype))


@needs_float8
def test_counts_as_many_flops_as_the_plain_products():
    x, weight, bias, g = operands(48, 64, 32)

    def count(fp8: bool) -> int:
        with FlopCounterMode(display=False) as counter:
            linear.product(x, weight, bias, fp8)
            linear.input_product(g, weight, fp8)
            linear.weight_product(g, x, fp8)
        return counter.get_total_flops()

    assert count(True) == count(False) == 3 * 2 * 48 * 64 * 32


@needs_float8
def test_the_first_matrix_goes_by_rows_and_the_second_by_columns(monkeypatch):
    """Operands are as cuBLASLt needs them, though the CPU's kernel takes more; fast sums are in the forward only."""
    seen, multiply = [], torch._scaled_mm

    def scaled_mm(a, b, scale_a, scale_b, bias=None, **options):
        assert a.is_contiguous() and b.T.is_contiguous()
        assert a.shape[1] % 16 == 0 and b.shape[1] % 16 == 0
        assert scale_a.shape == scale_b.shape == () and scale_a.dtype == scale_b.dtype == torch.float32
        assert bias is None or options["out_dtype"] != torch.float32
        seen.append((a.dtype, b.dtype, options["use_fast_accum"]))
        return multiply(a, b, scale_a, scale_b, bias, **options)

    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    for dtype in (torch.bfloat16, torch.float32):
        x, weight, bias, g = operands(37, 64, 48, dtype)
        float8.product(x, weight, bias)
        float8.input_product(g, weight)
        float8.weight_product(g, x)
    assert seen == 2 * [(E4M3, E4M3, True), (E5M2, E4M3, False), (E5M2, E4M3, False)]


def test_runs_without_data():
    """The host reads no value: meta tensors have none."""
    x, weight, bias, g = operands(48, 64, 32, device="meta")
    assert float8.product(x, weight, bias).shape == (48, 32)
    assert float8.input_product(g, weight).shape == (48, 64)
    assert float8.weight_product(g, x).shape == (32, 64)


def test_why_not(monkeypatch):
    assert "does not multiply" in float8.why_not(torch.device("meta"))
    gpu = torch.device("cuda")
    for capability, serves in (((8, 0), False), ((8, 6), False), ((8, 9), True), ((9, 0), True), ((12, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert (float8.why_not(gpu) is None) == serves


def step(vit, pixels) -> tuple[torch.Tensor, torch.Tensor]:
    """Features, and the gradients of the blocks' weights in one vector."""
    vit.zero_grad()
    with torch.autocast(pixels.device.type, torch.bfloat16):
        features = vit(pixels)
    features.float().square().sum().backward()
    return features.detach(), torch.cat([p.grad.flatten() for p in vit.transformer.parameters()])


@needs_float8
@pytest.mark.parametrize("checkpointing", ["none", "block"])
def test_a_tower_multiplies_in_float8(checkpointing):
    vit = Vit(VitConfig(24, 8, 64, 2, 2, mlp_dim=128))
    vit.transformer.checkpointing = checkpointing
    pixels = torch.randn(6, 3, 24, 24)
    features, gradients = step(vit, pixels)
    vit.transformer.fp8 = True
    features8, gradients8 = step(vit, pixels)
    assert 1e-3 < error(features8, features.double()) < 0.08
    assert 1e-2 < error(gradients8, gradients.double()) < 0.2


@needs_float8
def test_compiles_whole():
    vit = Vit(VitConfig(16, 8, 32, 2, 2, mlp_dim=128))
    pixels = torch.randn(4, 3, 16, 16)
    compiled = torch.compile(vit, fullgraph=True, backend="aot_eager")
    distances = []
    for fp8 in (False, True):
        vit.transformer.fp8 = fp8
        for got, want in zip(step(compiled, pixels), step(vit, pixels), strict=True):
            distances.append(error(got, want.double()))
    assert max(distances) < 0.06  # autocast casts at other places, and a step of float8 is 6 %


@needs_float8
def test_the_loss_falls_as_in_bfloat16():
    """60 steps of a toy tower that classifies 8 patterns in noise: the curves differ by less than 0.01 on average."""

    def curve(fp8: bool) -> torch.Tensor:
        torch.manual_seed(0)
        vit, head = Vit(VitConfig(16, 8, 64, 2, 2)), torch.nn.Linear(64, 8)
        vit.transformer.fp8 = fp8
        patterns, losses = torch.randn(8, 3, 16, 16), []
        optimizer = torch.optim.AdamW([*vit.parameters(), *head.parameters()], lr=1e-3)
        for _ in range(60):
            labels = torch.randint(8, (32,))
            pixels = 0.5 * patterns[labels] + torch.randn(32, 3, 16, 16)
            with torch.autocast("cpu", torch.bfloat16):
                logits = head(vit(pixels))
            loss = F.cross_entropy(logits.float(), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return torch.tensor(losses)

    plain, fp8 = curve(False), curve(True)
    assert plain[-10:].mean() < plain[:10].mean() / 3
    assert 0 < (fp8 - plain).abs().mean() < 0.01


@pytest.mark.gpu
@pytest.mark.parametrize("rows, width, out", [(16, 16, 16), (257 * 3, 768, 3072), (50, 1152, 4304)])
def test_a_gpu_rounds_as_a_cpu(rows, width, out):
    if reason := float8.why_not(torch.device("cuda")):
        pytest.skip(reason)
    x, weight, bias, g = operands(rows, width, out, device="cuda")
    x8, w8, g8 = rounded(x, E4M3), rounded(weight, E4M3), rounded(g, E5M2)
    assert error(float8.product(x, weight, bias), x8 @ w8.T + bias.double()) < 1e-2
    assert error(float8.input_product(g, weight), g8 @ w8) < 3e-3
    assert error(float8.weight_product(g, x), g8.T @ x8) < 3e-3
