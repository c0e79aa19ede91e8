"""Shared by the tests of the pair losses: features, the losses by their formulas in float64, and tolerances."""

from functools import lru_cache

import pytest
import torch
from torch.nn import functional as F

from lift_fast.ops.pairs import contract as pairs
from lift_fast.ops.pairs import eager as torch_pairs

from .tensors import leaves

SHAPES = [(rows, dim) for rows in (1, 2, 127, 129) for dim in (1, 100, 768, 4096)]
LARGE = [(4097, dim) for dim in (1, 100, 768, 4096)]
SCALES = [1.0, 14.3, 100.0]
BACKENDS = pairs.backends_here()
GPU_BACKENDS = ("cuda", "triton", "torch")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# (device, backend)
PLACES = [
    *(("cpu", name) for name in BACKENDS),
    *(pytest.param("cuda", name, marks=pytest.mark.gpu) for name in GPU_BACKENDS),
]
GRADIENT = {torch.float32: 5e-5, torch.bfloat16: 5e-3}
PART = 200  # gradients are compared for this many first rows and columns


def many_rows(*marks):
    """(device, backend, rows, dim) for LARGE. A CPU runs only the default backend; marks: for its largest case."""
    cpu = [pytest.param("cpu", None, *shape, marks=marks if shape == LARGE[-1] else ()) for shape in LARGE]
    gpu = [pytest.param("cuda", name, *shape, marks=pytest.mark.gpu) for name in GPU_BACKENDS for shape in LARGE]
    return cpu + gpu


def skip_without(backend):
    if backend and isinstance(why_not := pairs.BACKENDS.load(backend), str):
        pytest.skip(why_not)


@lru_cache(maxsize=2)
def features(rows, dim, dtype=torch.float32, device="cpu"):
    """Random image and text features [rows, dim], normalized; the same for the same shape."""
    generator = torch.Generator().manual_seed(1000 * rows + dim)
    image, text = (torch.randn(rows, dim, generator=generator) for _ in range(2))
    return F.normalize(image, dim=1).to(device, dtype), F.normalize(text, dim=1).to(device, dtype)


@lru_cache(maxsize=2)
def products(rows, dim, dtype, device):
    image, text = features(rows, dim, dtype, device)
    return image.double() @ text.double().T


def by_hand(loss, rows, dim, dtype, scale, bias, device="cpu"):
    """(loss, the first PART rows of d_image and of d_text, d_scale, d_bias), by the formulas in float64."""
    image, text = (x.double() for x in features(rows, dim, dtype, device))
    c = products(rows, dim, dtype, device)
    z = scale * c + bias
    if loss == "contrastive":
        top = z.max()
        e = (z - top).exp_()
        row, col = e.sum(1, keepdim=True), e.sum(0, keepdim=True)
        value = top + (row.log().mean() + col.log().mean()) / 2 - z.diagonal().mean()
        p = [e[:PART] / row[:PART] + e[:PART] / col, e[:, :PART] / row + e[:, :PART] / col[:, :PART]]
        e *= c
        d_scale = ((e.sum(1) / row[:, 0]).mean() + (e.sum(0) / col[0]).mean()) / 2 - c.diagonal().mean()
        d_bias = torch.zeros((), device=device)
        p, positive = [one / (2 * rows) for one in p], 1 / rows
    else:
        value = -(F.logsigmoid(-z).sum() + z.diagonal().sum()) / rows
        s = z.sigmoid_() / rows
        p, positive = [s[:PART], s[:, :PART]], 1 / rows
        d_bias = s.sum() - 1
        d_scale = (s * c).sum() - c.diagonal().mean()
    positive = positive * torch.eye(min(PART, rows), rows, dtype=torch.float64, device=device)
    return value, scale * (p[0] - positive) @ text, scale * (p[1] - positive.T).T @ image, d_scale, d_bias


def loss_inputs(image, text, scale, bias, device=None):
    """Leaves of the features, scale and bias. Scale and bias are float64 if the features are, else float32."""
    wide = torch.float64 if image.dtype == torch.float64 else torch.float32
    scale, bias = (torch.tensor(value, dtype=wide, device=image.device) for value in (scale, bias))
    return leaves(image, text, scale, bias, device=device)


def check_loss(got, want):
    assert abs(got.item() - want.item()) <= 1e-5 * max(1, abs(want.item()))


