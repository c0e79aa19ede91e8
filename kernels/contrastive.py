"""Symmetric InfoNCE over one ScoreTile (CLIP, arXiv 2103.00020, figure 3).

z_ij = u_ij + logit_bias,  u_ij = logit_scale · a_i · q_j · (x_i · t_j);  the positive of row i is column offset + i
g_ij = row_weight · exp(z_ij − m_i) / l_i + col_weight · exp(z_ij − m_j) / l_j,   and positive_g_i for positives

    stats, a tile of ROWS × COLS:                   then merge_softmax: parts of all tiles -> the running (m, l, w)
        p = products, formed or from memory         in a fixed order: no atomics, the same bits every time
        positive[i] = c of (i, offset + i), if it lies in this tile;  u = NONE there and beyond the edge
        for each quarter of the columns, row by row, column by column:
            m = max u, l = Σ exp(u − m), w = Σ exp(u − m) · u;  rows: over the quarters -> row_parts[tile], col_parts
    grad, a tile:
        p, u as above;  out = factor · a_i · q_j · g, rounded once to the dtype of the next GEMMs:
        g = 2^((u − (m_i − logit_bias)) log2 e + log2(row_weight / l_i)) + the same by the column

    positives, a pair: loss, g and the (m, l) over all pairs from its z and the (m, l, w) of its row and its column

Positives are left out of the sums, and their g is an input, because p − 1 cancels for a pair that has converged: the
sum over the negatives has the digits. m and l are stored apart because m + log l rounds l away where |m| is large. For
the same reason u is rounded before m is subtracted, by the same two multiplications in both kernels and without fused
multiply-adds, which would round it differently (`OPTIONS`).

The two gradients are GEMMs with the same matrix. d_image_i = scale·a_i Σ_j g_ij q_j t_j and
d_text_j = scale·q_j Σ_i g_ij a_i x_i both need G = scale·a·q·g, the gradient of the product x_i · t_j itself:
d_image = G @ t and d_text = G.T @ x. So one buffer of 2 bytes an element (4 in float32) serves both sides, with
or without a and q, and nothing is scaled afterwards; what bfloat16 rounds off does not depend on the scale.
float16's range is too small for a and q (1e12 for a zero row): there out = factor · g, and the GEMMs take a·x and q·t.

If the products are formed from features, a tile's 2 · ROWS · COLS · dim FLOP are the bound (tensor cores), and only
parts are written: 12 (1/ROWS + 1/COLS) bytes an element, 0.19 for 128 × 128. With products in memory a tile reads
4 bytes an element and writes 0.38 (stats), 2 or 4 (grad), for two exponentials: memory bandwidth.
"""

import triton
import triton.language as tl
from torch import Tensor

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

OPTIONS = {"enable_fp_fusion": False}
POSITIVES = 256  # per program
INTEGERS = [
    "first", "rows", "cols", "dim", "x_stride", "t_stride", "p_stride", "keep_stride", "out_stride", "tall", "wide",
    "parts_stride", "col_first", "offset",
]  # fmt: skip


