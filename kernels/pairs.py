"""What the kernels over pairs share: a tile of the score matrix, and the merging of what its tiles found.

The products p = x @ t.T of one block, [rows, cols] in float32, come by tiles: computed here from the
features (`products`), or read from memory where cuBLAS left them (`stored`).

    program: a tile of ROWS × COLS, in an order that keeps both sides' features in the L2 (`tile_at`)
        p = 0
        for k in steps of DEPTH:
            p += x[i, k : +DEPTH] @ t[j, k : +DEPTH].T     int8 codes are widened in registers, exactly
        c = a_i · q_j · p                                  the scores (`scores`); z = logit_scale · c + logit_bias

A step of 128 × 256 × 64 in bfloat16 does 4.2 MFLOP on the 48 KB it moves into shared memory: the tensor cores
are the bound, and the epilogue is what they wait for: about ten float operations, two exponentials and the
shuffles of two reductions for each of 32 768 elements, as long as some 500 of dim take.

Rows and columns beyond the edge load the last one instead of being masked: what comes out of them is never
stored, and its scores count as −inf.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .interpreter import dot, round_to, widen


class Tile(NamedTuple):
    """ROWS × COLS of the scores a program, DEPTH of the features a step."""

    rows: int
    cols: int
    depth: int
    warps: int
    stages: int


# Chosen from registers and shared memory as the compiler reports them (none spills: see the tests); not measured
# yet. By compute capability, the last that is not above the device's. "wide" and "narrow": two-byte features, and
# int8 codes beside them, under an epilogue that needs few and many registers; "float32"; "odd": features that are
# not aligned (`aligned`), which pass through registers. Eight warps hold 128 × 128 sums in 64 registers a thread
# and 128 × 256 in 128. 8.6, 8.9 and 12.0 have 99 KB of shared memory and no wgmma, so they share 8.0's.
_AMPERE = {
    "wide": Tile(128, 128, 32, 8, 4),
    "narrow": Tile(128, 128, 32, 8, 4),
    "float32": Tile(64, 64, 32, 4, 3),
    "odd": Tile(64, 64, 32, 8, 2),
}
_HOPPER = _AMPERE | {"wide": Tile(128, 256, 64, 8, 3), "narrow": Tile(128, 128, 64, 8, 3)}
TILES = {(8, 0): _AMPERE, (9, 0): _HOPPER, (10, 0): _HOPPER, (12, 0): _AMPERE}
STORED = Tile(64, 64, 0, 8, 1)  # over products in memory: a warp reads rows of 256 bytes
MERGE = (32, 32)  # tiles × rows that a program merges at once


def aligned(features: Tensor) -> bool:
    """Whether rows start on 16 bytes and their length and distance divide by 16, as copies to shared memory want."""
    return all(n % 16 == 0 for n in (features.data_ptr(), features.stride(0), features.shape[1]))


def tile_for(x: Tensor, t: Tensor, kind: str) -> Tile:
    """The tile in which a kernel forms the products of x and t; kind: "wide" or "narrow"."""
    here = torch.cuda.get_device_capability(x.device) if x.is_cuda else min(TILES)
    tiles = TILES[max((known for known in TILES if known <= here), default=min(TILES))]
    if not aligned(x) or not aligned(t):
        return tiles["odd"]
    return tiles["float32" if x.dtype == torch.float32 else kind]


@triton.jit
def tile_at(rows, cols, ROWS: tl.constexpr, COLS: tl.constexpr, GROUP: tl.constexpr):
    """(row tile, column tile) of this program: GROUP row tiles pass over the columns together."""
    row_tiles = tl.cdiv(rows, ROWS)
    a_group = GROUP * tl.cdiv(cols, COLS)
    program = tl.program_id(0)
    first = program // a_group * GROUP
    height = tl.minimum(row_tiles - first, GROUP)
    return first + program % a_group % height, program % a_group // height


@triton.jit
def crossed(row_tile, col_tile, offset, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Whether a row of this tile has its own column, offset + row, in it."""
    ahead = col_tile * COLS - row_tile * ROWS - offset
    return (ahead > -COLS) & (ahead < ROWS)


