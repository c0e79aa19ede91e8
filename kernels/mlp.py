"""The activation between a block's two linear layers: by itself, or in the epilogue of the product beside it.

z = h + bias,  a = act(z) = z · gate(z),  act'(z) = gate(z) + z · gate'(z)      (GELU: Hendrycks and Gimpel, 1606.08415)
gate: Φ(z); σ(2 √(2/π) (z + 0.044715 z³)), the tanh form; σ(1.702 z)

    bias_act, backward: tiles of ROWS × COLS       linear_act, a tile of ROWS × COLS, in an order kept in the L2:
        dh = da · act'(h + bias), rounded              p = x @ weight.T by steps of DEPTH  (pairs.py: `products`)
        d_bias += dh, not rounded, by element          h = p rounded;  a = act(h + bias), of the rounded h
        -> parts[program]                          linear_act_backward, likewise:
    layernorm.py's merge adds the parts, in order      da = dm @ weight, float32, never stored;  dh, a, parts[row tile]

The activation by itself is bound by memory: 4 bytes an element, or 6 to 8 backward, in 16 bits. A step of
128 × 128 × 64 does 2.1 MFLOP on the 32 KB that it moves into shared memory: the tensor cores are the bound there,
as long as the epilogue hides. That moves 4 bytes an element, 6 backward, or 64 and 96 KB a tile: at 800 TFLOP/s and
3 TB/s as long as 530 and 800 of the product's depth take, so two programs share a multiprocessor, and one's
epilogue runs beside the other's products.

a is the same bits from all four: z is formed from the rounded h, and no multiplication that leads to a is followed by
an addition but in an explicit fma, so the compiler has nothing to contract in one kernel and not in another.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .interpreter import dot, round_to
from .layernorm import merge, resident
from .pairs import Tile, aligned, products, quarters, store, stored, tile_at

# The products' tiles by compute capability, the last that is not above the device's, chosen from registers and shared
# memory as the compiler reports them; not measured on a GPU yet. "odd": operands that are not aligned, which pass
# through registers. 8.6, 8.9 and 12.0 have 99 KB of shared memory and no wgmma, so they share 8.0's.
_AMPERE = {"even": Tile(128, 64, 32, 4, 4), "odd": Tile(64, 64, 32, 8, 2)}
_HOPPER = _AMPERE | {"even": Tile(128, 128, 64, 8, 3)}
TILES = {(8, 0): _AMPERE, (9, 0): _HOPPER, (10, 0): _HOPPER, (12, 0): _AMPERE}
GROUP = 8  # row tiles that pass over the columns together

ELEMENTWISE, WARPS = (4, 256), 4  # the tile of the activation by itself: 8 elements a thread
REGISTERS = 64  # that a thread of its backward gets, for all of its programs to run at once


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
    """z = h + bias of column j; bias may be None."""
    z = h.to(tl.float32)
    if bias is not None:
        z += tl.load(bias + j, mask=j < cols, other=0.0)[None, :]
    return z


@triton.jit
def backward_of(da, h, bias, dh, a, i, j, rows, cols, ACTIVATION: tl.constexpr):
    """A tile of dh, which is stored, as a is if it is not None; returns dh before it is rounded."""
    z = biased(stored(h, i, j, rows, cols, cols), bias, j, cols)
    gate = gate_of(z, ACTIVATION)
    if a is not None:
        store(a, round_to(z * gate, a.dtype.element_ty), i, j, rows, cols, cols)
    g = da * slope_of(z, gate, ACTIVATION)
    store(dh, round_to(g, dh.dtype.element_ty), i, j, rows, cols, cols)
    return g


@triton.jit
def bias_act_kernel(
    h, bias, a, rows, cols, ACTIVATION: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):  # fmt: skip
    row_tile, col_tile = tile_at(rows, cols, ROWS, COLS, 1)
    i, j = row_tile * ROWS + tl.arange(0, ROWS), col_tile * COLS + tl.arange(0, COLS)
    z = biased(stored(h, i, j, rows, cols, cols), bias, j, cols)
    store(a, round_to(z * gate_of(z, ACTIVATION), a.dtype.element_ty), i, j, rows, cols, cols)


@triton.jit
def bias_act_backward_kernel(
    da, h, bias, dh, a, parts, rows, cols, ACTIVATION: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):  # fmt: skip
    j = tl.program_id(0) * COLS + tl.arange(0, COLS)
    sums = tl.zeros((ROWS, COLS), tl.float32)
    for tile in tl.range(tl.program_id(1), tl.cdiv(rows, ROWS), tl.num_programs(1), num_stages=2):
        i = tile * ROWS + tl.arange(0, ROWS)
        g = stored(da, i, j, rows, cols, cols).to(tl.float32)
        sums += backward_of(g, h, bias, dh, a, i, j, rows, cols, ACTIVATION)
    tl.store(parts + tl.program_id(1).to(tl.int64) * cols + j, tl.sum(sums, 0), mask=j < cols)


@triton.jit
def linear_act_kernel(
    x, weight, bias, h, a, rows, cols, dim,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    row_tile, col_tile = tile_at(rows, cols, ROWS, COLS, GROUP)
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
    x, t, i, j, rows, cols, dim, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr
):  # fmt: skip
    """x[i] @ t[:, j] in float32; x [rows, dim], t [dim, cols].

    Rows beyond the edge load the last one (pairs.py), columns zeros: clamped, they would not be read 16 bytes at once.
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


