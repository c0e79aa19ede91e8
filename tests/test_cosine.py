import pytest
import torch

from lift_fast.cache import encode_int8
from lift_fast.losses import CosineLoss
from lift_fast.ops.cosine import cosine


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
    rows = encode_int8(text)
    assert CosineLoss()(image, rows, 3.0).item() == cosine(image, rows.widen(torch.float32)).item()
    assert CosineLoss()(text, text).item() == pytest.approx(-1, abs=1e-6)


def test_shapes_that_do_not_match_are_refused():
    with pytest.raises(ValueError, match="rows"):
        cosine(torch.zeros(3, 4), torch.zeros(2, 4))
