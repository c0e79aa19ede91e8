"""Symmetric InfoNCE over one block of scores (CLIP, arXiv 2103.00020, figure 3).

z_ij = logit_scale · a_i · q_j · (x_i · t_j) + logit_bias;  row i's own pair is column offset + i
g_ij = row_weight · exp(z_ij − m_i) / l_i + col_weight · exp(z_ij − m_j) / l_j,   and own_g_i for own pairs

    stats, a tile of ROWS × COLS:                   then merge_softmax: parts of all tiles -> the running (m, l, w)
        p = products (pairs.py), or from memory     in a fixed order: no atomics, the same bits every time
        c, z = a_i · q_j · p, logit_scale · c + logit_bias
        own[i] = c[i, offset + i], if it lies here;  z = −inf and c = 0 there
        row by row, column by column: m = max z, l = Σ exp(z − m), w = Σ exp(z − m) · c  ->  parts[tile]
    grad, a tile:
        p, c, z as above;  out = factor · a_i · q_j · g, rounded once to the dtype of the next GEMMs

Own pairs are left out of the sums and their g is given because p − 1 cancels for a pair that has converged: the
sum over the others is what has its digits. m and l come apart because m + log l forgets l where |m| is large.

The two gradients are GEMMs with the same matrix. d_image_i = scale·a_i Σ_j g_ij q_j t_j and
d_text_j = scale·q_j Σ_i g_ij a_i x_i both want G = scale·a·q·g, the gradient of the product x_i · t_j itself:
d_image = G @ t and d_text = G.T @ x. So one buffer of 2 bytes an element (4 in float32) serves both sides, with
or without a and q, and nothing is scaled afterwards; what bfloat16 rounds away does not depend on the scale.
float16 has no range for a and q (1e12 for a zero row): there out = factor · g, and the GEMMs take a·x and q·t.

Formed from features, a tile's 2 · ROWS · COLS · dim FLOP are the bound (tensor cores), and nothing reaches
memory but parts: 12 (1/ROWS + 4/COLS) bytes an element, 0.28 for 128 × 256. Over products in memory a tile reads
4 bytes an element and writes 0.38 (stats), 2 or 4 (grad), for two exponentials: memory bandwidth.
"""

import triton
import triton.language as tl
from torch import Tensor

from .pairs import (
    STORED,
    Tile,
    crossed,
    merge_softmax,
    partials,
    product_gradient,
    products,
    quarters,
    scores,
    softmax_partials,
    store,
    store_partials,
    stored,
    tile_at,
    tile_for,
)