@triton.jit
def linear_act_backward_kernel(
    dm, weight, h, bias, dh, a, parts, rows, cols, dim,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    row_tile, col_tile = tile_at(rows, cols, ROWS, COLS, GROUP)
    i, j = row_tile * ROWS + tl.arange(0, ROWS), col_tile * COLS + tl.arange(0, COLS)
    da = quarters(turned_products(dm, weight, i, j, rows, cols, dim, ROWS, COLS, DEPTH), ROWS, COLS)
    for part in tl.static_range(4):
        j = col_tile * COLS + part * (COLS // 4) + tl.arange(0, COLS // 4)
        g = backward_of(da[part], h, bias, dh, a, i, j, rows, cols, ACTIVATION)
        sums = tl.sum(tl.where((i < rows)[:, None], g, 0.0), 0)
        tl.store(parts + row_tile.to(tl.int64) * cols + j, sums, mask=j < cols)


def tile_for(*operands: Tensor) -> Tile:
    """The tile in which the products of these matrices are formed."""
    device = operands[0].device
    here = torch.cuda.get_device_capability(device) if device.type == "cuda" else min(TILES)
    tiles = TILES[max((known for known in TILES if known <= here), default=min(TILES))]
    return tiles["even" if all(map(aligned, operands)) else "odd"]


def bias_act(h: Tensor, bias: Tensor, activation: str, a: Tensor) -> None:
    """See ops/blocks.py."""
    rows, cols = h.shape
    tile_rows, tile_cols = ELEMENTWISE
    grid = (triton.cdiv(rows, tile_rows) * triton.cdiv(cols, tile_cols),)
    bias_act_kernel[grid](
        h, bias, a, rows, cols, ACTIVATION=activation, ROWS=tile_rows, COLS=tile_cols, num_warps=WARPS
    )


def bias_act_backward(
    da: Tensor, h: Tensor, bias: Tensor, activation: str, dh: Tensor, a: Tensor | None
) -> Tensor:  # fmt: skip
    """See ops/blocks.py."""
    rows, cols = h.shape
    tile_rows, tile_cols = ELEMENTWISE
    across = triton.cdiv(cols, tile_cols)
    down = min(triton.cdiv(rows, tile_rows), max(1, resident(WARPS, REGISTERS, h.device) // across))
    parts = torch.empty((down, cols), dtype=torch.float32, device=h.device)
    bias_act_backward_kernel[(across, down)](
        da, h, bias, dh, a, parts, rows, cols, ACTIVATION=activation,
        ROWS=tile_rows, COLS=tile_cols, num_warps=WARPS, maxnreg=REGISTERS,
    )  # fmt: skip
    return merge(parts)


def linear_act(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, h: Tensor, a: Tensor) -> None:
    """h = x @ weight.T, rounded, and a = act(h + bias). x [rows, dim], weight [cols, dim], h and a [rows, cols]."""
    (rows, dim), cols = x.shape, len(weight)
    tile = tile_for(x, weight, h, a)
    linear_act_kernel[(triton.cdiv(rows, tile.rows) * triton.cdiv(cols, tile.cols),)](
        x, weight, bias, h, a, rows, cols, dim, ACTIVATION=activation,
        ROWS=tile.rows, COLS=tile.cols, DEPTH=tile.depth, GROUP=GROUP, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def linear_act_backward(
    dm: Tensor, weight: Tensor, h: Tensor, bias: Tensor | None, activation: str, dh: Tensor, a: Tensor
) -> Tensor:  # fmt: skip
    """dh = (dm @ weight) · act'(h + bias), and a again; returns d_bias. dm [rows, dim], weight [dim, cols]."""
    (rows, dim), cols = dm.shape, weight.shape[1]
    tile = tile_for(dm, weight, h, dh, a)
    down = triton.cdiv(rows, tile.rows)
    parts = torch.empty((down, cols), dtype=torch.float32, device=dm.device)
    linear_act_backward_kernel[(down * triton.cdiv(cols, tile.cols),)](
        dm, weight, h, bias, dh, a, parts, rows, cols, dim, ACTIVATION=activation,
        ROWS=tile.rows, COLS=tile.cols, DEPTH=tile.depth, GROUP=GROUP, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return merge(parts)
