"""Shared tile helpers of the pair losses' kernels, and the reductions of partial results over tiles.

The products p = x @ t.T of a ScoreTile, float32, are formed from the features (`products`), or read from memory where
cuBLAS stored them (`stored`). u = scale · a_i · q_j · p are the scores without logit_bias.

    terms: what depends on a row or a column alone, once for all tiles                 -> row_terms, col_terms
    program: a tile of ROWS × COLS, in an order that keeps both sides' features in the L2 (`tile_at`)
        p = 0
        for k in steps of DEPTH:
            p += x[i, k : +DEPTH] @ t[j, k : +DEPTH].T     int8 codes are widened in registers, exactly
        for each quarter of the columns (`quarters`): scores, partial sums, gradient   -> parts, out
    merge: adds the parts of all tiles, in the order of the tiles                      -> the caller's sums

A step of 128 × 128 × 64 in bfloat16 does 2.1 MFLOP on the 32 KB that it moves into shared memory: the tensor cores are
the bound, as long as the epilogue is hidden. A multiprocessor takes 48 issue slots of each scheduler for the products
of 32 scores at a dim of 768, and some 20 (gradient) to 40 (statistics) for their epilogue. So two programs share it,
and one's epilogue overlaps with the other's products: 128 registers a thread, half the shared memory.

A thread's tensor core results are pairs of columns, 8 apart. The texts of a tile are therefore loaded in an order
(`fanned`) in which these are 8 neighbouring columns: 16 bytes at once in bfloat16.

Rows and columns beyond the edge load the last one instead of being masked. Terms, parts and gradients are allocated
for whole tiles, so only the caller's tensors need masks.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .interpreter import dot, widen

LOG2E = tl.constexpr(1.4426950408889634)
NONE = tl.constexpr(-1e36)  # the score of an excluded pair: 256 of them add up to a finite number
LEAST = tl.constexpr(1e-20)  # lower bound of |logit_scale|: u / scale must be finite
PAD = 256  # rows and columns of terms, parts and gradients are padded to a multiple of it; every tile divides it
TERMS = 512  # rows or columns per program of terms_kernel


class TileConfig(NamedTuple):
    """A program's tile of scores, the dim of a step, and how it is compiled; registers: limit per thread, or None."""

    rows: int
    cols: int
    depth: int
    warps: int
    stages: int
    registers: int | None = None

    def stored(self) -> dict[str, Any]:
        """Launch options of a kernel that reads products from memory."""
        return {"ROWS": self.rows, "COLS": self.cols, "num_warps": self.warps}

    def fused(self) -> dict[str, Any]:
        """Launch options of a kernel that forms the products."""
        return {
            "ROWS": self.rows, "COLS": self.cols, "DEPTH": self.depth,
            "num_warps": self.warps, "num_stages": self.stages, "maxnreg": self.registers,
        }  # fmt: skip


def aligned(features: Tensor) -> bool:
    """Whether rows start on 16 bytes and their length and stride divide by 16, as copies to shared memory require."""
    return features.data_ptr() % 16 == 0 and features.stride(0) % 16 == 0 and features.shape[1] % 16 == 0


def spaced(matrix: Tensor) -> bool:
    """Whether rows start on 16 bytes and their stride divides by 16, whatever their length."""
    return matrix.data_ptr() % 16 == 0 and matrix.stride(0) % 16 == 0