@triton.jit
def products(
    x, t, i, j, rows, cols, dim, x_stride, t_stride,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """x[i] @ t[j].T in float32."""
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
    """p[i, j]."""
    mask = (i < rows)[:, None] & (j < cols)[None, :]
    return tl.load(p + i.to(tl.int64)[:, None] * stride + j[None, :], mask=mask, other=0.0)


@triton.jit
def store(out, tile, i, j, rows, cols, stride):
    mask = (i < rows)[:, None] & (j < cols)[None, :]
    tl.store(out + i.to(tl.int64)[:, None] * stride + j[None, :], tile, mask=mask)


@triton.jit
def scores(p, a, q, i, j, rows, cols):
    """c = a_i · q_j · p; a or q may be None, which is 1."""
    if a is not None:
        p = p * tl.load(a + i, mask=i < rows, other=0.0)[:, None]
    if q is not None:
        p = p * tl.load(q + j, mask=j < cols, other=0.0)[None, :]
    return p


@triton.jit
def product_gradient(g, factor, a, q, i, j, rows, cols, dtype: tl.constexpr):
    """factor · a · q · g, rounded to dtype; in float16, whose range has no room for a and q, factor · g."""
    g = g * tl.load(factor)
    if dtype != tl.float16:
        g = scores(g, a, q, i, j, rows, cols)
    return round_to(g, dtype)


@triton.jit
def softmax_partials(z, c, AXIS: tl.constexpr):
    """(m, l, w) along AXIS: m = max z, l = Σ exp(z − m), w = Σ exp(z − m)·c. A NaN in z makes l NaN."""
    m = tl.max(z, AXIS)
    e = tl.exp(z - tl.expand_dims(tl.where(m == float("-inf"), 0.0, m), AXIS))
    return m, tl.sum(e, AXIS), tl.sum(e * c, AXIS)


@triton.jit
def store_partials(parts, first, second, third, tile, at, n):
    """Into parts[tile, :, at] of [tiles, 3, n]."""
    to = parts + tile.to(tl.int64) * 3 * n + at
    tl.store(to, first, mask=at < n)
    tl.store(to + n, second, mask=at < n)
    tl.store(to + 2 * n, third, mask=at < n)


@triton.jit
def merge_softmax_kernel(parts, out, tiles, n, out_stride, TILES: tl.constexpr, N: tl.constexpr):
    """Merges parts [tiles, 3, n] of (m, l, w) into out [3, n], in the order of the tiles."""
    at = tl.program_id(0) * N + tl.arange(0, N)
    inside = at < n
    m = tl.load(out + at, mask=inside, other=float("-inf"))
    l = tl.load(out + out_stride + at, mask=inside, other=0.0)  # noqa: E741
    w = tl.load(out + 2 * out_stride + at, mask=inside, other=0.0)
    for first in range(0, tiles, TILES):
        tile = first + tl.arange(0, TILES)
        mask = (tile < tiles)[:, None] & inside[None, :]
        part = parts + tile.to(tl.int64)[:, None] * 3 * n + at[None, :]
        part_m = tl.load(part, mask=mask, other=float("-inf"))
        highest = tl.maximum(m, tl.max(part_m, 0))
        base = tl.where(highest == float("-inf"), 0.0, highest)
        old, new = tl.exp(m - base), tl.exp(part_m - base[None, :])
        l = l * old + tl.sum(tl.load(part + n, mask=mask, other=0.0) * new, 0)  # noqa: E741
        w = w * old + tl.sum(tl.load(part + 2 * n, mask=mask, other=0.0) * new, 0)
        m = highest
    tl.store(out + at, m, mask=inside)
    tl.store(out + out_stride + at, l, mask=inside)
    tl.store(out + 2 * out_stride + at, w, mask=inside)


@triton.jit
def merge_sums_kernel(parts, first, second, third, tiles, n, TILES: tl.constexpr, N: tl.constexpr):
    """Adds the tiles of parts [tiles, 3, n] to three vectors [n], in the order of the tiles."""
    at = tl.program_id(0) * N + tl.arange(0, N)
    inside = at < n
    one = tl.load(first + at, mask=inside, other=0.0)
    two = tl.load(second + at, mask=inside, other=0.0)
    three = tl.load(third + at, mask=inside, other=0.0)
    for start in range(0, tiles, TILES):
        tile = start + tl.arange(0, TILES)
        mask = (tile < tiles)[:, None] & inside[None, :]
        part = parts + tile.to(tl.int64)[:, None] * 3 * n + at[None, :]
        one += tl.sum(tl.load(part, mask=mask, other=0.0), 0)
        two += tl.sum(tl.load(part + n, mask=mask, other=0.0), 0)
        three += tl.sum(tl.load(part + 2 * n, mask=mask, other=0.0), 0)
    tl.store(first + at, one, mask=inside)
    tl.store(second + at, two, mask=inside)
    tl.store(third + at, three, mask=inside)


def partials(tiles: int, n: int, device: torch.device) -> Tensor:
    """Room for three numbers of each of n rows (or columns) from every tile across them."""
    return torch.empty((tiles, 3, n), dtype=torch.float32, device=device)


def merge_softmax(parts: Tensor, out: Tensor) -> None:
    """parts [tiles, 3, n] of (m, l, w) into the running out [3, n]."""
    tiles, _, n = parts.shape
    grid = (triton.cdiv(n, MERGE[1]),)
    merge_softmax_kernel[grid](parts, out, tiles, n, out.stride(0), TILES=MERGE[0], N=MERGE[1])


def merge_sums(parts: Tensor, first: Tensor, second: Tensor, third: Tensor) -> None:
    """The sums over tiles of parts [tiles, 3, n], added to three vectors [n]."""
    tiles, _, n = parts.shape
    grid = (triton.cdiv(n, MERGE[1]),)
    merge_sums_kernel[grid](parts, first, second, third, tiles, n, TILES=MERGE[0], N=MERGE[1])
