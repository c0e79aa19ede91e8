"""Sigmoid loss over one block of scores (SigLIP, arXiv 2303.15343, equation 1).

z_ij = logit_scale · a_i · q_j · (x_i · t_j) + logit_bias,   y_ij = 1 for positive pairs, j = offset + i, and −1 for others
loss_i = Σ_j softplus(−y_ij z_ij),   g_ij = −y_ij σ(−y_ij z_ij), its derivative by z_ij

    a tile of ROWS × COLS:
        p = products (pairs.py), or from memory;   v, z = q_j · p, logit_scale · a_i · v + logit_bias
        e = exp(−|z|):  softplus = max(−y z, 0) + log1p(e),  σ = 1 / (1 + e) or e / (1 + e)
        row by row: Σ softplus, a_i Σ g v, Σ g  ->  parts[tile];  merge_sums adds the parts of all tiles, in order
        out = factor · a_i · q_j · g, rounded once, for both sides' gradients (see contrastive.py)

One pass has the loss and all gradients: a score needs no other. Formed from features, a tile's
2 · ROWS · COLS · dim FLOP are the bound (tensor cores); over products in memory it reads 4 bytes an element and
writes 2 or 4, or nothing without out, and 0.19 of parts, for one exponential and one root: memory bandwidth.
"""

import triton
import triton.language as tl
from torch import Tensor

from .contrastive import INTEGERS
from .interpreter import round_to
from .pairs import (
    LOG2E,
    NONE,
    Terms,
    TileConfig,
    aligned,
    at_edge,
    log1p,
    multiple,
    quarters,
    spaced,
    store_partials,
    stored,
    tile_at,
    tile_products,
)


@triton.jit
def sigmoid_of(
    p, left, factor, col_terms, bias, out, to, i, j, cols, edge, offset
):  # fmt: skip
    """Sums over the columns of a tile: softplus, g · v, g; writes out[to] if it is not None."""
    right = tl.load(col_terms + j)
    v = p * right[None, :]
    u = tl.fma(v, left[:, None], bias)
    if edge:
        u = tl.where(j[None, :] == (i + offset)[:, None], -u, u)
        u = tl.where((j < cols)[None, :], u, NONE)
    e = tl.exp2(tl.abs(u) * -LOG2E)
    softplus = tl.sum(tl.maximum(u, 0.0) + log1p(e), 1)
    root = tl.rsqrt(1.0 + e)
    g = tl.where(u >= 0, root, e * root) * root
    if edge:
        g = tl.where(j[None, :] == (i + offset)[:, None], -g, g)
    sums = tl.sum(g * v, 1), tl.sum(g, 1)
    if out is not None:
        if out.dtype.element_ty != tl.float16:
            # Loaded again, from the L1: to hold it would take registers that there are not.
            g *= left[:, None] * tl.load(col_terms + j, cache_modifier=".ca")[None, :]
        g *= factor
        tl.store(out + to, round_to(g, out.dtype.element_ty))
    return softplus, sums[0], sums[1]


