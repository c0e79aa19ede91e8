"""The activation between a block's two linear layers: by itself, or in the epilogue of the matrix product next to it.

z = h + bias,  a = act(z) = z · gate(z),  act'(z) = gate(z) + z · gate'(z)      (GELU: Hendrycks and Gimpel, 1606.08415)
gate: Φ(z); σ(2 √(2/π) (z + 0.044715 z³)), the tanh form; σ(1.702 z)

    bias_act, backward: tiles of ROWS × COLS       linear_act, a tile of ROWS × COLS, in an order kept in the L2:
        dh = da · act'(h + bias), rounded              p = x @ weight.T in steps of DEPTH  (pairs.py: `products`)
        d_bias += dh, not rounded, elementwise         h = p rounded;  a = act(h + bias), of the rounded h
        -> parts[program]                          linear_act_backward, likewise:
    layernorm.py's merge adds the parts in order       da = dm @ weight, float32, never stored;  dh, a, parts[row tile]

The activation by itself is bound by memory: 4 bytes per element, or 6 to 8 backward, in 16 bits. A step of
128 × 128 × 64 does 2.1 MFLOP on the 32 KB that it moves into shared memory: the tensor cores are the bound there, as
long as the epilogue is hidden. The epilogue moves 4 bytes per element, 6 backward, or 64 and 96 KB per tile: at
800 TFLOP/s and 3 TB/s this takes as long as products over a depth of 530 and 800. So two programs share a
multiprocessor, and the epilogue of one overlaps with the products of the other.

All four kernels compute the same bits of a: z is computed from the rounded h, and every multiplication on the way to a
that is followed by an addition is an explicit fma, so the compiler cannot contract in one kernel and not in another.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .interpreter import dot, round_to
from .layernorm import MergeTile, merge, resident
from .pairs import multiple, products, quarters, store, stored, tile_at


class Tile(NamedTuple):
    """The size of a program of the activation by itself."""

    rows: int  # ROWS and COLS of a step
    cols: int
    warps: int
    registers: int | None = None  # per thread; None: as ptxas decides


class ProductTile(NamedTuple):
    """The size of a program of a matrix product with the activation."""

    rows: int  # ROWS and COLS of the result's tile
    cols: int
    depth: int  # DEPTH of a step
    warps: int
    stages: int
    group: int  # row tiles that pass over the columns together
    aligned: bool  # whether all operands are, in the sense of pairs.py
    registers: int | None = None


@triton.jit
def sigmoid(k):
    return 1.0 / (1.0 + tl.exp(-k))


@triton.jit
def gate_of(z, ACTIVATION: tl.constexpr):
    if ACTIVATION == "gelu":
        gate = tl.fma(tl.erf(z * 0.7071067811865476), 0.5, 0.5)
    elif ACTIVATION == "gelu_tanh":
        gate = sigmoid(z * tl.fma(z * z, 0.07135481627260025, 1.5957691216057308))  # (1 + tanh u) / 2 = σ(2 u)
    else:
        gate = sigmoid(z * 1.702)
    return gate


@triton.jit
def slope_of(z, gate, ACTIVATION: tl.constexpr):
    """act'(z) from gate(z)."""
    if ACTIVATION == "gelu":
        d_gate = 0.3989422804014327 * tl.exp(-0.5 * z * z)
    elif ACTIVATION == "gelu_tanh":
        d_gate = gate * (1.0 - gate) * tl.fma(z * z, 0.21406444881780076, 1.5957691216057308)
    else:
        d_gate = gate * (1.0 - gate) * 1.702
    return tl.fma(z, d_gate, gate)


@triton.jit
def biased(h, bias, j, cols):
    """z = h + bias for columns j; bias: float32 [cols], or None for zeros."""
    z = h.to(tl.float32)
    if bias is not None:
        z += tl.load(bias + j, mask=j < cols, other=0.0)[None, :]
    return z