@triton.jit
def stats_of(
    p, a, q, scale, bias, row_parts, col_parts, own, row_tile, col_tile, i, j, rows, cols, offset,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """A tile's share of the statistics, and its own pairs."""
    inside = (i < rows)[:, None] & (j < cols)[None, :]
    c = tl.where(inside, scores(p, a, q, i, j, rows, cols), 0.0)
    z = tl.where(inside, tl.load(scale) * c + tl.load(bias), float("-inf"))
    if crossed(row_tile, col_tile, offset, ROWS, COLS):
        pair = i + offset
        mine = j[None, :] == pair[:, None]
        here = (pair >= col_tile * COLS) & (pair < tl.minimum(cols, col_tile * COLS + COLS))
        tl.store(own + i, tl.sum(tl.where(mine, c, 0.0), 1), mask=here & (i < rows))
        z, c = tl.where(mine, float("-inf"), z), tl.where(mine, 0.0, c)
    m, l, w = softmax_partials(z, c, 1)  # noqa: E741
    store_partials(row_parts, m, l, w, col_tile, i, rows)
    m, l, w = softmax_partials(z, c, 0)  # noqa: E741
    store_partials(col_parts, m, l, w, row_tile, j, cols)


@triton.jit
def softmax_scale(state, stride, weight, at, n):
    """(m, weight / l) of state [2, n]; beyond n, and for a weight of 0, nothing is read: (inf, weight)."""
    read = (at < n) & (weight != 0.0)
    m = tl.load(state + at, mask=read, other=float("inf"))
    return m, weight / tl.load(state + stride + at, mask=read, other=1.0)


@triton.jit
def grad_of(
    p, a, q, scale, bias, row, col, row_weight, col_weight, own_g, factor, row_tile, col_tile, i, j, rows, cols,
    row_stride, col_stride, offset, dtype: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """factor · a · q · g of a tile, in dtype (`product_gradient`)."""
    z = tl.load(scale) * scores(p, a, q, i, j, rows, cols) + tl.load(bias)
    row_m, row_scale = softmax_scale(row, row_stride, row_weight, i, rows)
    col_m, col_scale = softmax_scale(col, col_stride, col_weight, j, cols)
    g = row_scale[:, None] * tl.exp(z - row_m[:, None]) + col_scale[None, :] * tl.exp(z - col_m[None, :])
    if crossed(row_tile, col_tile, offset, ROWS, COLS):
        mine = tl.load(own_g + i, mask=i < rows, other=0.0)
        g = tl.where(j[None, :] == (i + offset)[:, None], mine[:, None], g)
    return product_gradient(g, factor, a, q, i, j, rows, cols, dtype)


@triton.jit
def stats_kernel(
    p, a, q, scale, bias, row_parts, col_parts, own, rows, cols, p_stride, offset,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    row_tile, col_tile = tile_at(rows, cols, ROWS, COLS, 1)
    i, j = row_tile * ROWS + tl.arange(0, ROWS), col_tile * COLS + tl.arange(0, COLS)
    stats_of(
        stored(p, i, j, rows, cols, p_stride), a, q, scale, bias, row_parts, col_parts, own,
        row_tile, col_tile, i, j, rows, cols, offset, ROWS, COLS,
    )  # fmt: skip


@triton.jit
def scores_stats_kernel(
    x, t, a, q, scale, bias, row_parts, col_parts, own, keep,
    rows, cols, dim, x_stride, t_stride, keep_stride, offset,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    row_tile, col_tile = tile_at(rows, cols, ROWS, COLS, 8)
    i, j = row_tile * ROWS + tl.arange(0, ROWS), col_tile * COLS + tl.arange(0, COLS)
    p = quarters(products(x, t, i, j, rows, cols, dim, x_stride, t_stride, ROWS, COLS, DEPTH), ROWS, COLS)
    for part in tl.static_range(4):
        j = col_tile * COLS + part * (COLS // 4) + tl.arange(0, COLS // 4)
        if keep is not None:
            store(keep, p[part], i, j, rows, cols, keep_stride)
        stats_of(
            p[part], a, q, scale, bias, row_parts, col_parts, own,
            row_tile, col_tile * 4 + part, i, j, rows, cols, offset, ROWS, COLS // 4,
        )  # fmt: skip


@triton.jit
def grad_kernel(
    p, a, q, scale, bias, row, col, row_weight, col_weight, own_g, factor, out,
    rows, cols, p_stride, row_stride, col_stride, out_stride, offset,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    row_tile, col_tile = tile_at(rows, cols, ROWS, COLS, 1)
    i, j = row_tile * ROWS + tl.arange(0, ROWS), col_tile * COLS + tl.arange(0, COLS)
    g = grad_of(
        stored(p, i, j, rows, cols, p_stride), a, q, scale, bias, row, col, row_weight, col_weight, own_g, factor,
        row_tile, col_tile, i, j, rows, cols, row_stride, col_stride, offset, out.dtype.element_ty, ROWS, COLS,
    )  # fmt: skip
    store(out, g, i, j, rows, cols, out_stride)


@triton.jit
def scores_grad_kernel(
    x, t, a, q, scale, bias, row, col, row_weight, col_weight, own_g, factor, out,
    rows, cols, dim, x_stride, t_stride, row_stride, col_stride, out_stride, offset,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    row_tile, col_tile = tile_at(rows, cols, ROWS, COLS, 8)
    i, j = row_tile * ROWS + tl.arange(0, ROWS), col_tile * COLS + tl.arange(0, COLS)
    p = quarters(products(x, t, i, j, rows, cols, dim, x_stride, t_stride, ROWS, COLS, DEPTH), ROWS, COLS)
    for part in tl.static_range(4):
        j = col_tile * COLS + part * (COLS // 4) + tl.arange(0, COLS // 4)
        g = grad_of(
            p[part], a, q, scale, bias, row, col, row_weight, col_weight, own_g, factor,
            row_tile, col_tile * 4 + part, i, j, rows, cols, row_stride, col_stride, offset,
            out.dtype.element_ty, ROWS, COLS // 4,
        )  # fmt: skip
        store(out, g, i, j, rows, cols, out_stride)


def stats(
    p: Tensor, a: Tensor | None, q: Tensor | None, scale: Tensor, bias: Tensor, offset: int,
    row: Tensor, col: Tensor, own: Tensor, tile: Tile = STORED,
) -> None:  # fmt: skip
    """Merges the statistics of a block of products p, float32 [rows, cols], into row [3, rows] and col [3, cols].

    Own pairs are left out of them; own [rows]: the score c of row i's own column offset + i is written where there is
    one. a [rows] and q [cols], or None: what the products are multiplied by; scale, bias: float32, 0-d. All float32,
    on p's device.
    """
    rows, cols = p.shape
    across, down = triton.cdiv(cols, tile.cols), triton.cdiv(rows, tile.rows)
    row_parts, col_parts = partials(across, rows, p.device), partials(down, cols, p.device)
    stats_kernel[(across * down,)](
        p, a, q, scale, bias, row_parts, col_parts, own, rows, cols, p.stride(0), offset,
        ROWS=tile.rows, COLS=tile.cols, num_warps=tile.warps,
    )  # fmt: skip
    merge_softmax(row_parts, row)
    merge_softmax(col_parts, col)


def scores_stats(
    x: Tensor, t: Tensor, a: Tensor | None, q: Tensor | None, scale: Tensor, bias: Tensor, offset: int,
    row: Tensor, col: Tensor, own: Tensor, keep: Tensor | None = None, tile: Tile | None = None,
) -> None:  # fmt: skip
    """`stats` of the products x @ t.T, which are formed here and reach memory only in keep [rows, cols], if given.

    x [rows, dim]: float32, bfloat16 or float16; t [cols, dim]: the same, or int8. Rows are contiguous.
    """
    (rows, dim), cols = x.shape, len(t)
    tile = tile or tile_for(x, t, "wide" if keep is None else "narrow")
    across, down = triton.cdiv(cols, tile.cols), triton.cdiv(rows, tile.rows)
    row_parts, col_parts = partials(across * 4, rows, x.device), partials(down, cols, x.device)
    scores_stats_kernel[(across * down,)](
        x, t, a, q, scale, bias, row_parts, col_parts, own, keep,
        rows, cols, dim, x.stride(0), t.stride(0), 0 if keep is None else keep.stride(0), offset,
        ROWS=tile.rows, COLS=tile.cols, DEPTH=tile.depth, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    merge_softmax(row_parts, row)
    merge_softmax(col_parts, col)


def grad(
    p: Tensor, a: Tensor | None, q: Tensor | None, scale: Tensor, bias: Tensor, offset: int,
    row: Tensor, col: Tensor, row_weight: float, col_weight: float, own_g: Tensor, factor: Tensor,
    out: Tensor, tile: Tile = STORED,
) -> None:  # fmt: skip
    """out [rows, cols] = factor · a · q · g, in out's dtype (float16: factor · g); factor: float32, 0-d. out may be p.

    p, a, q, scale, bias, offset as for `stats`; row [2, rows], col [2, cols]: (m, l) over all pairs, not read where
    their weight is 0; own_g [rows]: g of own pairs. All float32.
    """
    rows, cols = p.shape
    grad_kernel[(triton.cdiv(rows, tile.rows) * triton.cdiv(cols, tile.cols),)](
        p, a, q, scale, bias, row, col, row_weight, col_weight, own_g, factor, out,
        rows, cols, p.stride(0), row.stride(0), col.stride(0), out.stride(0), offset,
        ROWS=tile.rows, COLS=tile.cols, num_warps=tile.warps,
    )  # fmt: skip


def scores_grad(
    x: Tensor, t: Tensor, a: Tensor | None, q: Tensor | None, scale: Tensor, bias: Tensor, offset: int,
    row: Tensor, col: Tensor, row_weight: float, col_weight: float, own_g: Tensor, factor: Tensor,
    out: Tensor, tile: Tile | None = None,
) -> None:  # fmt: skip
    """`grad` of the products x @ t.T, which are formed here and never reach memory."""
    (rows, dim), cols = x.shape, len(t)
    tile = tile or tile_for(x, t, "wide")
    scores_grad_kernel[(triton.cdiv(rows, tile.rows) * triton.cdiv(cols, tile.cols),)](
        x, t, a, q, scale, bias, row, col, row_weight, col_weight, own_g, factor, out,
        rows, cols, dim, x.stride(0), t.stride(0), row.stride(0), col.stride(0), out.stride(0), offset,
        ROWS=tile.rows, COLS=tile.cols, DEPTH=tile.depth,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
