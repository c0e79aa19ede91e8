"""Symmetric InfoNCE over one block of scores (CLIP, arXiv 2103.00020, figure 3).

z_ij = u_ij + logit_bias,  u_ij = logit_scale · a_i · q_j · (x_i · t_j);  row i's positive pair is column offset + i
g_ij = row_weight · exp(z_ij − m_i) / l_i + col_weight · exp(z_ij − m_j) / l_j,   and own_g_i for positive pairs

    stats, a tile of ROWS × COLS:                   then merge_softmax: parts of all tiles -> the running (m, l, w)
        p = products (pairs.py), or from memory     in a fixed order: no atomics, the same bits every time
        positive[i] = the score of (i, offset + i), if it lies here;  u = NONE there and beyond the edge
        a quarter of the columns at a time, row by row, column by column:
            m = max u, l = Σ exp(u − m), w = Σ exp(u − m) · u;  rows: over the quarters -> row_parts[tile], col_parts
    grad, a tile:
        p, u as above;  out = factor · a_i · q_j · g, rounded once to the dtype of the next GEMMs:
        g = 2^((u − (m_i − logit_bias)) log2 e + log2(row_weight / l_i)) + the same by the column

    positives, a pair: loss, g and the (m, l) over all pairs from its z and the (m, l, w) of its row and its column

Own pairs are left out of the sums and their g is given because p − 1 cancels for a pair that has converged: the
sum over the others is what has its digits. m and l come apart because m + log l forgets l where |m| is large. For the
same reason u is rounded before m is subtracted, by the same two multiplications in both kernels and with no fused
multiply-add to round it otherwise (`OPTIONS`).

The two gradients are GEMMs with the same matrix. d_image_i = scale·a_i Σ_j g_ij q_j t_j and
d_text_j = scale·q_j Σ_i g_ij a_i x_i both want G = scale·a·q·g, the gradient of the product x_i · t_j itself:
d_image = G @ t and d_text = G.T @ x. So one buffer of 2 bytes an element (4 in float32) serves both sides, with
or without a and q, and nothing is scaled afterwards; what bfloat16 rounds away does not depend on the scale.
float16 has no range for a and q (1e12 for a zero row): there out = factor · g, and the GEMMs take a·x and q·t.

Formed from features, a tile's 2 · ROWS · COLS · dim FLOP are the bound (tensor cores), and nothing reaches
memory but parts: 12 (1/ROWS + 1/COLS) bytes an element, 0.19 for 128 × 128. Over products in memory a tile reads
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
    log1p,
    multiple,
    quarters,
    spaced,
    store_partials,
    stored,
    tile_at,
    tile_products,
)

OPTIONS = {"enable_fp_fusion": False}
POSITIVES = 256  # positive pairs a program
INTEGERS = [
    "first", "rows", "cols", "dim", "x_stride", "t_stride", "p_stride", "keep_stride", "out_stride", "tall", "wide",
    "parts_stride", "col_first", "offset",
]  # fmt: skip


@triton.jit
def sums_of(e, u, AXIS: tl.constexpr):
    """Σ e and Σ e · u along AXIS."""
    return tl.reduce((e, e * u), AXIS, both)


@triton.jit
def both(first, second, more_first, more_second):
    return first + more_first, second + more_second


@triton.jit
def stats_of(
    p, left, row_terms, col_terms, positive, col_parts, m, l, w, row_tile, i, first, rows, cols,  # noqa: E741
    tall, wide, edge, offset, COLS: tl.constexpr,
):  # fmt: skip
    """Merges a tile's COLS columns from first on into (m, l, w) of its rows; their positive goes to col_parts[row_tile]."""
    j = first + tl.arange(0, COLS)
    if edge:
        pair = i + offset
        here = (pair >= first) & (pair < tl.minimum(cols, first + COLS)) & (i < rows)
        mine = tl.sum(tl.where(j[None, :] == pair[:, None], p, 0.0), 1) * tl.load(row_terms + tall + i)
        tl.store(positive + i, mine * tl.load(col_terms + pair, mask=here, other=0.0), mask=here)
    u = p * left[:, None] * tl.load(col_terms + j)[None, :]
    if edge:
        out = (j[None, :] == (i + offset)[:, None]) | (i >= rows)[:, None] | (j >= cols)[None, :]
        u = tl.where(out, NONE, u)
    # The row's maximum so far stays the reference of what was added up before.
    part_m = tl.max(u, 1)
    part_l, part_w = sums_of(tl.exp2((u - part_m[:, None]) * LOG2E), u, 1)
    highest = tl.maximum(m, part_m)
    old, new = tl.exp2((m - highest) * LOG2E), tl.exp2((part_m - highest) * LOG2E)
    col_m = tl.max(u, 0)
    col_l, col_w = sums_of(tl.exp2((u - col_m[None, :]) * LOG2E), u, 0)
    store_partials(col_parts, col_m, col_l, col_w, row_tile, wide, j)
    return highest, l * old + part_l * new, w * old + part_w * new


