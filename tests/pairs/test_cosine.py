import pytest
import torch

from lift_fast.cache import encode
from lift_fast.losses import CosineLoss
from lift_fast.ops.pairs.cosine import cosine, reference
from lift_fast.ops.rows.quantized import QuantizedRows


@pytest.mark.parametrize(("rows", "dim"), [(1, 1), (7, 5), (129, 384)])
def test_value_and_gradient(rows, dim):
    torch.manual_seed(rows)
    image = torch.randn(rows, dim, requires_grad=True)
    text = 100 * torch.randn(rows, dim)
    a, b = image.double(), text.double()
    right = -((a * b).sum(dim=1) / (a.norm(dim=1) * b.norm(dim=1))).mean()
    ours = cosine(image, text)
    assert ours.item() == pytest.approx(right.item(), abs=1e-6)
    got, want = torch.autograd.grad(ours, image)[0], torch.autograd.grad(right, image)[0]
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-4)


def test_gradcheck():
    a, b = (torch.randn(4, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(cosine, (a, b))


def test_quantized_and_module():
    torch.manual_seed(0)
    image, text = torch.randn(5, 16), torch.randn(5, 16)
    rows = encode(text, "int8")
    image.requires_grad_()
    loss, widened = CosineLoss()(image, rows, 3.0), cosine(image, rows.widen(torch.float32))
    assert loss.item() == pytest.approx(widened.item(), abs=1e-6)
    torch.testing.assert_close(*(torch.autograd.grad(one, image)[0] for one in (loss, widened)))
    assert CosineLoss()(text, text).item() == pytest.approx(-1, abs=1e-6)


def test_zero_rows_and_large_entries():
    torch.manual_seed(0)
    image, text = torch.randn(6, 8), 1e4 * torch.randn(6, 8)
    image[1], text[2] = 0, 0
    inputs = image.requires_grad_(), text.requires_grad_()
    got, want = cosine(*inputs), reference(image.double(), text.double())
    assert got.item() == pytest.approx(want.item(), abs=1e-6)
    for d, right in zip(torch.autograd.grad(got, inputs), torch.autograd.grad(want, inputs), strict=True):
        torch.testing.assert_close(d, right, rtol=1e-4, atol=1e-6)


def test_compiles_as_one_graph_and_computes_in_float32_under_autocast():
    torch.manual_seed(0)
    image, text = torch.randn(6, 8), encode(torch.randn(6, 8), "int8")

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(image, codes, scales):
        return cosine(image, QuantizedRows(codes, scales, "int8", 8))

    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert cosine(image, text).dtype == torch.float32
        torch.testing.assert_close(step(image, text.codes, text.scales), cosine(image, text))


def test_nan_does_not_become_a_number():
    image = torch.randn(4, 3)
    image[1, 1] = torch.nan
    assert cosine(image, torch.randn(4, 3)).isnan()


def test_shapes_that_do_not_match_are_refused():
    with pytest.raises(ValueError, match="rows"):
        cosine(torch.zeros(3, 4), torch.zeros(2, 4))
