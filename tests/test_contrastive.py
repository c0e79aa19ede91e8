"""`contrastive` against a hand-written definition in float64."""

import pytest
import torch

from lift_fast.cache import encode_int8
from lift_fast.losses import ClipLoss
from lift_fast.ops.contrastive import contrastive, reference


def by_hand(image, text, scale, bias=0.0):
    image, text = image.double(), text.double()
    image, text = image / image.norm(dim=1, keepdim=True), text / text.norm(dim=1, keepdim=True)
    z = scale * image @ text.T + bias
    rows = torch.logsumexp(z, dim=1) - z.diagonal()
    columns = torch.logsumexp(z, dim=0) - z.diagonal()
    return (rows.mean() + columns.mean()) / 2


@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
@pytest.mark.parametrize(("rows", "dim"), [(1, 1), (2, 3), (127, 100), (129, 384)])
def test_value_and_gradients(rows, dim, scale):
    torch.manual_seed(rows + dim)
    image, text = (torch.randn(rows, dim).requires_grad_() for _ in range(2))
    log_scale = torch.tensor(scale).log().requires_grad_()
    ours = contrastive(image, text, log_scale.exp())
    got = torch.autograd.grad(ours, (image, text, log_scale))
    right = by_hand(image, text, log_scale.double().exp())
    want = torch.autograd.grad(right, (image, text, log_scale))
    assert abs(ours.item() - right.item()) <= 1e-5 * max(1, abs(right.item()))
    for g, w in zip(got, want, strict=True):
        assert (g.double() - w.double()).norm() <= 5e-5 * w.double().norm() + 1e-6


def test_gradcheck():
    torch.manual_seed(0)
    image, text = (torch.randn(5, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    scale = torch.tensor(14.3, dtype=torch.float64, requires_grad=True)
    bias = torch.tensor(-0.7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(contrastive, (image, text, scale, bias))


def test_logits_are_float32_under_autocast():
    torch.manual_seed(0)
    image = torch.randn(64, 128).bfloat16()
    text = (image.float() + 0.1 * torch.randn(64, 128)).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = contrastive(image, text, 100.0)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(by_hand(image, text, 100.0).item(), abs=1e-5)


def test_quantized_text_is_its_widened_text():
    torch.manual_seed(0)
    image = torch.randn(9, 33, requires_grad=True)
    text = encode_int8(torch.nn.functional.normalize(torch.randn(9, 33), dim=1))
    loss = ClipLoss()(image, text, torch.tensor(20.0))
    dense = contrastive(image, text.widen(torch.float32), 20.0)
    assert loss.item() == dense.item()
    torch.testing.assert_close(*(torch.autograd.grad(x, image)[0] for x in (loss, dense)))


def test_non_contiguous_and_scaled_rows():
    torch.manual_seed(0)
    image, text = torch.randn(8, 10).T, 1e4 * torch.randn(8, 20)[:, ::2].T
    assert contrastive(image, text, 7.0).item() == pytest.approx(by_hand(image, text, 7.0).item(), rel=1e-5)


def test_nan_does_not_become_a_number():
    image, text = torch.randn(4, 3), torch.randn(4, 3)
    image[1, 1] = torch.nan
    assert contrastive(image, text, 10.0).isnan()


@pytest.mark.parametrize("shapes", [((3, 4), (4, 4)), ((3, 4), (3, 5)), ((0, 4), (0, 4)), ((4,), (4,))])
def test_shapes_that_do_not_match_are_refused(shapes):
    with pytest.raises(ValueError, match="rows"):
        contrastive(torch.zeros(shapes[0]), torch.zeros(shapes[1]), 1.0)


def test_reference_is_float64_able():
    assert reference(torch.eye(3, dtype=torch.float64), torch.eye(3, dtype=torch.float64), 2.0).dtype == torch.float64
