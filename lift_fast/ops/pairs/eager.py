"""The "torch" backend of the pair losses: plain torch, any device, any floating dtype, a few temporaries per tile.

Matrices are multiplied in float32, or on a GPU in the features' dtype with float32 sums.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .contract import FeatureGradients, ScoreTile, SigmoidSums, SoftmaxGradient, exact_float32

HALF = (torch.bfloat16, torch.float16)
WIDENED = 1 << 20  # elements of a 16-bit or int8 operand that are widened at a time


def why_not() -> str | None:
    return None


def operand(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t.to(dtype) if t.is_cuda else t


def allocate(rows: int, cols: int, like: Tensor) -> Tensor:
    return like.new_empty(rows, cols)


def stats(scores: ScoreTile, row: Tensor, col: Tensor, positive: Tensor, keep: Tensor | None) -> None:
    raw = _products(scores)
    if keep is not None:
        keep.copy_(raw)
    c = _scaled(raw, scores)
    z = torch.addcmul(scores.bias, c, scores.scale)
    i, j = _positives(scores)
    positive[i] = c[i, j]
    z[i, j] = -torch.inf
    c[i, j] = 0
    _merge(row, z, c, 1)
    _merge(col, z, c, 0)


def positives(row: Tensor, col: Tensor, positive: Tensor, scale: Tensor, bias: Tensor, weight: float) -> Tensor:
    z = torch.addcmul(bias, positive, scale)
    before, negatives, w = _with_least_sum(torch.stack([row, col], dim=1))  # each [2, n]: of the rows, of the columns
    m = torch.maximum(before, z)
    shrink = (before - m).exp()
    negatives = negatives * shrink
    # From the negatives' sums alone: once the model has learned, they are far smaller than the rounding of p = 1.
    loss = (m - z) + torch.log1p(negatives + torch.expm1(z - m))
    total = negatives + (z - m).exp()
    d_scale = (w * shrink - negatives * positive) / total
    g = -weight * (negatives / total)
    return torch.cat(
        [loss.mean(0, True), d_scale.mean(0, True), g, g.sum(0, True), torch.stack([m, total], dim=1).flatten(0, 1)]
    )


def with_positives(state: Tensor, z: Tensor) -> Tensor:
    """(m, l) [2, n] over all pairs, l ≥ 1, from the negatives' (m, l, w) [3, n] and the positives' scores z [n]."""
    before, negatives, _ = _with_least_sum(state)
    m = torch.maximum(before, z)
    return torch.stack([m, negatives * (before - m).exp() + (z - m).exp()])


def _with_least_sum(state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(m, l, w) with m lowered until l ≥ 1: a backend's m may lie above the maximum. l = 0 if there is no negative."""
    m, total, w = state
    low = (total > 0) & (total < 1)
    lower = torch.where(low, m + total.log(), m)
    grow = torch.where(low, (m - lower).exp(), 1)
    return lower, total * grow, w * grow


def grads(scores: ScoreTile, g: SoftmaxGradient, alpha: float, kept: Tensor | None, out: FeatureGradients) -> None:
    raw = _products(scores) if kept is None else kept.clone()
    z = torch.addcmul(scores.bias, _scaled(raw, scores), scores.scale)
    matrix = torch.zeros_like(z)
    if g.row_weight:
        matrix += (z - g.row[0][:, None]).exp_().mul_((g.row_weight / g.row[1])[:, None])
    if g.col_weight:
        matrix += z.sub_(g.col[0]).exp_().mul_(g.col_weight / g.col[1])
    i, j = _positives(scores)
    matrix[i, j] = g.positive[i]
    _features(scores, matrix, alpha, out)


def sigmoid(scores: ScoreTile, alpha: float, sums: SigmoidSums, out: FeatureGradients) -> None:
    c = _scaled(_products(scores), scores)
    z = torch.addcmul(scores.bias, c, scores.scale)
    i, j = _positives(scores)
    z[i, j] *= -1  # −y z
    sums.loss.sub_(F.logsigmoid(-z).sum(dim=1))
    g = z.sigmoid_()
    g[i, j] *= -1
    sums.d_scale.add_(alpha * (g * c).sum(dim=1))
    sums.d_bias.add_(alpha * g.sum(dim=1))
    _features(scores, g, alpha, out)


def _positives(scores: ScoreTile) -> tuple[Tensor, Tensor]:
    """Rows and columns of the positives in the tile."""
    first = max(0, -scores.offset)
    i = torch.arange(first, max(first, min(len(scores.x), len(scores.t) - scores.offset)), device=scores.x.device)
    return i, i + scores.offset


def _products(scores: ScoreTile) -> Tensor:
    """x · tᵀ"""
    return _product(scores.x, scores.t.T, scores.x.dtype)


def _scaled(raw: Tensor, scores: ScoreTile) -> Tensor:
    """c from the products, in place."""
    if scores.a is not None:
        raw *= scores.a[:, None]
    return raw if scores.q is None else raw.mul_(scores.q)


def _merge(state: Tensor, z: Tensor, c: Tensor, dim: int) -> None:
    """Merges z and c, reduced over dim, into (m, l, w)."""
    m = torch.maximum(state[0], z.amax(dim))
    finite = m.masked_fill(m == -torch.inf, 0)  # −inf − −inf is NaN; with any finite m the sums stay 0
    e = (z - finite.unsqueeze(dim)).exp_()
    state[1:] *= (state[0] - finite).exp()
    state[1] += e.sum(dim)
    state[2] += e.mul_(c).sum(dim)
    state[0] = m


def _features(scores: ScoreTile, g: Tensor, alpha: float, out: FeatureGradients) -> None:
    """The features' gradients from g, which is overwritten."""
    dtype = scores.x.dtype
    up = 1024.0 if dtype == torch.float16 else 1.0  # 1 / rows is subnormal in float16
    factor = scores.scale * (alpha / up)
    if out.text is not None:
        left = g * up if scores.a is None else g * (scores.a * up)[:, None]
        d = _product(left.T, scores.x, dtype).mul_(factor)
        out.text.add_(d if scores.q is None else d.mul_(scores.q[:, None]))
    if out.image is not None:
        g.mul_(up) if scores.q is None else g.mul_(scores.q * up)
        d = _product(g, scores.t, dtype).mul_(factor)
        out.image.copy_(d if scores.a is None else d.mul_(scores.a[:, None]))


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b for features of dtype, summed and returned in float32 (float64 for float64)."""
    if a.is_cuda and dtype in HALF:
        return torch.mm(a.to(dtype), b.to(dtype), out_dtype=torch.float32)
    wide = dtype if dtype == torch.float64 else torch.float32
    if a.is_cuda:
        with exact_float32():
            return a.to(wide) @ b.to(wide)
    if a.dtype == b.dtype == wide:
        return a @ b
    out = torch.empty(a.shape[0], b.shape[1], dtype=wide, device=a.device)
    a = a.to(wide)
    step = max(1, WIDENED // max(1, b.shape[0]))
    for start in range(0, b.shape[1], step):
        torch.mm(a, b[:, start : start + step].to(wide), out=out[:, start : start + step])
    return out
