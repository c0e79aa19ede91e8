"""Sigmoid loss over one block of scores (SigLIP, arXiv 2303.15343, equation 1).

z_ij = logit_scale · a_i · q_j · (x_i · t_j) + logit_bias,   y_ij = 1 for own pairs, j = offset + i, and −1 for others
loss_i = Σ_j softplus(−y_ij z_ij),   g_ij = −y_ij σ(−y_ij z_ij), its derivative by z_ij

    a tile of ROWS × COLS:
        p = products (pairs.py), or from memory;   c, z = a_i · q_j · p, logit_scale · c + logit_bias
        e = exp(−|z|):  softplus = max(−y z, 0) + log1p(e),  σ = 1 / (1 + e) or e / (1 + e)
        row by row: Σ softplus, Σ g c, Σ g  ->  parts[tile];  merge_sums adds the parts of all tiles, in order
        out = factor · a_i · q_j · g, rounded once, for both sides' gradients (see contrastive.py)

One pass has the loss and all gradients: a score needs no other. Formed from features, a tile's
2 · ROWS · COLS · dim FLOP are the bound (tensor cores); over products in memory it reads 4 bytes an element and
writes 2 or 4, or nothing without out, and 0.19 of parts, for one exponential and two divisions: memory bandwidth.
"""

import triton
import triton.language as tl
from torch import Tensor

from .pairs import (
    STORED,
    Tile,
    merge_sums,
    partials,
    product_gradient,
    products,
    quarters,
    scores,
    store,
    store_partials,
    stored,
    tile_at,
    tile_for,
)


@triton.jit
def log1p(e):
    """log(1 + e) for 0 ≤ e ≤ 1, to 2e-7 relative: 2 atanh(s), s = e / (2 + e), by a polynomial in s².

    log(1 + e) itself would lose the small e that make up the loss of far pairs.
    """
    s = e / (2.0 + e)
    y = s * s
    return s * (2.0 + y * (0.66666322 + y * (0.40024595 + y * (0.27965158 + y * 0.28157778))))


@triton.jit
def sigmoid_of(
    p, a, q, scale, bias, alpha, factor, out, i, j, rows, cols, out_stride, offset
):  # fmt: skip
    """Sums over the columns of a tile: softplus, alpha · g · c, alpha · g; writes the tile of out."""
    c = scores(p, a, q, i, j, rows, cols)
    z = tl.load(scale) * c + tl.load(bias)
    own = j[None, :] == (i + offset)[:, None]
    u = tl.where(own, -z, z)
    e = tl.exp(-tl.abs(u))
    s = 1.0 / (1.0 + e)
    sigma = tl.where(u >= 0, s, e * s)
    inside = (i < rows)[:, None] & (j < cols)[None, :]
    g = tl.where(inside, tl.where(own, -sigma, sigma), 0.0)
    if out is not None:
        rounded = product_gradient(g, factor, a, q, i, j, rows, cols, out.dtype.element_ty)
        store(out, rounded, i, j, rows, cols, out_stride)
    softplus = tl.where(inside, tl.maximum(u, 0.0) + log1p(e), 0.0)
    return tl.sum(softplus, 1), alpha * tl.sum(g * c, 1), alpha * tl.sum(g, 1)


@triton.jit
def sigmoid_kernel(
    p, a, q, scale, bias, alpha, factor, parts, out, rows, cols, p_stride, out_stride, offset,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    row_tile, col_tile = tile_at(rows, cols, ROWS, COLS, 1)
    i, j = row_tile * ROWS + tl.arange(0, ROWS), col_tile * COLS + tl.arange(0, COLS)
    loss, gc, g = sigmoid_of(
        stored(p, i, j, rows, cols, p_stride), a, q, scale, bias, alpha, factor, out,
        i, j, rows, cols, out_stride, offset,
    )  # fmt: skip
    store_partials(parts, loss, gc, g, col_tile, i, rows)


@triton.jit
def scores_sigmoid_kernel(
    x, t, a, q, scale, bias, alpha, factor, parts, out, rows, cols, dim, x_stride, t_stride, out_stride, offset,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    row_tile, col_tile = tile_at(rows, cols, ROWS, COLS, 8)
    i, j = row_tile * ROWS + tl.arange(0, ROWS), col_tile * COLS + tl.arange(0, COLS)
    p = quarters(products(x, t, i, j, rows, cols, dim, x_stride, t_stride, ROWS, COLS, DEPTH), ROWS, COLS)
    loss, gc, g = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
    for part in tl.static_range(4):
        j = col_tile * COLS + part * (COLS // 4) + tl.arange(0, COLS // 4)
        more_loss, more_gc, more_g = sigmoid_of(
            p[part], a, q, scale, bias, alpha, factor, out, i, j, rows, cols, out_stride, offset
        )  # fmt: skip
        loss, gc, g = loss + more_loss, gc + more_gc, g + more_g
    store_partials(parts, loss, gc, g, col_tile, i, rows)


def sigmoid(
    p: Tensor, a: Tensor | None, q: Tensor | None, scale: Tensor, bias: Tensor, offset: int, alpha: float,
    factor: Tensor, loss: Tensor, d_scale: Tensor, d_bias: Tensor, out: Tensor | None, tile: Tile = STORED,
) -> None:  # fmt: skip
    """Adds Σ_j softplus(−y z), alpha Σ_j g c and alpha Σ_j g of a block of products p, float32 [rows, cols].

    loss, d_scale, d_bias: float32 [rows]. a [rows] and q [cols], or None: what the products are multiplied by;
    scale, bias: float32, 0-d. out: None, or [rows, cols], p itself even, which becomes factor · a · q · g
    in its dtype (float16: factor · g); factor: float32, 0-d.
    """
    rows, cols = p.shape
    parts = partials(triton.cdiv(cols, tile.cols), rows, p.device)
    sigmoid_kernel[(len(parts) * triton.cdiv(rows, tile.rows),)](
        p, a, q, scale, bias, alpha, factor, parts, out,
        rows, cols, p.stride(0), 0 if out is None else out.stride(0), offset,
        ROWS=tile.rows, COLS=tile.cols, num_warps=tile.warps,
    )  # fmt: skip
    merge_sums(parts, loss, d_scale, d_bias)


def scores_sigmoid(
    x: Tensor, t: Tensor, a: Tensor | None, q: Tensor | None, scale: Tensor, bias: Tensor, offset: int,
    alpha: float, factor: Tensor, loss: Tensor, d_scale: Tensor, d_bias: Tensor, out: Tensor | None,
    tile: Tile | None = None,
) -> None:  # fmt: skip
    """`sigmoid` of the products x @ t.T, which are formed here and never reach memory.

    x [rows, dim]: float32, bfloat16 or float16; t [cols, dim]: the same, or int8. Rows are contiguous.
    """
    (rows, dim), cols = x.shape, len(t)
    tile = tile or tile_for(x, t, "narrow")
    parts = partials(triton.cdiv(cols, tile.cols), rows, x.device)
    scores_sigmoid_kernel[(len(parts) * triton.cdiv(rows, tile.rows),)](
        x, t, a, q, scale, bias, alpha, factor, parts, out,
        rows, cols, dim, x.stride(0), t.stride(0), 0 if out is None else out.stride(0), offset,
        ROWS=tile.rows, COLS=tile.cols, DEPTH=tile.depth,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    merge_sums(parts, loss, d_scale, d_bias)
