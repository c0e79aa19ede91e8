"""LayerNorm over rows, forward and backward (Ba et al., arXiv 1607.06450, equations 3 and 4), and sums of partial sums.

s = x + residual,  x̂ = (s − mean) · rstd,  y = x̂ · weight + bias
dx = d_stream + rstd · (g − mean(g) − x̂ · mean(g · x̂)),  g = dy · weight
d_weight = Σ_rows dy · x̂,  d_bias = Σ_rows dy

    forward, a program: ROWS whole rows, in registers         backward, n programs that run at once: every n-th tile
        s = x + residual, rounded, is stored                      x̂ and g from stream and dy; both means of g
        mean = Σ s / width                                        dx, and y again if it is wanted, are stored
        rstd = 1 / √(Σ (s − mean)² / width + eps)                 d_weight, d_bias += dy · x̂, dy, elementwise
        y, mean and rstd are stored                           -> parts[program];  merge adds the parts in order

In 16 bits, an element moves 4 to 8 bytes forward and 6 to 10 backward, for some ten float operations: memory bandwidth
is the bound. So a row is read once, its variance is computed from registers, and the backward's column sums stay in
registers until a program has processed all its rows. No atomics: the same bits at every run.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .interpreter import round_to
from .pairs import store, stored

MAX_WARPS = 16


class RowTile(NamedTuple):
    """The size of a program of whole rows."""

    elements: int  # of a tile, at least
    a_warp: int  # elements per warp
    registers: int | None = None  # per thread; None: as ptxas decides


class MergeTile(NamedTuple):
    """The size of a program of merge_kernel."""

    parts: int  # added in one step
    columns: int
    warps: int


@triton.jit
def normed_rows(s, mean, rstd):
    return (s - mean[:, None]) * rstd[:, None]


@triton.jit(do_not_specialize=("rows",))
def layernorm_kernel(
    x,  # [rows, width]
    residual,  # [rows, width] or None
    weight,  # float32 [width]
    bias,  # float32 [width]
    eps,
    y,  # [rows, width]
    stream,  # [rows, width], s; None without residual
    mean,  # float32 [rows]
    rstd,  # float32 [rows]
    rows, width, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    i, j = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    s = stored(x, i, j, rows, width, width).to(tl.float32)
    if residual is not None:
        s = round_to(s + stored(residual, i, j, rows, width, width).to(tl.float32), stream.dtype.element_ty)
        store(stream, s, i, j, rows, width, width)
        s = s.to(tl.float32)
    m = tl.sum(s, 1) / width
    d = tl.where(j[None, :] < width, s - m[:, None], 0.0)
    r = tl.rsqrt(tl.sum(d * d, 1) / width + eps)
    tl.store(mean + i, m, mask=i < rows)
    tl.store(rstd + i, r, mask=i < rows)
    w = tl.load(weight + j, mask=j < width, other=0.0)[None, :]
    b = tl.load(bias + j, mask=j < width, other=0.0)[None, :]
    store(y, round_to(tl.fma(normed_rows(s, m, r), w, b), y.dtype.element_ty), i, j, rows, width, width)


@triton.jit(do_not_specialize=("rows",))
def layernorm_backward_kernel(
    dy,  # [rows, width]
    stream,  # [rows, width], s
    mean,  # float32 [rows]
    rstd,  # float32 [rows]
    weight,  # float32 [width]
    bias,  # float32 [width]
    d_stream,  # [rows, width] or None
    dx,  # [rows, width]; may be dy or d_stream
    y,  # [rows, width], or None if it is not wanted again
    parts,  # float32 [programs, 2, width]: sums for d_weight and d_bias
    rows, width, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    j = tl.arange(0, WIDTH)
    w = tl.load(weight + j, mask=j < width, other=0.0)[None, :]
    b = tl.load(bias + j, mask=j < width, other=0.0)[None, :]
    d_weight, d_bias = tl.zeros((ROWS, WIDTH), tl.float32), tl.zeros((ROWS, WIDTH), tl.float32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0), num_stages=2):
        i = tile * ROWS + tl.arange(0, ROWS)
        s = stored(stream, i, j, rows, width, width).to(tl.float32)
        g = stored(dy, i, j, rows, width, width).to(tl.float32)
        m, r = tl.load(mean + i, mask=i < rows, other=0.0), tl.load(rstd + i, mask=i < rows, other=0.0)
        n = normed_rows(s, m, r)
        if y is not None:
            store(y, round_to(tl.fma(n, w, b), y.dtype.element_ty), i, j, rows, width, width)
        d_weight += g * n
        d_bias += g
        g = g * w
        g_mean, gn_mean = tl.sum(g, 1) / width, tl.sum(g * n, 1) / width
        d = r[:, None] * (g - g_mean[:, None] - n * gn_mean[:, None])
        if d_stream is not None:
            d += stored(d_stream, i, j, rows, width, width).to(tl.float32)
        store(dx, round_to(d, dx.dtype.element_ty), i, j, rows, width, width)
    to = parts + tl.program_id(0).to(tl.int64) * 2 * width + j
    tl.store(to, tl.sum(d_weight, 0), mask=j < width)
    tl.store(to + width, tl.sum(d_bias, 0), mask=j < width)


@triton.jit(do_not_specialize=("tiles", "n"))
def merge_kernel(
    parts,  # float32 [tiles, n]
    out,  # float32 [n]
    tiles, n, TILES: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """out = the sum of parts over tiles, in a fixed order."""
    j = tl.program_id(0) * N + tl.arange(0, N)
    sums = tl.zeros((TILES, N), tl.float32)
    for first in range(0, tiles, TILES):
        sums += stored(parts, first + tl.arange(0, TILES), j, tiles, n, n)
    tl.store(out + j, tl.sum(sums, 0), mask=j < n)


def shape(width: int, tile: RowTile) -> tuple[int, int, int]:
    """(ROWS, WIDTH, warps) of a program of whole rows."""
    padded = triton.next_power_of_2(width)
    warps = min(MAX_WARPS, max(tile.elements, padded) // tile.a_warp)
    return max(1, tile.elements // padded), padded, warps


def merge(parts: Tensor, tile: MergeTile) -> Tensor:
    """The sum of parts, float32, over their first dimension, in a fixed order."""
    out = torch.empty(parts.shape[1:], dtype=torch.float32, device=parts.device)
    tiles, n = len(parts), out.numel()
    merge_kernel[(triton.cdiv(n, tile.columns),)](
        parts, out, tiles, n, TILES=tile.parts, N=tile.columns, num_warps=tile.warps
    )
    return out


def resident(warps: int, registers: int | None, device: torch.device) -> int:
    """Programs of these warps, and registers per thread (None: the most, 255), that run at once on a device."""
    on = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    return on * max(1, 65536 // (32 * (registers or 255) * warps))


def layernorm(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float,
    y: Tensor, stream: Tensor | None, mean: Tensor, rstd: Tensor, tile: RowTile,
) -> None:  # fmt: skip
    """See LayerNorm in ops/transformer/contract.py."""
    rows, width = x.shape
    tile_rows, padded, warps = shape(width, tile)
    layernorm_kernel[(triton.cdiv(rows, tile_rows),)](
        x, residual, weight, bias, eps, y, stream, mean, rstd, rows, width,
        ROWS=tile_rows, WIDTH=padded, num_warps=warps, maxnreg=tile.registers,
    )  # fmt: skip


def layernorm_backward(
    dy: Tensor, stream: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor,
    d_stream: Tensor | None, dx: Tensor, y: Tensor | None, tile: RowTile, merged: MergeTile,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See LayerNormGrad in ops/transformer/contract.py. With tile.registers all programs run at once."""
    rows, width = stream.shape
    tile_rows, padded, warps = shape(width, tile)
    programs = min(triton.cdiv(rows, tile_rows), resident(warps, tile.registers, stream.device))
    parts = torch.empty((programs, 2, width), dtype=torch.float32, device=stream.device)
    layernorm_backward_kernel[(programs,)](
        dy, stream, mean, rstd, weight, bias, d_stream, dx, y, parts, rows, width,
        ROWS=tile_rows, WIDTH=padded, num_warps=warps, maxnreg=tile.registers,
    )  # fmt: skip
    d_weight, d_bias = merge(parts, merged)
    return d_weight, d_bias