@triton.jit
def backward_of(
    da,
    h,  # [rows, cols]
    bias,  # float32 [cols] or None
    dh,  # [rows, cols]
    a,  # [rows, cols], or None if it is not wanted again
    i, j, rows, cols, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Stores dh, and a unless it is None, at rows i and columns j from da there. Returns dh before it is rounded."""
    z = biased(stored(h, i, j, rows, cols, cols), bias, j, cols)
    gate = gate_of(z, ACTIVATION)
    if a is not None:
        store(a, round_to(z * gate, a.dtype.element_ty), i, j, rows, cols, cols)
    g = da * slope_of(z, gate, ACTIVATION)
    store(dh, round_to(g, dh.dtype.element_ty), i, j, rows, cols, cols)
    return g


@triton.jit(do_not_specialize=("rows",))
def bias_act_kernel(
    h,  # [rows, cols]
    bias,  # float32 [cols]
    a,  # [rows, cols]; may be h
    rows, cols, ACTIVATION: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    row_tile, col_tile = tile_at(tl.program_id(0), rows, cols, ROWS, COLS, 1)
    i, j = row_tile * ROWS + tl.arange(0, ROWS), col_tile * COLS + tl.arange(0, COLS)
    z = biased(stored(h, i, j, rows, cols, cols), bias, j, cols)
    store(a, round_to(z * gate_of(z, ACTIVATION), a.dtype.element_ty), i, j, rows, cols, cols)


@triton.jit(do_not_specialize=("rows",))
def bias_act_backward_kernel(
    da,  # [rows, cols]
    h,  # [rows, cols]
    bias,  # float32 [cols]
    dh,  # [rows, cols]; may be da
    a,  # [rows, cols], may be h; None if it is not wanted again
    parts,  # float32 [programs down, cols]: sums for d_bias
    rows, cols, ACTIVATION: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    j = tl.program_id(0) * COLS + tl.arange(0, COLS)
    sums = tl.zeros((ROWS, COLS), tl.float32)
    for tile in tl.range(tl.program_id(1), tl.cdiv(rows, ROWS), tl.num_programs(1), num_stages=2):
        i = tile * ROWS + tl.arange(0, ROWS)
        g = stored(da, i, j, rows, cols, cols).to(tl.float32)
        sums += backward_of(g, h, bias, dh, a, i, j, rows, cols, ACTIVATION)
    tl.store(parts + tl.program_id(1).to(tl.int64) * cols + j, tl.sum(sums, 0), mask=j < cols)


@triton.jit(do_not_specialize=("rows", "cols", "dim"))
def linear_act_kernel(
    x,  # [rows, dim]
    weight,  # [cols, dim]
    bias,  # float32 [cols] or None
    h,  # [rows, cols]
    a,  # [rows, cols]
    rows, cols, dim,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    cols, dim = multiple(cols, ALIGNED), multiple(dim, ALIGNED)
    row_tile, col_tile = tile_at(tl.program_id(0), rows, cols, ROWS, COLS, GROUP)
    i, j = row_tile * ROWS + tl.arange(0, ROWS), col_tile * COLS + tl.arange(0, COLS)
    p = quarters(products(x, weight, i, j, rows, cols, dim, dim, dim, ROWS, COLS, DEPTH), ROWS, COLS)
    for part in tl.static_range(4):
        j = col_tile * COLS + part * (COLS // 4) + tl.arange(0, COLS // 4)
        rounded = round_to(p[part], h.dtype.element_ty)
        store(h, rounded, i, j, rows, cols, cols)
        z = biased(rounded, bias, j, cols)
        store(a, round_to(z * gate_of(z, ACTIVATION), a.dtype.element_ty), i, j, rows, cols, cols)


@triton.jit
def turned_products(
    x,  # [rows, dim]
    t,  # [dim, cols]
    i, j, rows, cols, dim, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """x[i] @ t[:, j] in float32.

    Rows beyond the edge repeat the last one, as in pairs.py. Columns beyond the edge are zeros: clamped indices would
    prevent loads of 16 bytes.
    """
    k = tl.arange(0, DEPTH)
    left = x + tl.minimum(i, rows - 1).to(tl.int64)[:, None] * dim + k[None, :]
    right = t + k.to(tl.int64)[:, None] * cols + j[None, :]
    sums = tl.zeros((ROWS, COLS), tl.float32)
    for done in range(0, dim, DEPTH):
        inside = k < dim - done
        features = tl.load(left, mask=inside[None, :], other=0)
        sums = dot(features, tl.load(right, mask=inside[:, None] & (j < cols)[None, :], other=0), sums)
        left += DEPTH
        right += DEPTH * cols
    return sums


@triton.jit(do_not_specialize=("rows", "cols", "dim"))
def linear_act_backward_kernel(
    dm,  # [rows, dim]
    weight,  # [dim, cols]
    h,  # [rows, cols]
    bias,  # float32 [cols] or None
    dh,  # [rows, cols]
    a,  # [rows, cols]
    parts,  # float32 [row tiles, cols]: sums for d_bias
    rows, cols, dim,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    cols, dim = multiple(cols, ALIGNED), multiple(dim, ALIGNED)
    row_tile, col_tile = tile_at(tl.program_id(0), rows, cols, ROWS, COLS, GROUP)
    i, j = row_tile * ROWS + tl.arange(0, ROWS), col_tile * COLS + tl.arange(0, COLS)
    da = quarters(turned_products(dm, weight, i, j, rows, cols, dim, ROWS, COLS, DEPTH), ROWS, COLS)
    for part in tl.static_range(4):
        j = col_tile * COLS + part * (COLS // 4) + tl.arange(0, COLS // 4)
        g = backward_of(da[part], h, bias, dh, a, i, j, rows, cols, ACTIVATION)
        sums = tl.sum(tl.where((i < rows)[:, None], g, 0.0), 0)
        tl.store(parts + row_tile.to(tl.int64) * cols + j, sums, mask=j < cols)


def bias_act(h: Tensor, bias: Tensor, activation: str, a: Tensor, tile: Tile) -> None:
    """See BiasAct in ops/transformer/contract.py."""
    rows, cols = h.shape
    bias_act_kernel[(triton.cdiv(rows, tile.rows) * triton.cdiv(cols, tile.cols),)](
        h, bias, a, rows, cols, ACTIVATION=activation, ROWS=tile.rows, COLS=tile.cols,
        num_warps=tile.warps, maxnreg=tile.registers,
    )  # fmt: skip


def bias_act_backward(
    da: Tensor, h: Tensor, bias: Tensor, activation: str, dh: Tensor, a: Tensor | None, tile: Tile, merged: MergeTile
) -> Tensor:
    """See BiasActGrad in ops/transformer/contract.py. With tile.registers all programs run at once."""
    rows, cols = h.shape
    across = triton.cdiv(cols, tile.cols)
    down = min(triton.cdiv(rows, tile.rows), max(1, resident(tile.warps, tile.registers, h.device) // across))
    parts = torch.empty((down, cols), dtype=torch.float32, device=h.device)
    bias_act_backward_kernel[(across, down)](
        da, h, bias, dh, a, parts, rows, cols, ACTIVATION=activation,
        ROWS=tile.rows, COLS=tile.cols, num_warps=tile.warps, maxnreg=tile.registers,
    )  # fmt: skip
    return merge(parts, merged)


def linear_act(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, h: Tensor, a: Tensor, tile: ProductTile
) -> None:
    """h = x @ weight.T, rounded, and a = act(h + bias). x [rows, dim], weight [cols, dim], h and a [rows, cols]."""
    (rows, dim), cols = x.shape, len(weight)
    linear_act_kernel[(triton.cdiv(rows, tile.rows) * triton.cdiv(cols, tile.cols),)](
        x, weight, bias, h, a, rows, cols, dim, ACTIVATION=activation, ROWS=tile.rows, COLS=tile.cols,
        DEPTH=tile.depth, GROUP=tile.group, ALIGNED=tile.aligned,
        num_warps=tile.warps, num_stages=tile.stages, maxnreg=tile.registers,
    )  # fmt: skip


def linear_act_backward(
    dm: Tensor, weight: Tensor, h: Tensor, bias: Tensor | None, activation: str, dh: Tensor, a: Tensor,
    tile: ProductTile, merged: MergeTile,
) -> Tensor:  # fmt: skip
    """dh = (dm @ weight) · act'(h + bias), and a again; returns d_bias. dm [rows, dim], weight [dim, cols]."""
    (rows, dim), cols = dm.shape, weight.shape[1]
    down = triton.cdiv(rows, tile.rows)
    parts = torch.empty((down, cols), dtype=torch.float32, device=dm.device)
    linear_act_backward_kernel[(down * triton.cdiv(cols, tile.cols),)](
        dm, weight, h, bias, dh, a, parts, rows, cols, dim, ACTIVATION=activation, ROWS=tile.rows, COLS=tile.cols,
        DEPTH=tile.depth, GROUP=tile.group, ALIGNED=tile.aligned,
        num_warps=tile.warps, num_stages=tile.stages, maxnreg=tile.registers,
    )  # fmt: skip
    return merge(parts, merged)
