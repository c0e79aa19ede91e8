"""The pair losses' blocks in plain torch: any device, any floating dtype; a few [rows, cols] temporaries a block.

Matrices are multiplied in float32, or on a GPU in the features' dtype with float32 sums.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .contract import ScoreTile, exact_float32

HALF = (torch.bfloat16, torch.float16)
TILE = 1 << 20  # elements of a narrow operand that are widened at a time


def why_not() -> str | None:
    return None


def operand(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t.to(dtype) if t.is_cuda else t


def room(rows: int, cols: int, like: Tensor) -> Tensor:
    return like.new_empty(rows, cols)


def stats(block: ScoreTile, row: Tensor, col: Tensor, own: Tensor, keep: Tensor | None) -> None:
    raw = _scores(block)
    if keep is not None:
        keep.copy_(raw)
    c = _scaled(raw, block)
    z = torch.addcmul(block.bias, c, block.scale)
    i, j = _own(block)
    own[i] = c[i, j]
    z[i, j] = -torch.inf
    c[i, j] = 0
    _merge(row, z, c, 1)
    _merge(col, z, c, 0)


def own_pairs(row: Tensor, col: Tensor, own: Tensor, scale: Tensor, bias: Tensor, weight: float) -> Tensor:
    z = torch.addcmul(bias, own, scale)
    before, others, w = settled(torch.stack([row, col], dim=1))  # each [2, n]: of the rows, of the columns
    m = torch.maximum(before, z)
    shrink = (before - m).exp()
    others = others * shrink
    # All from sums without own pairs: where the model has learned, they are far smaller than what p = 1 is rounded by.
    loss = (m - z) + torch.log1p(others + torch.expm1(z - m))
    total = others + (z - m).exp()
    d_scale = (w * shrink - others * own) / total
    g = -weight * (others / total)
    return torch.cat(
        [loss.mean(0, True), d_scale.mean(0, True), g, g.sum(0, True), torch.stack([m, total], dim=1).flatten(0, 1)]
    )


def with_own(state: Tensor, z: Tensor) -> Tensor:
    """(m, l) [2, n] of all pairs, from (m, l, w) [3, n] of all but own ones and the own z [n]; l ≥ 1."""
    before, others, _ = settled(state)
    m = torch.maximum(before, z)
    return torch.stack([m, others * (before - m).exp() + (z - m).exp()])


def settled(state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(m, l, w) with l ≥ 1, or 0 where there is no other pair: as it comes, m may lie above the maximum."""
    m, total, w = state
    low = (total > 0) & (total < 1)
    lower = torch.where(low, m + total.log(), m)
    grow = torch.where(low, (m - lower).exp(), 1)
    return lower, total * grow, w * grow


def grads(
    block: ScoreTile,
    row: Tensor,
    col: Tensor,
    row_weight: float,
    col_weight: float,
    own_g: Tensor,
    alpha: float,
    kept: Tensor | None,
    d_image: Tensor | None,
    d_text: Tensor | None,
) -> None:
    raw = _scores(block) if kept is None else kept.clone()
    z = torch.addcmul(block.bias, _scaled(raw, block), block.scale)
    g = torch.zeros_like(z)
    if row_weight:
        g += (z - row[0][:, None]).exp_().mul_((row_weight / row[1])[:, None])
    if col_weight:
        g += z.sub_(col[0]).exp_().mul_(col_weight / col[1])
    i, j = _own(block)
    g[i, j] = own_g[i]
    _features(block, g, alpha, d_image, d_text)


def sigmoid(
    block: ScoreTile,
    alpha: float,
    loss: Tensor,
    d_scale: Tensor,
    d_bias: Tensor,
    d_image: Tensor | None,
    d_text: Tensor | None,
) -> None:
    c = _scaled(_scores(block), block)
    z = torch.addcmul(block.bias, c, block.scale)
    i, j = _own(block)
    z[i, j] *= -1  # −y z
    loss -= F.logsigmoid(-z).sum(dim=1)
    g = z.sigmoid_()
    g[i, j] *= -1
    d_scale += alpha * (g * c).sum(dim=1)
    d_bias += alpha * g.sum(dim=1)
    _features(block, g, alpha, d_image, d_text)


def _own(block: ScoreTile) -> tuple[Tensor, Tensor]:
    """Rows and columns of the own pairs that lie in the block."""
    first = max(0, -block.offset)
    i = torch.arange(first, max(first, min(len(block.x), len(block.t) - block.offset)), device=block.x.device)
    return i, i + block.offset


def _scores(block: ScoreTile) -> Tensor:
    """x · tᵀ"""
    return _product(block.x, block.t.T, block.x.dtype)


def _scaled(raw: Tensor, block: ScoreTile) -> Tensor:
    """c from the products, in place."""
    if block.a is not None:
        raw *= block.a[:, None]
    return raw if block.q is None else raw.mul_(block.q)


def _merge(state: Tensor, z: Tensor, c: Tensor, dim: int) -> None:
    """Merges z and c, reduced over dim, into (m, l, w)."""
    m = torch.maximum(state[0], z.amax(dim))
    finite = m.masked_fill(m == -torch.inf, 0)  # −inf − −inf is NaN, and there is nothing yet to lose
    e = (z - finite.unsqueeze(dim)).exp_()
    state[1:] *= (state[0] - finite).exp()
    state[1] += e.sum(dim)
    state[2] += e.mul_(c).sum(dim)
    state[0] = m


def _features(block: ScoreTile, g: Tensor, alpha: float, d_image: Tensor | None, d_text: Tensor | None) -> None:
    """The features' gradients from g, which is used up."""
    dtype = block.x.dtype
    up = 1024.0 if dtype == torch.float16 else 1.0  # 1 / rows is subnormal in float16
    factor = block.scale * (alpha / up)
    if d_text is not None:
        left = g * up if block.a is None else g * (block.a * up)[:, None]
        d = _product(left.T, block.x, dtype).mul_(factor)
        d_text += d if block.q is None else d.mul_(block.q[:, None])
    if d_image is not None:
        g.mul_(up) if block.q is None else g.mul_(block.q * up)
        d = _product(g, block.t, dtype).mul_(factor)
        d_image.copy_(d if block.a is None else d.mul_(block.a[:, None]))


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
    step = max(1, TILE // max(1, b.shape[0]))
    for start in range(0, b.shape[1], step):
        torch.mm(a, b[:, start : start + step].to(wide), out=out[:, start : start + step])
    return out
