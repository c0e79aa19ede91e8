"""Sigmoid loss over one ScoreTile (SigLIP, arXiv 2303.15343, equation 1).

z_ij = logit_scale · a_i · q_j · (x_i · t_j) + logit_bias,   y_ij = 1 for positives, j = offset + i, and −1 otherwise
loss_i = Σ_j softplus(−y_ij z_ij),   g_ij = −y_ij σ(−y_ij z_ij), its derivative by z_ij

    a tile of ROWS × COLS:
        p = products, formed or from memory;   v, z = q_j · p, logit_scale · a_i · v + logit_bias
        e = exp(−|z|):  softplus = max(−y z, 0) + log1p(e),  σ = 1 / (1 + e) or e / (1 + e)
        row by row: Σ softplus, a_i Σ g v, Σ g  ->  parts[tile];  merge_sums adds the parts of all tiles, in order
        out = factor · a_i · q_j · g, rounded once, for both sides' gradients (see contrastive.py)

One pass computes the loss and all gradients: a score depends on no other. If the products are formed from features, a
tile's 2 · ROWS · COLS · dim FLOP are the bound (tensor cores); with products in memory it reads 4 bytes an element and
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
    fanned,
    log1p,
    multiple,
    products,
    quarters,
    spaced,
    store_partials,
    stored,
    tile_at,
    tiles,
    unfanned,
)


@triton.jit(do_not_specialize=[*INTEGERS, "alpha"], do_not_specialize_on_alignment=["bias", "factor"])
def scores_sigmoid_kernel(
    x,  # [rows, dim] bfloat16 or float16, x_stride apart
    t,  # [cols, dim] x's dtype or int8, t_stride apart
    row_terms,  # [4, tall]
    col_terms,  # [3, wide]
    bias, factor,  # []
    alpha,
    parts,  # [column tiles, 3, parts_stride]
    out,  # [rows - first, cols] padded to tiles, x's dtype, out_stride apart; or None
    first, rows, cols, dim, x_stride, t_stride, tall, parts_stride, out_stride, offset,
    ALIGNED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """A program per tile of rows first..rows-1 and all columns."""
    row_tile, col_tile = tile_at(tl.program_id(0), rows - first, cols, ROWS, COLS, 8)
    i, j = first + row_tile * ROWS + tl.arange(0, ROWS), fanned(col_tile * COLS, COLS)
    p = products(x, t, i, j, rows, cols, dim, x_stride, t_stride, ROWS, COLS, DEPTH, ALIGNED)
    tile_sigmoid(
        unfanned(p, ROWS, COLS), row_terms, col_terms, bias, factor, alpha, parts, out, row_tile, col_tile,
        first, rows, 0, cols, tall, parts_stride, out_stride, offset, ROWS, COLS, 4,
    )  # fmt: skip


@triton.jit(do_not_specialize=[*INTEGERS, "alpha"], do_not_specialize_on_alignment=["bias", "factor"])
def sigmoid_kernel(
    p,  # [rows - first, cols - col_first], p_stride apart
    row_terms,  # [4, tall]
    col_terms,  # [3, wide]
    bias, factor,  # []
    alpha,
    parts,  # [column tiles, 3, parts_stride]
    out,  # [rows - first, cols - col_first] padded to tiles, out_stride apart; may be p; or None
    first, rows, col_first, cols, p_stride, tall, parts_stride, out_stride, offset,
    ALIGNED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """A program per tile of rows first..rows-1 and columns col_first..cols-1, whose products are in memory."""
    row_tile, col_tile = tile_at(tl.program_id(0), rows - first, cols - col_first, ROWS, COLS, 1)
    i, j = row_tile * ROWS + tl.arange(0, ROWS), col_tile * COLS + tl.arange(0, COLS)
    tile_sigmoid(
        stored(p, i, j, rows - first, cols - col_first, multiple(p_stride, ALIGNED)), row_terms, col_terms,
        bias, factor, alpha, parts, out, row_tile, col_tile,
        first, rows, col_first, cols, tall, parts_stride, out_stride, offset, ROWS, COLS, 1,
    )  # fmt: skip


@triton.jit
def tile_sigmoid(
    p, row_terms, col_terms, bias, factor, alpha, parts, out, row_tile, col_tile, first, rows, col_first, cols,
    tall, parts_stride, out_stride, offset, ROWS: tl.constexpr, COLS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Sums of a tile of products p over its columns, and its gradient unless out is None, in PARTS (1 or 4) steps."""
    part_of = quarters(p, ROWS, COLS) if PARTS == 4 else (p,)
    WIDTH: tl.constexpr = COLS // PARTS
    tall, out_stride, parts_stride = multiple(tall, True), multiple(out_stride, True), multiple(parts_stride, True)
    i = first + row_tile * ROWS + tl.arange(0, ROWS)
    left, b = tl.load(row_terms + i), tl.load(bias)
    if out is not None:
        f = tl.load(factor)
        out += (row_tile * ROWS).to(tl.int64) * out_stride + col_tile * COLS
    down, along = tl.arange(0, ROWS)[:, None] * out_stride, tl.arange(0, WIDTH)[None, :]
    edge = at_edge(row_tile, col_tile, rows - first, cols - col_first, offset + first - col_first, ROWS, COLS)
    for part in tl.static_range(PARTS):
        j = col_first + (col_tile * COLS + part * WIDTH + tl.arange(0, WIDTH))
        right = tl.load(col_terms + j)
        v = part_of[part] * right[None, :]
        u = tl.fma(v, left[:, None], b)
        if edge:
            u = tl.where(j[None, :] == (i + offset)[:, None], -u, u)
            u = tl.where((j < cols)[None, :], u, NONE)
        e = tl.exp2(tl.abs(u) * -LOG2E)
        part_loss = tl.sum(tl.maximum(u, 0.0) + log1p(e), 1)
        root = tl.rsqrt(1.0 + e)
        g = tl.where(u >= 0, root, e * root) * root
        if edge:
            g = tl.where(j[None, :] == (i + offset)[:, None], -g, g)
        part_gv, part_g = tl.sum(g * v, 1), tl.sum(g, 1)
        if out is not None:
            if out.dtype.element_ty != tl.float16:
                # Loaded again, from the L1 cache: there are too few registers to hold it.
                g *= left[:, None] * tl.load(col_terms + j, cache_modifier=".ca")[None, :]
            g *= f
            tl.store(out + (down + (part * WIDTH + along)), round_to(g, out.dtype.element_ty))
        if part == 0:
            loss, gv, g_sum = part_loss, part_gv, part_g
        else:
            loss, gv, g_sum = loss + part_loss, gv + part_gv, g_sum + part_g
    gv *= tl.load(row_terms + tall + i) * alpha
    at = row_tile * ROWS + tl.arange(0, ROWS)
    store_partials(parts, loss, gv, g_sum * alpha, col_first // COLS + col_tile, parts_stride, at)


def sigmoid(
    p: Tensor, terms: Terms, bias: Tensor, alpha: float, parts: Tensor, out: Tensor | None, rows: tuple[int, int],
    cols: tuple[int, int], offset: int, config: TileConfig,
) -> None:  # fmt: skip
    """Σ_j softplus(−y z), alpha Σ_j g c and alpha Σ_j g of products p, float32, of the rows and columns [start, stop).

    parts: from `partials`, for these rows and all columns; the first column starts a tile. out: None, or these rows and
    columns padded to whole tiles, p itself even, which become factor · a · q · g in its dtype (float16: factor · g).
    """
    (first, stop), (col_first, col_stop) = rows, cols
    sigmoid_kernel[(tiles(stop - first, col_stop - col_first, config),)](
        p, terms.rows, terms.cols, bias, terms.factor, alpha, parts, out, first, stop, col_first, col_stop,
        p.stride(0), terms.rows.stride(0), parts.stride(1), 0 if out is None else out.stride(0), offset,
        ALIGNED=spaced(p), **config.stored(),
    )  # fmt: skip


def scores_sigmoid(
    x: Tensor, t: Tensor, terms: Terms, bias: Tensor, alpha: float, parts: Tensor, out: Tensor | None,
    rows: tuple[int, int], offset: int, config: TileConfig,
) -> None:  # fmt: skip
    """`sigmoid` of the products of these rows with all columns, which are formed here and never reach memory.

    x [all rows, dim]: bfloat16 or float16; t [cols, dim]: the same, or int8.
    """
    first, stop = rows
    scores_sigmoid_kernel[(tiles(stop - first, len(t), config),)](
        x, t, terms.rows, terms.cols, bias, terms.factor, alpha, parts, out, first, stop, len(t), x.shape[1],
        x.stride(0), t.stride(0), terms.rows.stride(0), parts.stride(1), 0 if out is None else out.stride(0), offset,
        ALIGNED=aligned(x) and aligned(t), **config.fused(),
    )  # fmt: skip