@triton.jit(do_not_specialize=INTEGERS, do_not_specialize_on_alignment=["positive"])
def scores_stats_kernel(
    x,  # [rows, dim] bfloat16 or float16, x_stride apart
    t,  # [cols, dim] x's dtype or int8, t_stride apart
    row_terms,  # [4, tall]
    col_terms,  # [3, wide]
    positive,  # [rows]
    keep,  # [rows, cols] or None, keep_stride apart
    row_parts,  # [column tiles, 3, parts_stride]
    col_parts,  # [row tiles, 3, wide]
    first, rows, cols, dim, x_stride, t_stride, keep_stride, tall, wide, parts_stride, offset,
    ALIGNED: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """A program per tile of rows first..rows-1 and all columns; the products are stored in keep, if given."""
    row_tile, col_tile = tile_at(tl.program_id(0), rows - first, cols, ROWS, COLS, 8)
    i, j = first + row_tile * ROWS + tl.arange(0, ROWS), fanned(col_tile * COLS, COLS)
    p = products(x, t, i, j, rows, cols, dim, x_stride, t_stride, ROWS, COLS, DEPTH, ALIGNED)
    p = unfanned(p, ROWS, COLS)
    if keep is not None:
        # Whole and with 32-bit offsets within the tile: by quarters, or with 64 bits, there are too few registers.
        keep_stride = multiple(keep_stride, ALIGNED)
        to = keep + (first + row_tile * ROWS).to(tl.int64) * keep_stride + col_tile * COLS
        down, along = tl.arange(0, ROWS)[:, None], tl.arange(0, COLS)[None, :]
        inside = (down < rows - first - row_tile * ROWS) & (along < multiple(cols, EVEN) - col_tile * COLS)
        tl.store(to + (down * keep_stride + along), p, mask=inside)
    tile_stats(
        p, row_terms, col_terms, positive, row_parts, col_parts, row_tile, col_tile, first, rows, 0, cols,
        tall, wide, parts_stride, offset, ROWS, COLS, 4,
    )  # fmt: skip


@triton.jit(do_not_specialize=INTEGERS, do_not_specialize_on_alignment=["positive"])
def stats_kernel(
    p,  # [rows - first, cols - col_first], p_stride apart
    row_terms,  # [4, tall]
    col_terms,  # [3, wide]
    positive,  # [rows]
    row_parts,  # [column tiles, 3, parts_stride]
    col_parts,  # [row tiles, 3, wide]
    first, rows, col_first, cols, p_stride, tall, wide, parts_stride, offset,
    ALIGNED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """A program per tile of rows first..rows-1 and columns col_first..cols-1, whose products are in memory."""
    row_tile, col_tile = tile_at(tl.program_id(0), rows - first, cols - col_first, ROWS, COLS, 1)
    i, j = row_tile * ROWS + tl.arange(0, ROWS), col_tile * COLS + tl.arange(0, COLS)
    tile_stats(
        stored(p, i, j, rows - first, cols - col_first, multiple(p_stride, ALIGNED)), row_terms, col_terms, positive,
        row_parts, col_parts, row_tile, col_tile, first, rows, col_first, cols,
        tall, wide, parts_stride, offset, ROWS, COLS, 1,
    )  # fmt: skip


@triton.jit
def tile_stats(
    p, row_terms, col_terms, positive, row_parts, col_parts, row_tile, col_tile, first, rows, col_first, cols,
    tall, wide, parts_stride, offset, ROWS: tl.constexpr, COLS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Reduces a tile of products p to row_parts and col_parts, its columns in PARTS (1 or 4) steps."""
    part_of = quarters(p, ROWS, COLS) if PARTS == 4 else (p,)
    WIDTH: tl.constexpr = COLS // PARTS
    edge = at_edge(row_tile, col_tile, rows - first, cols - col_first, offset + first - col_first, ROWS, COLS)
    tall, wide, parts_stride = multiple(tall, True), multiple(wide, True), multiple(parts_stride, True)
    col_first = multiple(col_first, True)
    i = first + row_tile * ROWS + tl.arange(0, ROWS)
    left = tl.load(row_terms + i)
    m = tl.full((ROWS,), NONE, tl.float32)
    l, w = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)  # noqa: E741
    for part in tl.static_range(PARTS):
        start = col_first + col_tile * COLS + part * WIDTH
        j = start + tl.arange(0, WIDTH)
        if edge:
            pair = i + offset
            here = (pair >= start) & (pair < tl.minimum(cols, start + WIDTH)) & (i < rows)
            c = tl.sum(tl.where(j[None, :] == pair[:, None], part_of[part], 0.0), 1) * tl.load(row_terms + tall + i)
            tl.store(positive + i, c * tl.load(col_terms + pair, mask=here, other=0.0), mask=here)
        u = part_of[part] * left[:, None] * tl.load(col_terms + j)[None, :]
        if edge:
            excluded = (j[None, :] == (i + offset)[:, None]) | (i >= rows)[:, None] | (j >= cols)[None, :]
            u = tl.where(excluded, NONE, u)
        # Both sides are rescaled to the new maximum: the row's sums so far, and this part's.
        part_m = tl.max(u, 1)
        part_l, part_w = softmax_sums(tl.exp2((u - part_m[:, None]) * LOG2E), u, 1)
        highest = tl.maximum(m, part_m)
        old, new = tl.exp2((m - highest) * LOG2E), tl.exp2((part_m - highest) * LOG2E)
        col_m = tl.max(u, 0)
        col_l, col_w = softmax_sums(tl.exp2((u - col_m[None, :]) * LOG2E), u, 0)
        store_partials(col_parts, col_m, col_l, col_w, row_tile, wide, j)
        m, l, w = highest, l * old + part_l * new, w * old + part_w * new  # noqa: E741
    at = row_tile * ROWS + tl.arange(0, ROWS)
    store_partials(row_parts, m, l, w, col_first // COLS + col_tile, parts_stride, at)


@triton.jit
def softmax_sums(e, u, AXIS: tl.constexpr):
    """Σ e and Σ e · u along AXIS."""
    return tl.reduce((e, e * u), AXIS, _add_both)


@triton.jit
def _add_both(first, second, more_first, more_second):
    return first + more_first, second + more_second


@triton.jit(do_not_specialize=INTEGERS, do_not_specialize_on_alignment=["factor", "positive_g"])
def scores_grad_kernel(
    x,  # [rows, dim] bfloat16 or float16, x_stride apart
    t,  # [cols, dim] x's dtype or int8, t_stride apart
    row_terms,  # [4, tall]
    col_terms,  # [3, wide]
    factor,  # []
    positive_g,  # [rows]
    out,  # [rows - first, cols] padded to tiles, x's dtype, out_stride apart
    first, rows, cols, dim, x_stride, t_stride, tall, wide, out_stride, offset,
    ALIGNED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """A program per tile of rows first..rows-1 and all columns."""
    row_tile, col_tile = tile_at(tl.program_id(0), rows - first, cols, ROWS, COLS, 8)
    i, j = first + row_tile * ROWS + tl.arange(0, ROWS), fanned(col_tile * COLS, COLS)
    p = products(x, t, i, j, rows, cols, dim, x_stride, t_stride, ROWS, COLS, DEPTH, ALIGNED)
    tile_gradient(
        unfanned(p, ROWS, COLS), row_terms, col_terms, factor, positive_g, out, out.dtype.element_ty,
        row_tile, col_tile, first, rows, 0, cols, tall, wide, out_stride, offset, ROWS, COLS, 4,
    )  # fmt: skip


@triton.jit(do_not_specialize=INTEGERS, do_not_specialize_on_alignment=["factor", "positive_g"])
def grad_kernel(
    p,  # [rows - first, cols - col_first], p_stride apart
    row_terms,  # [4, tall]
    col_terms,  # [3, wide]
    factor,  # []
    positive_g,  # [rows]
    out,  # [rows - first, cols - col_first] padded to tiles, out_stride apart; may be p
    first, rows, col_first, cols, p_stride, tall, wide, out_stride, offset,
    ALIGNED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """A program per tile of rows first..rows-1 and columns col_first..cols-1, whose products are in memory."""
    row_tile, col_tile = tile_at(tl.program_id(0), rows - first, cols - col_first, ROWS, COLS, 1)
    i, j = row_tile * ROWS + tl.arange(0, ROWS), col_tile * COLS + tl.arange(0, COLS)
    tile_gradient(
        stored(p, i, j, rows - first, cols - col_first, multiple(p_stride, ALIGNED)), row_terms, col_terms, factor,
        positive_g, out, out.dtype.element_ty, row_tile, col_tile, first, rows, col_first, cols,
        tall, wide, out_stride, offset, ROWS, COLS, 1,
    )  # fmt: skip


@triton.jit
def tile_gradient(
    p, row_terms, col_terms, factor, positive_g, out, dtype: tl.constexpr, row_tile, col_tile, first, rows, col_first,
    cols, tall, wide, out_stride, offset, ROWS: tl.constexpr, COLS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """out = factor · a · q · g of a tile of products p, in dtype, its columns in PARTS (1 or 4) steps.

    float16, whose range is too small for a and q: factor · g. out_stride: None if out is a tensor descriptor.
    """
    part_of = quarters(p, ROWS, COLS) if PARTS == 4 else (p,)
    WIDTH: tl.constexpr = COLS // PARTS
    tall, wide = multiple(tall, True), multiple(wide, True)
    col_first = multiple(col_first, True)
    i = first + row_tile * ROWS + tl.arange(0, ROWS)
    left = tl.load(row_terms + i)
    row_m, row_share = tl.load(row_terms + 2 * tall + i), tl.load(row_terms + 3 * tall + i)
    given, f = tl.load(positive_g + i, mask=i < rows, other=0.0), tl.load(factor)
    crossing = at_edge(row_tile, col_tile, rows - first, cols - col_first, offset + first - col_first, ROWS, COLS)
    if out_stride is not None:
        out_stride = multiple(out_stride, True)
        to = out + (row_tile * ROWS).to(tl.int64) * out_stride + tl.arange(0, ROWS)[:, None] * out_stride
    for part in tl.static_range(PARTS):
        start = col_tile * COLS + part * WIDTH
        along = start + tl.arange(0, WIDTH)
        j = col_first + along
        right, col_m = tl.load(col_terms + j), tl.load(col_terms + wide + j)
        col_share = tl.load(col_terms + 2 * wide + j)
        u = part_of[part] * left[:, None] * right[None, :]
        g = tl.exp2(tl.fma(u - row_m[:, None], LOG2E, row_share[:, None]))
        g += tl.exp2(tl.fma(u - col_m[None, :], LOG2E, col_share[None, :]))
        if crossing:
            g = tl.where(j[None, :] == (i + offset)[:, None], given[:, None], g)
        if dtype == tl.float16:
            g *= f
        else:
            g = g * (left * f)[:, None] * right[None, :]
        if out_stride is not None:
            tl.store(to + along[None, :], round_to(g, dtype))
        else:
            out.store([row_tile * ROWS, start], round_to(g, dtype))


@triton.jit
def with_negatives(state, stride, i, n, z, c):
    """Combines positives of score z with the (m, l, w) of the negatives of their rows, or columns.

    Returns m and l over all pairs, the loss, its derivative by scale, and 1 − p.
    """
    m = tl.load(state + i, mask=i < n, other=0.0)
    l = tl.load(state + stride + i, mask=i < n, other=1.0)  # noqa: E741
    w = tl.load(state + 2 * stride + i, mask=i < n, other=0.0)
    low = (l > 0.0) & (l < 1.0)  # m may lie above the maximum; it is lowered until l = 1
    grow = tl.where(low, 1.0 / l, 1.0)
    m = tl.where(low, m + tl.log(l), m)
    most = tl.where((z > m) | (z != z), z, m)  # a NaN in z propagates
    shrink = tl.exp(m - most)
    negatives, e = l * grow * shrink, tl.exp(z - most)
    total = negatives + e
    x = negatives + (e - 1.0)  # 0 or more: negatives are 1 or more, or e is 1
    loss = (most - z) + tl.where(x < 1.0, log1p(x), tl.log(1.0 + x))
    return most, total, loss, (w * grow * shrink - negatives * c) / total, negatives / total


@triton.jit(
    do_not_specialize=["n", "row_stride", "col_stride", "weight"], do_not_specialize_on_alignment=["row", "col"]
)
def positives_kernel(
    row,  # [3, n], row_stride apart
    col,  # [3, n], col_stride apart
    positive,  # [n]
    scale, bias,  # []
    weight,
    out,  # [9, n]
    n, row_stride, col_stride, N: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * N + tl.arange(0, N)
    c = tl.load(positive + i, mask=i < n, other=0.0)
    z = tl.fma(tl.load(scale), c, tl.load(bias))
    row_m, row_l, row_loss, row_d, row_rest = with_negatives(row, row_stride, i, n, z, c)
    col_m, col_l, col_loss, col_d, col_rest = with_negatives(col, col_stride, i, n, z, c)
    row_g, col_g = -weight * row_rest, -weight * col_rest
    tl.store(out + i, 0.5 * (row_loss + col_loss), mask=i < n)
    tl.store(out + n + i, 0.5 * (row_d + col_d), mask=i < n)
    tl.store(out + 2 * n + i, row_g, mask=i < n)
    tl.store(out + 3 * n + i, col_g, mask=i < n)
    tl.store(out + 4 * n + i, row_g + col_g, mask=i < n)
    tl.store(out + 5 * n + i, row_m, mask=i < n)
    tl.store(out + 6 * n + i, row_l, mask=i < n)
    tl.store(out + 7 * n + i, col_m, mask=i < n)
    tl.store(out + 8 * n + i, col_l, mask=i < n)


def stats(
    p: Tensor, terms: Terms, positive: Tensor, row_parts: Tensor, col_parts: Tensor, rows: tuple[int, int],
    cols: tuple[int, int], offset: int, config: TileConfig,
) -> None:  # fmt: skip
    """Statistics of products p, float32, of the rows and columns [start, stop); the first column starts a tile.

    Positives are left out. positive [all rows]: c of row i's positive, column offset + i, is written if that is one of
    the columns. row_parts, col_parts: from `partials`, for these rows and all columns.
    """
    (first, stop), (col_first, col_stop) = rows, cols
    stats_kernel[(tiles(stop - first, col_stop - col_first, config),)](
        p, terms.rows, terms.cols, positive, row_parts, col_parts, first, stop, col_first, col_stop,
        p.stride(0), terms.rows.stride(0), terms.cols.stride(0), row_parts.stride(1), offset,
        ALIGNED=spaced(p), **config.stored(), **OPTIONS,
    )  # fmt: skip


def scores_stats(
    x: Tensor, t: Tensor, terms: Terms, positive: Tensor, keep: Tensor | None, row_parts: Tensor, col_parts: Tensor,
    rows: tuple[int, int], offset: int, config: TileConfig,
) -> None:  # fmt: skip
    """`stats` of the products of these rows with all columns, which are formed here and stored only in keep, if given.

    x [all rows, dim]: bfloat16 or float16; t [cols, dim]: the same, or int8. keep [all rows, cols].
    """
    first, stop = rows
    scores_stats_kernel[(tiles(stop - first, len(t), config),)](
        x, t, terms.rows, terms.cols, positive, keep, row_parts, col_parts, first, stop, len(t), x.shape[1],
        x.stride(0), t.stride(0), 0 if keep is None else keep.stride(0), terms.rows.stride(0), terms.cols.stride(0),
        row_parts.stride(1), offset,
        ALIGNED=aligned(x) and aligned(t) and (keep is None or spaced(keep)),
        EVEN=keep is not None and len(t) % 16 == 0, **config.fused(), **OPTIONS,
    )  # fmt: skip


def grad(
    p: Tensor, terms: Terms, positive_g: Tensor, out: Tensor, rows: tuple[int, int], cols: tuple[int, int], offset: int,
    config: TileConfig,
) -> None:  # fmt: skip
    """out = factor · a · q · g of products p, in out's dtype (float16: factor · g). out may be p.

    out: these rows and columns, padded to whole tiles; positive_g [all rows]: g of positives.
    """
    (first, stop), (col_first, col_stop) = rows, cols
    grad_kernel[(tiles(stop - first, col_stop - col_first, config),)](
        p, terms.rows, terms.cols, terms.factor, positive_g, out, first, stop, col_first, col_stop,
        p.stride(0), terms.rows.stride(0), terms.cols.stride(0), out.stride(0), offset,
        ALIGNED=spaced(p), **config.stored(), **OPTIONS,
    )  # fmt: skip


def scores_grad(
    x: Tensor, t: Tensor, terms: Terms, positive_g: Tensor, out: Tensor, rows: tuple[int, int], offset: int,
    config: TileConfig,
) -> None:  # fmt: skip
    """`grad` of the products of these rows of x with all of t, which are formed here and never reach memory."""
    first, stop = rows
    scores_grad_kernel[(tiles(stop - first, len(t), config),)](
        x, t, terms.rows, terms.cols, terms.factor, positive_g, out, first, stop, len(t), x.shape[1],
        x.stride(0), t.stride(0), terms.rows.stride(0), terms.cols.stride(0), out.stride(0), offset,
        ALIGNED=aligned(x) and aligned(t), **config.fused(), **OPTIONS,
    )  # fmt: skip


def positives(
    row: Tensor, col: Tensor, positive: Tensor, scale: Tensor, bias: Tensor, weight: float, out: Tensor
) -> None:
    """See `Backend.positives` in ops/pairs/contract.py; out [9, n]."""
    n = len(positive)
    positives_kernel[(-(-n // POSITIVES),)](
        row, col, positive, scale, bias, weight, out, n, row.stride(0), col.stride(0), N=POSITIVES, **OPTIONS
    )