def check_gradient(got, want, dtype=torch.float32):
    """Compares in relative norm, plus a floor: 1e-7 for scale and bias; else 1e-6 for a zero gradient, and 1e-12.

    The gradients of scale and bias are sums of up to rows² terms of order one, which may cancel.
    """
    floor = 1e-7 if want.dim() == 0 else 1e-6 if want.norm() < 1e-12 else 1e-12
    assert (got.to(want.device).double() - want).norm() <= GRADIENT[dtype] * want.norm() + floor


def check_by_hand(op, rows, dim, dtype, scale, backend, bias=-0.7, trained=True, device="cpu"):
    """Compares an op and its gradients with the float64 formulas. trained: whether the texts have a gradient."""
    skip_without(backend)
    inputs = loss_inputs(*features(rows, dim, dtype, device), scale, bias)
    inputs[1].requires_grad_(trained)
    loss = op(*inputs, backend=backend)
    loss.backward()
    want, *gradients = by_hand(op.__name__, rows, dim, dtype, scale, bias, device)
    check_loss(loss, want)
    for x, right in zip(inputs, gradients, strict=True):
        if x.requires_grad:
            assert x.grad.dtype == x.dtype and x.grad.device == x.device
            check_gradient(x.grad[:PART] if x.dim() else x.grad, right, x.dtype)


def check_no_waiting(op, backend):
    """Checks that neither forward nor backward syncs the host with the GPU."""
    skip_without(backend)
    inputs = loss_inputs(*features(300, 768, torch.bfloat16, "cuda"), 14.3, -0.7)
    op(*inputs, normalize=True, backend=backend).backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        op(*inputs, normalize=True, backend=backend).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Spy:
    """Records the arguments of a backend's calls, by name, and passes them on."""

    def __init__(self, monkeypatch, backend):
        self.calls = []
        self.real = pairs.BACKENDS.load(backend)
        monkeypatch.setitem(pairs.BACKENDS.loaded, backend, self)

    def __getattr__(self, name):
        return getattr(self.real, name)

    def stats(self, scores, row, col, positive, keep):
        self.calls.append(("stats", {"scores": scores, "keep": keep}))
        self.real.stats(scores, row, col, positive, keep)

    def grads(self, scores, g, alpha, kept, out):
        self.calls.append(("grads", {"scores": scores, "kept": kept, "d_image": out.image, "d_text": out.text}))
        self.real.grads(scores, g, alpha, kept, out)

    def sigmoid(self, scores, alpha, sums, out):
        self.calls.append(("sigmoid", {"scores": scores, "d_image": out.image, "d_text": out.text}))
        self.real.sigmoid(scores, alpha, sums, out)

    def named(self, name):
        return [arguments for called, arguments in self.calls if called == name]


def check_positives(backend, n, device):
    """Compares a backend's `positives` with float64: probabilities near 0 and 1, small l, no negatives, and NaN."""
    generator = torch.Generator().manual_seed(n)
    positive = torch.rand(n, generator=generator) * 2 - 1
    for spread in (1.0, 30.0):
        m = spread * torch.randn(2, n, generator=generator)
        l = torch.exp(8 * torch.randn(2, n, generator=generator))  # noqa: E741
        state = torch.stack([m, l, l * torch.randn(2, n, generator=generator)])
        state[:, 0, ::7] = torch.tensor([-torch.inf, 0.0, 0.0])[:, None]
        scale, bias = torch.tensor(14.3), torch.tensor(-0.7)
        wide = [x.double() for x in (state[:, 0], state[:, 1], positive, scale, bias)]
        want = torch_pairs.positives(*wide, 0.25)
        strided = torch.full((3, 2, n + 5), torch.nan)
        strided[:, :, 2 : n + 2] = state
        row, col = strided[:, :, 2 : n + 2].to(device).unbind(1)
        given = row, col, positive.to(device), scale.to(device), bias.to(device)
        found = backend.positives(*given, 0.25).cpu()
        assert found.shape == want.shape == (9, n)
        # A probability is exp(z − m), where z and m are float32 numbers of up to about 100.
        torch.testing.assert_close(found.double(), want, rtol=1e-4, atol=1e-6)
    positive[n // 2] = torch.nan
    found = backend.positives(row, col, positive.to(device), *given[3:], 0.25)
    assert found[:, n // 2].isnan().all() and found.isnan().sum() == 9