@triton.jit
def gradient_of(
    p, left, row_m, row_share, factor, col_terms, positive_g, i, j, wide, crossing, offset, dtype: tl.constexpr
):  # fmt: skip
    """factor · a · q · g of a tile, in dtype; in float16, whose range has no room for a and q, factor · g."""
    right, col_m, col_share = tl.load(col_terms + j), tl.load(col_terms + wide + j), tl.load(col_terms + 2 * wide + j)
    u = p * left[:, None] * right[None, :]
    g = tl.exp2(tl.fma(u - row_m[:, None], LOG2E, row_share[:, None]))
    g += tl.exp2(tl.fma(u - col_m[None, :], LOG2E, col_share[None, :]))
    if crossing:
        g = tl.where(j[None, :] == (i + offset)[:, None], positive_g[:, None], g)
    if dtype == tl.float16:
        g *= factor
    else:
        g = g * (left * factor)[:, None] * right[None, :]
    return round_to(g, dtype)


@triton.jit
def stats_of_tile(
    p, row_terms, col_terms, positive, row_parts, col_parts, row_tile, col_tile, first, rows, cols,
    tall, wide, parts_stride, offset, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """What a tile of products p, of rows first..rows-1, adds to the statistics, a quarter at a time."""
    quarter = quarters(p, ROWS, COLS)
    edge = at_edge(row_tile, col_tile, rows - first, cols, offset + first, ROWS, COLS)
    tall, wide, parts_stride = multiple(tall, True), multiple(wide, True), multiple(parts_stride, True)
    i = first + row_tile * ROWS + tl.arange(0, ROWS)
    left = tl.load(row_terms + i)
    m = tl.full((ROWS,), NONE, tl.float32)
    l, w = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)  # noqa: E741
    for part in tl.static_range(4):
        m, l, w = stats_of(  # noqa: E741
            quarter[part], left, row_terms, col_terms, positive, col_parts, m, l, w, row_tile, i,
            col_tile * COLS + part * (COLS // 4), rows, cols, tall, wide, edge, offset, COLS // 4,
        )  # fmt: skip
    store_partials(row_parts, m, l, w, col_tile, parts_stride, row_tile * ROWS + tl.arange(0, ROWS))


@triton.jit
def gradient_of_tile(
    p, row_terms, col_terms, factor, positive_g, out, dtype: tl.constexpr, row_tile, col_tile, first, rows, cols,
    tall, wide, out_stride, offset, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """The gradient of a tile of products p, of rows first..rows-1, by quarters. out_stride: None if out is a tensor
    descriptor."""
    quarter = quarters(p, ROWS, COLS)
    tall, wide = multiple(tall, True), multiple(wide, True)
    i = first + row_tile * ROWS + tl.arange(0, ROWS)
    left, m, share = tl.load(row_terms + i), tl.load(row_terms + 2 * tall + i), tl.load(row_terms + 3 * tall + i)
    given, f = tl.load(positive_g + i, mask=i < rows, other=0.0), tl.load(factor)
    crossing = at_edge(row_tile, col_tile, rows - first, cols, offset + first, ROWS, COLS)
    if out_stride is not None:
        out_stride = multiple(out_stride, True)
        to = out + (row_tile * ROWS).to(tl.int64) * out_stride + tl.arange(0, ROWS)[:, None] * out_stride
    for part in tl.static_range(4):
        from_col = col_tile * COLS + part * (COLS // 4)
        j = from_col + tl.arange(0, COLS // 4)
        g = gradient_of(quarter[part], left, m, share, f, col_terms, given, i, j, wide, crossing, offset, dtype)
        if out_stride is not None:
            tl.store(to + j[None, :], g)
        else:
            out.store([row_tile * ROWS, from_col], g)


@triton.jit(do_not_specialize=INTEGERS, do_not_specialize_on_alignment=["positive"])
def scores_stats_kernel(
    x, t, row_terms, col_terms, positive, keep, row_parts, col_parts, first, rows, cols, dim,
    x_stride, t_stride, keep_stride, tall, wide, parts_stride, offset,
    ALIGNED: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    row_tile, col_tile = tile_at(tl.program_id(0), rows - first, cols, ROWS, COLS, 8)
    p = tile_products(
        x, t, row_tile, col_tile, first, rows, cols, dim, x_stride, t_stride, ROWS, COLS, DEPTH, ALIGNED
    )  # fmt: skip
    if keep is not None:
        # All at once and in 32 bits within the tile: by quarters, or in 64, the registers are too few.
        keep_stride = multiple(keep_stride, ALIGNED)
        to = keep + (first + row_tile * ROWS).to(tl.int64) * keep_stride + col_tile * COLS
        down, along = tl.arange(0, ROWS)[:, None], tl.arange(0, COLS)[None, :]
        inside = (down < rows - first - row_tile * ROWS) & (along < multiple(cols, EVEN) - col_tile * COLS)
        tl.store(to + (down * keep_stride + along), p, mask=inside)
    stats_of_tile(
        p, row_terms, col_terms, positive, row_parts, col_parts, row_tile, col_tile, first, rows, cols,
        tall, wide, parts_stride, offset, ROWS, COLS,
    )  # fmt: skip


@triton.jit(do_not_specialize=INTEGERS, do_not_specialize_on_alignment=["positive"])
def stats_kernel(
    p, row_terms, col_terms, positive, row_parts, col_parts, first, rows, col_first, cols,
    p_stride, tall, wide, parts_stride, offset,
    ALIGNED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    row_tile, col_tile = tile_at(tl.program_id(0), rows - first, cols - col_first, ROWS, COLS, 1)
    i, j = row_tile * ROWS + tl.arange(0, ROWS), col_tile * COLS + tl.arange(0, COLS)
    products = stored(p, i, j, rows - first, cols - col_first, multiple(p_stride, ALIGNED))
    edge = at_edge(row_tile, col_tile, rows - first, cols - col_first, offset + first - col_first, ROWS, COLS)
    tall, wide, parts_stride = multiple(tall, True), multiple(wide, True), multiple(parts_stride, True)
    col_first = multiple(col_first, True)
    left = tl.load(row_terms + first + i)
    m, zero = tl.full((ROWS,), NONE, tl.float32), tl.zeros((ROWS,), tl.float32)
    m, l, w = stats_of(  # noqa: E741
        products, left, row_terms, col_terms, positive, col_parts, m, zero, zero, row_tile, first + i,
        col_first + col_tile * COLS, rows, cols, tall, wide, edge, offset, COLS,
    )  # fmt: skip
    store_partials(row_parts, m, l, w, col_first // COLS + col_tile, parts_stride, i)


@triton.jit(do_not_specialize=INTEGERS, do_not_specialize_on_alignment=["factor", "positive_g"])
def scores_grad_kernel(
    x, t, row_terms, col_terms, factor, positive_g, out, first, rows, cols, dim,
    x_stride, t_stride, tall, wide, out_stride, offset,
    ALIGNED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    row_tile, col_tile = tile_at(tl.program_id(0), rows - first, cols, ROWS, COLS, 8)
    p = tile_products(
        x, t, row_tile, col_tile, first, rows, cols, dim, x_stride, t_stride, ROWS, COLS, DEPTH, ALIGNED
    )  # fmt: skip
    gradient_of_tile(
        p, row_terms, col_terms, factor, positive_g, out, out.dtype.element_ty, row_tile, col_tile, first, rows, cols,
        tall, wide, out_stride, offset, ROWS, COLS,
    )  # fmt: skip


@triton.jit(do_not_specialize=INTEGERS, do_not_specialize_on_alignment=["factor", "positive_g"])
def grad_kernel(
    p, row_terms, col_terms, factor, positive_g, out, first, rows, col_first, cols, p_stride, tall, wide, out_stride, offset,
    ALIGNED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    row_tile, col_tile = tile_at(tl.program_id(0), rows - first, cols - col_first, ROWS, COLS, 1)
    i, j = row_tile * ROWS + tl.arange(0, ROWS), col_tile * COLS + tl.arange(0, COLS)
    products = stored(p, i, j, rows - first, cols - col_first, multiple(p_stride, ALIGNED))
    tall, wide, out_stride = multiple(tall, True), multiple(wide, True), multiple(out_stride, True)
    to = out + i.to(tl.int64)[:, None] * out_stride + j[None, :]
    col_first = multiple(col_first, True)
    i, j = first + i, col_first + j
    left, m, share = tl.load(row_terms + i), tl.load(row_terms + 2 * tall + i), tl.load(row_terms + 3 * tall + i)
    given, f = tl.load(positive_g + i, mask=i < rows, other=0.0), tl.load(factor)
    crossing = at_edge(row_tile, col_tile, rows - first, cols - col_first, offset + first - col_first, ROWS, COLS)
    g = gradient_of(
        products, left, m, share, f, col_terms, given, i, j, wide, crossing, offset, out.dtype.element_ty
    )  # fmt: skip
    tl.store(to, g)


@triton.jit
def positive_of(state, stride, i, n, z, c):
    """Of row i's positive pair, or column i's, and the (m, l, w) of all others: m and l of all, loss, its derivative by
    scale, 1 - p."""
    m = tl.load(state + i, mask=i < n, other=0.0)
    l = tl.load(state + stride + i, mask=i < n, other=1.0)  # noqa: E741
    w = tl.load(state + 2 * stride + i, mask=i < n, other=0.0)
    low = (l > 0.0) & (l < 1.0)  # m may lie above the maximum; its state is brought to l = 1
    grow = tl.where(low, 1.0 / l, 1.0)
    m = tl.where(low, m + tl.log(l), m)
    most = tl.where((z > m) | (z != z), z, m)  # a NaN gets through
    shrink = tl.exp(m - most)
    others, e = l * grow * shrink, tl.exp(z - most)
    total = others + e
    x = others + (e - 1.0)  # of 0 or more: the others are 1 or more, or e is 1
    loss = (most - z) + tl.where(x < 1.0, log1p(x), tl.log(1.0 + x))
    return most, total, loss, (w * grow * shrink - others * c) / total, others / total


@triton.jit(
    do_not_specialize=["n", "row_stride", "col_stride", "weight"], do_not_specialize_on_alignment=["row", "col"]
)
def positives_kernel(row, col, positive, scale, bias, weight, out, n, row_stride, col_stride, N: tl.constexpr):
    i = tl.program_id(0) * N + tl.arange(0, N)
    c = tl.load(positive + i, mask=i < n, other=0.0)
    z = tl.fma(tl.load(scale), c, tl.load(bias))
    row_m, row_l, row_loss, row_d, row_rest = positive_of(row, row_stride, i, n, z, c)
    col_m, col_l, col_loss, col_d, col_rest = positive_of(col, col_stride, i, n, z, c)
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
    """The statistics of products p, float32, of the rows and columns named (from, to): the columns' first is a tile's.

    Own pairs are left out of them; positive [all rows]: the score of row i's positive column offset + i is written where there
    is one. Parts as `partials` makes them, for these rows and all columns.
    """
    (first, stop), (col_first, col_stop) = rows, cols
    stats_kernel[(-(-(stop - first) // config.rows) * -(-(col_stop - col_first) // config.cols),)](
        p, terms.rows, terms.cols, positive, row_parts, col_parts, first, stop, col_first, col_stop,
        p.stride(0), terms.rows.stride(0), terms.cols.stride(0), row_parts.stride(1), offset,
        ALIGNED=spaced(p), ROWS=config.rows, COLS=config.cols, num_warps=config.warps, **OPTIONS,
    )  # fmt: skip


def scores_stats(
    x: Tensor, t: Tensor, terms: Terms, positive: Tensor, keep: Tensor | None, row_parts: Tensor, col_parts: Tensor,
    rows: tuple[int, int], offset: int, config: TileConfig,
) -> None:  # fmt: skip
    """`stats` of the products of these rows with all columns, which reach memory only in keep, if given.

    x [all rows, dim]: bfloat16 or float16; t [cols, dim]: the same, or int8. keep [all rows, cols].
    """
    first, stop = rows
    scores_stats_kernel[(-(-(stop - first) // config.rows) * -(-len(t) // config.cols),)](
        x, t, terms.rows, terms.cols, positive, keep, row_parts, col_parts, first, stop, len(t), x.shape[1],
        x.stride(0), t.stride(0), 0 if keep is None else keep.stride(0), terms.rows.stride(0), terms.cols.stride(0),
        row_parts.stride(1), offset,
        ALIGNED=aligned(x) and aligned(t) and (keep is None or spaced(keep)),
        EVEN=keep is not None and len(t) % 16 == 0,
        ROWS=config.rows, COLS=config.cols, DEPTH=config.depth,
        num_warps=config.warps, num_stages=config.stages, maxnreg=config.registers, **OPTIONS,
    )  # fmt: skip


def grad(
    p: Tensor, terms: Terms, positive_g: Tensor, out: Tensor, rows: tuple[int, int], cols: tuple[int, int], offset: int,
    config: TileConfig,
) -> None:  # fmt: skip
    """out = factor · a · q · g of products p, in out's dtype (float16: factor · g). out may be p.

    out: these rows and columns, with room for whole tiles; positive_g [all rows]: g of positive pairs.
    """
    (first, stop), (col_first, col_stop) = rows, cols
    grad_kernel[(-(-(stop - first) // config.rows) * -(-(col_stop - col_first) // config.cols),)](
        p, terms.rows, terms.cols, terms.factor, positive_g, out, first, stop, col_first, col_stop,
        p.stride(0), terms.rows.stride(0), terms.cols.stride(0), out.stride(0), offset,
        ALIGNED=spaced(p), ROWS=config.rows, COLS=config.cols, num_warps=config.warps, **OPTIONS,
    )  # fmt: skip


def scores_grad(
    x: Tensor, t: Tensor, terms: Terms, positive_g: Tensor, out: Tensor, rows: tuple[int, int], offset: int, config: TileConfig
) -> None:  # fmt: skip
    """`grad` of the products of these rows of x with all of t, which are formed here and never reach memory."""
    first, stop = rows
    scores_grad_kernel[(-(-(stop - first) // config.rows) * -(-len(t) // config.cols),)](
        x, t, terms.rows, terms.cols, terms.factor, positive_g, out, first, stop, len(t), x.shape[1],
        x.stride(0), t.stride(0), terms.rows.stride(0), terms.cols.stride(0), out.stride(0), offset,
        ALIGNED=aligned(x) and aligned(t), ROWS=config.rows, COLS=config.cols, DEPTH=config.depth,
        num_warps=config.warps, num_stages=config.stages, maxnreg=config.registers, **OPTIONS,
    )  # fmt: skip


def positives(row: Tensor, col: Tensor, positive: Tensor, scale: Tensor, bias: Tensor, weight: float, out: Tensor) -> None:
    """See ops/pairs/contract.py; out [9, n]."""
    n = len(positive)
    positives_kernel[(-(-n // POSITIVES),)](
        row, col, positive, scale, bias, weight, out, n, row.stride(0), col.stride(0), N=POSITIVES, **OPTIONS
    )
