"""LayerNorm over rows, forward and backward (Ba et al., arXiv 1607.06450, equations 3 and 4), and sums of partial sums.

s = x + residual,  x̂ = (s − mean) · rstd,  y = x̂ · weight + bias
dx = d_stream + rstd · (g − mean(g) − x̂ · mean(g · x̂)),  g = dy · weight
d_weight = Σ_rows dy · x̂,  d_bias = Σ_rows dy

    forward, a program: ROWS whole rows, in registers         backward, a program of a fixed number: every so many rows
        s = x + residual, rounded, is stored                      x̂ and g from stream and dy; both means of g
        mean = Σ s / width                                        dx, and y again if that is wanted, are stored
        rstd = 1 / √(Σ (s − mean)² / width + eps)                 d_weight, d_bias += dy · x̂, dy, element by element
        y, mean and rstd are stored                           -> parts[program];  merge adds the parts, in order

An element moves 4 to 8 bytes forward and 6 to 10 backward in 16 bits, for some ten float operations: memory
bandwidth is the bound. So a row is read once, the variance comes from what is in registers already, and the
backward's column sums stay there until a program has seen all its rows. No atomics: the same bits at every run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .interpreter import round_to
from .pairs import store, stored

# Not measured on a GPU yet. Elements of a program's tile at least, and of a warp: forward a whole row of up to 1024,
# whose sums then need no shared memory; backward 8 a thread, which with both sums take some 100 registers.
TILE, FORWARD, BACKWARD = 1024, 1024, 256
MAX_WARPS = 16
# What a thread of the backward gets, for all of its programs to run at once; by itself ptxas takes fewer, and spills.
REGISTERS = 128
MERGE = (128, 32)  # parts × columns that a program merges at once


@triton.jit
def normed_rows(s, mean, rstd):
    return (s - mean[:, None]) * rstd[:, None]


@triton.jit
def layernorm_kernel(
    x, residual, weight, bias, eps, y, stream, mean, rstd, rows, width, ROWS: tl.constexpr, WIDTH: tl.constexpr
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


@triton.jit
def layernorm_backward_kernel(
    dy, stream, mean, rstd, weight, bias, d_stream, dx, y, parts, rows, width,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
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


@triton.jit
def merge_kernel(parts, out, tiles, n, TILES: tl.constexpr, N: tl.constexpr):
    """out [n] = the sum of parts [tiles, n], in the order of the tiles."""
    j = tl.program_id(0) * N + tl.arange(0, N)
    sums = tl.zeros((TILES, N), tl.float32)
    for first in range(0, tiles, TILES):
        sums += stored(parts, first + tl.arange(0, TILES), j, tiles, n, n)
    tl.store(out + j, tl.sum(sums, 0), mask=j < n)


def shape(width: int, a_warp: int) -> tuple[int, int, int]:
    """(ROWS, WIDTH, warps) of a program that holds whole rows, a_warp elements in a warp."""
    padded = triton.next_power_of_2(width)
    return max(1, TILE // padded), padded, min(MAX_WARPS, max(TILE, padded) // a_warp)


def merge(parts: Tensor) -> Tensor:
    """The sum over the first dimension of parts, float32, in its order."""
    out = torch.empty(parts.shape[1:], dtype=torch.float32, device=parts.device)
    tiles, n = len(parts), out.numel()
    merge_kernel[(triton.cdiv(n, MERGE[1]),)](parts, out, tiles, n, TILES=MERGE[0], N=MERGE[1], num_warps=8)
    return out


def resident(warps: int, registers: int, device: torch.device) -> int:
    """Programs of so many warps that run at once, if a thread has so many registers."""
    on = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    return on * max(1, 65536 // (32 * registers * warps))


def layernorm(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float,
    y: Tensor, stream: Tensor | None, mean: Tensor, rstd: Tensor,
) -> None:  # fmt: skip
    """See ops/blocks.py."""
    rows, width = x.shape
    tile_rows, padded, warps = shape(width, FORWARD)
    layernorm_kernel[(triton.cdiv(rows, tile_rows),)](
        x, residual, weight, bias, eps, y, stream, mean, rstd, rows, width,
        ROWS=tile_rows, WIDTH=padded, num_warps=warps,
    )  # fmt: skip


def layernorm_backward(
    dy: Tensor, stream: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor,
    d_stream: Tensor | None, dx: Tensor, y: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See ops/blocks.py."""
    rows, width = stream.shape
    tile_rows, padded, warps = shape(width, BACKWARD)
    programs = min(triton.cdiv(rows, tile_rows), resident(warps, REGISTERS, stream.device))
    parts = torch.empty((programs, 2, width), dtype=torch.float32, device=stream.device)
    layernorm_backward_kernel[(programs,)](
        dy, stream, mean, rstd, weight, bias, d_stream, dx, y, parts, rows, width,
        ROWS=tile_rows, WIDTH=padded, num_warps=warps, maxnreg=REGISTERS,
    )  # fmt: skip
    d_weight, d_bias = merge(parts)
    return d_weight, d_bias