@triton.jit(do_not_specialize=[*INTEGERS, "alpha"], do_not_specialize_on_alignment=["bias", "factor"])
def scores_sigmoid_kernel(
    x, t, row_terms, col_terms, bias, factor, alpha, parts, out, first, rows, cols, dim,
    x_stride, t_stride, tall, parts_stride, out_stride, offset,
    ALIGNED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    row_tile, col_tile = tile_at(tl.program_id(0), rows - first, cols, ROWS, COLS, 8)
    p = tile_products(
        x, t, row_tile, col_tile, first, rows, cols, dim, x_stride, t_stride, ROWS, COLS, DEPTH, ALIGNED
    )  # fmt: skip
    quarter = quarters(p, ROWS, COLS)
    tall, out_stride, parts_stride = multiple(tall, True), multiple(out_stride, True), multiple(parts_stride, True)
    i = first + row_tile * ROWS + tl.arange(0, ROWS)
    left, b = tl.load(row_terms + i), tl.load(bias)
    if out is not None:
        factor = tl.load(factor)
        out += (row_tile * ROWS).to(tl.int64) * out_stride + col_tile * COLS
    down, along = tl.arange(0, ROWS)[:, None] * out_stride, tl.arange(0, COLS // 4)[None, :]
    edge = at_edge(row_tile, col_tile, rows - first, cols, offset + first, ROWS, COLS)
    loss, gv, g = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
    for part in tl.static_range(4):
        j = col_tile * COLS + part * (COLS // 4) + tl.arange(0, COLS // 4)
        to = down + (part * (COLS // 4) + along)
        more = sigmoid_of(quarter[part], left, factor, col_terms, b, out, to, i, j, cols, edge, offset)
        loss, gv, g = loss + more[0], gv + more[1], g + more[2]
    gv *= tl.load(row_terms + tall + i) * alpha
    store_partials(parts, loss, gv, g * alpha, col_tile, parts_stride, row_tile * ROWS + tl.arange(0, ROWS))


@triton.jit(do_not_specialize=[*INTEGERS, "alpha"], do_not_specialize_on_alignment=["bias", "factor"])
def sigmoid_kernel(
    p, row_terms, col_terms, bias, factor, alpha, parts, out, first, rows, col_first, cols,
    p_stride, tall, parts_stride, out_stride, offset,
    ALIGNED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    row_tile, col_tile = tile_at(tl.program_id(0), rows - first, cols - col_first, ROWS, COLS, 1)
    i, j = row_tile * ROWS + tl.arange(0, ROWS), col_tile * COLS + tl.arange(0, COLS)
    products = stored(p, i, j, rows - first, cols - col_first, multiple(p_stride, ALIGNED))
    tall, out_stride, parts_stride = multiple(tall, True), multiple(out_stride, True), multiple(parts_stride, True)
    left, b = tl.load(row_terms + first + i), tl.load(bias)
    if out is not None:
        factor = tl.load(factor)
    edge = at_edge(row_tile, col_tile, rows - first, cols - col_first, offset + first - col_first, ROWS, COLS)
    loss, gv, g = sigmoid_of(
        products, left, factor, col_terms, b, out, i.to(tl.int64)[:, None] * out_stride + j[None, :],
        first + i, col_first + j, cols, edge, offset,
    )  # fmt: skip
    gv *= tl.load(row_terms + tall + first + i) * alpha
    store_partials(parts, loss, gv, g * alpha, col_first // COLS + col_tile, parts_stride, i)


def sigmoid(
    p: Tensor, terms: Terms, bias: Tensor, alpha: float, parts: Tensor, out: Tensor | None, rows: tuple[int, int],
    cols: tuple[int, int], offset: int, config: TileConfig,
) -> None:  # fmt: skip
    """Σ_j softplus(−y z), alpha Σ_j g c and alpha Σ_j g of products p, float32, of the rows and columns named.

    parts as `partials` makes them, for these rows and all columns; the columns' first is a tile's. out: None, or these
    rows and columns with room for whole tiles, p itself even, which become factor · a · q · g in its dtype
    (float16: factor · g).
    """
    (first, stop), (col_first, col_stop) = rows, cols
    sigmoid_kernel[(-(-(stop - first) // config.rows) * -(-(col_stop - col_first) // config.cols),)](
        p, terms.rows, terms.cols, bias, terms.factor, alpha, parts, out, first, stop, col_first, col_stop,
        p.stride(0), terms.rows.stride(0), parts.stride(1), 0 if out is None else out.stride(0), offset,
        ALIGNED=spaced(p), ROWS=config.rows, COLS=config.cols, num_warps=config.warps,
    )  # fmt: skip


def scores_sigmoid(
    x: Tensor, t: Tensor, terms: Terms, bias: Tensor, alpha: float, parts: Tensor, out: Tensor | None,
    rows: tuple[int, int], offset: int, config: TileConfig,
) -> None:  # fmt: skip
    """`sigmoid` of the products of these rows with all columns, which are formed here and never reach memory.

    x [all rows, dim]: bfloat16 or float16; t [cols, dim]: the same, or int8.
    """
    first, stop = rows
    scores_sigmoid_kernel[(-(-(stop - first) // config.rows) * -(-len(t) // config.cols),)](
        x, t, terms.rows, terms.cols, bias, terms.factor, alpha, parts, out, first, stop, len(t), x.shape[1],
        x.stride(0), t.stride(0), terms.rows.stride(0), parts.stride(1), 0 if out is None else out.stride(0), offset,
        ALIGNED=aligned(x) and aligned(t), ROWS=config.rows, COLS=config.cols, DEPTH=config.depth,
        num_warps=config.warps, num_stages=config.stages, maxnreg=config.registers,
    )  # fmt: skip