def padded(n: int) -> int:
    """n rounded up to whole tiles of any size."""
    return -(-n // PAD) * PAD


def tiles(rows: int, cols: int, config: TileConfig) -> int:
    """Tiles that cover rows × cols."""
    return -(-rows // config.rows) * -(-cols // config.cols)


@triton.jit
def tile_at(number, rows, cols, ROWS: tl.constexpr, COLS: tl.constexpr, GROUP: tl.constexpr):
    """(row tile, column tile) of a tile's number: GROUP row tiles move over the columns together."""
    row_tiles = tl.cdiv(rows, ROWS)
    per_group = GROUP * tl.cdiv(cols, COLS)
    first = number // per_group * GROUP
    height = tl.minimum(row_tiles - first, GROUP)
    return first + number % per_group % height, number % per_group // height


@triton.jit
def crossed(row_tile, col_tile, offset, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Whether the tile contains the positive, column offset + row, of any of its rows."""
    ahead = col_tile * COLS - row_tile * ROWS - offset
    return (ahead > -COLS) & (ahead < ROWS)


@triton.jit
def multiple(n, ALIGNED: tl.constexpr):
    """n, as a multiple of 16 if ALIGNED: kernels are compiled once for all sizes, so the compiler cannot know it."""
    if ALIGNED:
        n = n // 16 * 16
    return n


@triton.jit
def products(
    x, t, i, j, rows, cols, dim, x_stride, t_stride,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, ALIGNED: tl.constexpr = False,
):  # fmt: skip
    """x[i] @ t[j].T [ROWS, COLS] in float32, of x [rows, dim] and t [cols, dim]."""
    dim, x_stride, t_stride = multiple(dim, ALIGNED), multiple(x_stride, ALIGNED), multiple(t_stride, ALIGNED)
    k = tl.arange(0, DEPTH)
    left = x + tl.minimum(i, rows - 1).to(tl.int64)[:, None] * x_stride + k[None, :]
    right = t + tl.minimum(j, cols - 1).to(tl.int64)[None, :] * t_stride + k[:, None]
    sums = tl.zeros((ROWS, COLS), tl.float32)
    for done in range(0, dim, DEPTH):
        inside = k < dim - done
        features = tl.load(left, mask=inside[None, :], other=0)
        sums = dot(features, widen(tl.load(right, mask=inside[:, None], other=0), features.dtype), sums)
        left += DEPTH
        right += DEPTH
    return sums


@triton.jit
def halves(p, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The left and the right half of a tile's columns."""
    return tl.split(tl.permute(tl.reshape(p, (ROWS, 2, COLS // 2)), (0, 2, 1)))


@triton.jit
def quarters(p, ROWS: tl.constexpr, COLS: tl.constexpr):
    """A tile's columns in four parts: an epilogue on one at a time needs a quarter of the registers."""
    left, right = halves(p, ROWS, COLS)
    first, second = halves(left, ROWS, COLS // 2)
    third, fourth = halves(right, ROWS, COLS // 2)
    return first, second, third, fourth


@triton.jit
def stored(p, i, j, rows, cols, stride):
    """p[i, j] of p [rows, cols], rows `stride` apart; 0 beyond the edge."""
    mask = (i < rows)[:, None] & (j < cols)[None, :]
    return tl.load(p + i.to(tl.int64)[:, None] * stride + j[None, :], mask=mask, other=0.0)


@triton.jit
def store(out, tile, i, j, rows, cols, stride):
    """out[i, j] = tile for out [rows, cols], rows `stride` apart; nothing is written beyond the edge."""
    mask = (i < rows)[:, None] & (j < cols)[None, :]
    tl.store(out + i.to(tl.int64)[:, None] * stride + j[None, :], tile, mask=mask)


@triton.jit
def fanned(first, COLS: tl.constexpr):
    """first..first + COLS - 1, in the order in which a tile loads its columns if its quarters are 32 wide."""
    n = tl.arange(0, COLS)
    if COLS % 128 == 0:
        n = n // 32 * 32 + n % 8 // 2 * 8 + n % 32 // 8 * 2 + n % 2
    return first + n


@triton.jit
def unfanned(p, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Products of fanned columns, back in column order. No data moves: a thread's registers are only renamed."""
    if COLS % 128 == 0:
        p = tl.reshape(tl.permute(tl.reshape(p, (ROWS, COLS // 32, 4, 4, 2)), (0, 1, 3, 2, 4)), (ROWS, COLS))
    return p


@triton.jit
def at_edge(row_tile, col_tile, rows, cols, offset, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Whether a tile contains positives or crosses the end of the rows or columns."""
    return (
        crossed(row_tile, col_tile, offset, ROWS, COLS)
        | (row_tile * ROWS + ROWS > rows)
        | (col_tile * COLS + COLS > cols)
    )  # fmt: skip


@triton.jit
def softmax_terms(state, stride, weight, bias, at, n):
    """m − bias and log2(weight / l) from state [2, n]; (inf, 0), without reading, beyond n and for a weight of 0."""
    read = (at < n) & (weight != 0.0)
    m = tl.load(state + at, mask=read, other=float("inf"))
    share = weight / tl.load(state + stride + at, mask=read, other=1.0)
    return m - bias, tl.where(read, tl.log2(share), 0.0)


@triton.jit(
    do_not_specialize=["row_weight", "col_weight", "rows", "cols", "row_stride", "col_stride", "tall", "wide"],
    do_not_specialize_on_alignment=["a", "q", "scale", "bias", "factor", "row", "col"],
)
def terms_kernel(
    a,  # [rows] or None: row scales
    q,  # [cols] or None: column scales
    scale, bias,  # []
    factor,  # [] or None
    row,  # [2, rows] or None: (m, l), row_stride apart
    col,  # [2, cols] or None: (m, l), col_stride apart
    row_weight, col_weight,
    row_terms,  # [4, tall]
    col_terms,  # [3, wide], followed by the factor
    rows, cols, row_stride, col_stride, tall, wide, NARROW: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Computes `Terms`. The first programs compute the rows', the others the columns'."""
    s, b = tl.load(scale), tl.load(bias)
    s = tl.where(tl.abs(s) < LEAST, LEAST, s)
    at = tl.program_id(0) * N + tl.arange(0, N)
    one = tl.zeros((N,), tl.float32) + 1.0
    if tl.program_id(0) * N < tall:
        if a is not None:
            one = tl.load(a + at, mask=at < rows, other=0.0)
        tl.store(row_terms + at, one * s, mask=at < tall)
        tl.store(row_terms + tall + at, one, mask=at < tall)
        if row is not None:
            m, share = softmax_terms(row, row_stride, row_weight, b, at, rows)
            tl.store(row_terms + 2 * tall + at, m, mask=at < tall)
            tl.store(row_terms + 3 * tall + at, share, mask=at < tall)
    else:
        at -= tl.cdiv(tall, N) * N
        if q is not None:
            one = tl.load(q + at, mask=at < cols, other=0.0)
        tl.store(col_terms + at, one, mask=at < wide)
        if col is not None:
            m, share = softmax_terms(col, col_stride, col_weight, b, at, cols)
            tl.store(col_terms + wide + at, m, mask=at < wide)
            tl.store(col_terms + 2 * wide + at, share, mask=at < wide)
        if factor is not None:
            f = tl.load(factor)
            tl.store(col_terms + 3 * wide, f if NARROW else f / s)


@triton.jit
def log1p(e):
    """log(1 + e) for 0 ≤ e ≤ 1 by a polynomial, to 2e-7 relative.

    1 + e would round a small e off, and the loss of a negative far below 0 is such an e.
    """
    y = tl.fma(e, 0.00523267664, -0.0295051681)
    y = tl.fma(e, y, 0.0782258369)
    y = tl.fma(e, y, -0.13663236)
    y = tl.fma(e, y, 0.191060022)
    y = tl.fma(e, y, -0.24842981)
    y = tl.fma(e, y, 0.333190967)
    y = tl.fma(e, y, -0.499994931)
    return e * tl.fma(e, y, 0.99999997)


@triton.jit
def store_partials(parts, first, second, third, tile, stride, at):
    """Stores three vectors in parts[tile, :, at]; parts: [tiles, 3, stride]."""
    to = parts + (tile * 3).to(tl.int64) * stride + at
    tl.store(to, first)
    tl.store(to + stride, second)
    tl.store(to + 2 * stride, third)


@triton.jit
def merged_softmax(parts, out, at, n, tiles, stride, out_stride, scale, bias, TILES: tl.constexpr):
    """Merges parts [tiles, 3, stride] of (max u, Σ e, Σ e u) into (m, l, w) of out [3, n], in the tiles' order."""
    inside = at < n
    m = tl.load(out + at, mask=inside, other=float("-inf"))
    l = tl.load(out + out_stride + at, mask=inside, other=0.0)  # noqa: E741
    w = tl.load(out + 2 * out_stride + at, mask=inside, other=0.0)
    for first in range(0, tiles, TILES):
        tile = first + tl.arange(0, TILES)
        mask = (tile < tiles)[:, None] & inside[None, :]
        part = parts + tile.to(tl.int64)[:, None] * 3 * stride + at[None, :]
        part_m = tl.load(part, mask=mask, other=NONE)
        part_l = tl.load(part + stride, mask=mask, other=0.0)
        # A tile of excluded pairs only is skipped, but not one whose scores are NaN.
        mask = mask & ((part_m != NONE) | (part_l != part_l))
        part_m, part_l = tl.where(mask, part_m + bias, float("-inf")), tl.where(mask, part_l, 0.0)
        highest = tl.maximum(m, tl.max(part_m, 0))
        base = tl.where(highest == float("-inf"), 0.0, highest)
        old, new = tl.exp(m - base), tl.exp(part_m - base[None, :])
        l = l * old + tl.sum(part_l * new, 0)  # noqa: E741
        w = w * old + tl.sum(tl.load(part + 2 * stride, mask=mask, other=0.0) * new, 0) / scale
        m = highest
    tl.store(out + at, m, mask=inside)
    tl.store(out + out_stride + at, l, mask=inside)
    tl.store(out + 2 * out_stride + at, w, mask=inside)


@triton.jit(
    do_not_specialize=[
        "rows", "cols", "row_tiles", "col_tiles", "tall", "wide", "row_stride", "col_stride"
    ],
    do_not_specialize_on_alignment=["row", "col", "scale", "bias"],
)  # fmt: skip
def merge_softmax_kernel(
    row_parts,  # [row_tiles, 3, tall]
    col_parts,  # [col_tiles, 3, wide]
    row,  # [3, rows], row_stride apart
    col,  # [3, cols], col_stride apart
    scale, bias,  # []
    rows, cols, row_tiles, col_tiles, tall, wide, row_stride, col_stride, TILES: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Both sides at once: the first programs merge row_parts into row, the others col_parts into col."""
    s, b = tl.load(scale), tl.load(bias)
    s = tl.where(tl.abs(s) < LEAST, LEAST, s)
    program, before = tl.program_id(0), tl.cdiv(rows, N)
    parts, out, n, tiles, stride, out_stride = row_parts, row, rows, row_tiles, tall, row_stride
    if program >= before:
        program -= before
        parts, out, n, tiles, stride, out_stride = col_parts, col, cols, col_tiles, wide, col_stride
    merged_softmax(parts, out, program * N + tl.arange(0, N), n, tiles, stride, out_stride, s, b, TILES)


@triton.jit(do_not_specialize=["tiles", "n", "stride"], do_not_specialize_on_alignment=["first", "second", "third"])
def merge_sums_kernel(
    parts,  # [tiles, 3, stride]
    first, second, third,  # [n]
    tiles, n, stride, TILES: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Adds parts, summed over the tiles in their order, to three vectors."""
    at = tl.program_id(0) * N + tl.arange(0, N)
    inside = at < n
    one = tl.load(first + at, mask=inside, other=0.0)
    two = tl.load(second + at, mask=inside, other=0.0)
    three = tl.load(third + at, mask=inside, other=0.0)
    for start in range(0, tiles, TILES):
        tile = start + tl.arange(0, TILES)
        mask = (tile < tiles)[:, None] & inside[None, :]
        part = parts + tile.to(tl.int64)[:, None] * 3 * stride + at[None, :]
        one += tl.sum(tl.load(part, mask=mask, other=0.0), 0)
        two += tl.sum(tl.load(part + stride, mask=mask, other=0.0), 0)
        three += tl.sum(tl.load(part + 2 * stride, mask=mask, other=0.0), 0)
    tl.store(first + at, one, mask=inside)
    tl.store(second + at, two, mask=inside)
    tl.store(third + at, three, mask=inside)


class Terms(NamedTuple):
    """What depends on a row or a column alone; every tile reads it.

    rows [4, tall]: a · scale, a, m − bias, log2(weight / l); cols [3, wide]: q, m − bias, log2(weight / l); padded.
    factor [1]: the factor of left · g · right, where left = a · scale and right = q; in float16 the factor of g.
    """

    rows: Tensor
    cols: Tensor
    factor: Tensor


def terms(
    rows: int, cols: int, a: Tensor | None, q: Tensor | None, scale: Tensor, bias: Tensor, factor: Tensor | None = None,
    row: Tensor | None = None, col: Tensor | None = None, row_weight: float = 0.0, col_weight: float = 0.0,
    narrow: bool = False,
) -> Terms:  # fmt: skip
    """The terms of a ScoreTile. a [rows], q [cols]: float32, or None: all one; scale, bias: float32, 0-d.

    factor: float32, 0-d: the gradient is factor · a · q · g, in float16 (narrow) factor · g. row [2, rows],
    col [2, cols]: (m, l) over all pairs, not read where their weight is 0. None: terms that are not needed.
    """
    tall, wide = padded(rows), padded(cols)
    memory = torch.empty(4 * tall + 3 * wide + 1, dtype=torch.float32, device=scale.device)
    cut, end = 4 * tall, 4 * tall + 3 * wide
    computed = Terms(memory[:cut].view(4, tall), memory[cut:end].view(3, wide), memory[end:])
    terms_kernel[(-(-tall // TERMS) + -(-wide // TERMS),)](
        a, q, scale, bias, factor, row, col, row_weight, col_weight, computed.rows, computed.cols,
        rows, cols, 0 if row is None else row.stride(0), 0 if col is None else col.stride(0), tall, wide,
        NARROW=narrow, N=TERMS,
    )  # fmt: skip
    return computed


def partials(rows: int, cols: int, config: TileConfig, both: bool, like: Tensor) -> tuple[Tensor, Tensor | None]:
    """Allocates parts of the rows [column tiles, 3, tall] and, if both, of the columns [row tiles, 3, wide]."""
    tall, wide = padded(rows), padded(cols)
    across, down = -(-cols // config.cols), -(-rows // config.rows) if both else 0
    memory = torch.empty(3 * (across * tall + down * wide), dtype=torch.float32, device=like.device)
    cut = 3 * across * tall
    return memory[:cut].view(across, 3, tall), memory[cut:].view(down, 3, wide) if both else None


def merge_softmax(
    row_parts: Tensor, col_parts: Tensor, row: Tensor, col: Tensor, scale: Tensor, bias: Tensor, merge: tuple[int, int]
) -> None:
    """Merges parts into the running (m, l, w), row [3, rows] and col [3, cols]. merge: tiles × rows at a time."""
    (tiles, n), rows, cols = merge, row.shape[1], col.shape[1]
    merge_softmax_kernel[(-(-rows // n) + -(-cols // n),)](
        row_parts, col_parts, row, col, scale, bias, rows, cols, len(row_parts), len(col_parts),
        row_parts.stride(1), col_parts.stride(1), row.stride(0), col.stride(0), TILES=tiles, N=n,
    )  # fmt: skip


def merge_sums(parts: Tensor, first: Tensor, second: Tensor, third: Tensor, merge: tuple[int, int]) -> None:
    """Adds parts [tiles, 3, n], summed over the tiles, to three vectors [n]. merge: tiles × rows at a time."""
    tiles, n = merge
    merge_sums_kernel[(-(-len(first) // n),)](
        parts, first, second, third, len(parts), len(first), parts.stride(1), TILES=tiles, N=n
    )
