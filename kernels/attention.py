"""Attention of a whole short sequence: all keys and values of a head are on the chip at once.

S = scale · q kᵀ,   P = exp(S − lse),   out = P v                                 lse_i = log Σ_j exp(S_ij)
dv = Pᵀ d_out,   dP = d_out vᵀ,   dS = P · (dP − Σ_j P dP),   dq = scale · dS k,   dk = scale · dSᵀ q

    forward, a program per picture and head:             backward, a program per picture and head:
        k, v into shared memory                              k, v into shared memory;  dk = dv = 0, in registers
        for ROWS queries:                                    for ROWS queries:
            S = q kᵀ                                             Sᵀ = k qᵀ,  dPᵀ = v d_outᵀ       [keys, queries]
            m, l = max S, Σ exp(S − m)                           P, dS from them and lse
            out = exp(S − m) v / l                               dv += Pᵀ d_out;  out = P v again
            lse = m + log l                                      dk += dSᵀ q;     dq = dS k, whole: written once

Every input is read and every output written once, nothing is added to by two programs, and the same bits come out
every time. The queries are the short side in the backward because a wgmma takes 64 rows: all products but dq and out
then have keys as rows, Pᵀ and dSᵀ go into dv and dk from the registers that they were formed in, and dqᵀ = kᵀ dSᵀ and
outᵀ = vᵀ Pᵀ have a row for each feature.

ViT-B/16 at batch 256: 3 072 heads, 197 tokens, padded to 256 keys, and to 256 queries forward, 224 backward.
    forward      reads 232 MB, writes 80 MB        3 072 · 4 · 256 · 256 · 64 =  52 GFLOP, 201 million exponentials
    backward     reads 312 MB, writes 310 MB      3 072 · 12 · 256 · 224 · 64 = 135 GFLOP, 176 million exponentials
An H100 moves these bytes in 0.10 and 0.20 ms (3.1 TB/s), has the products done in 0.09 and 0.22 ms (at 600 TFLOP/s)
and the exponentials in 0.06 and 0.05 ms: the forward is bound by memory where its two programs a multiprocessor
overlap, the backward by what it does not overlap. It has one program a multiprocessor there: dk and dv of 256 keys
fill half of all registers. Its wgmma of 32 queries read an operand of 2 KB from shared memory in the 16 cycles that
they multiply, so a third of their time is lost to that; blocks of 64 queries would not, and do not fit.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .interpreter import dot, round_to


class Tile(NamedTuple):
    """Queries a step, warps, and in how many stages loads and products overlap."""

    rows: int
    warps: int
    stages: int


# Chosen from registers and shared memory as the compiler reports them (none spills: see the tests); not measured on a
# GPU yet. By compute capability, the last that is not above the device's, and (keys, features) as padded: forward and
# backward. 8.6, 8.9 and 12.0 have 99 KB of shared memory and no wgmma, so they share 8.0's. In two stages 10.0 would
# need more tensor memory than there is.
_AMPERE = {
    (64, 64): (Tile(64, 4, 2), Tile(32, 8, 1)),
    (128, 64): (Tile(64, 4, 2), Tile(32, 8, 1)),
    (256, 64): (Tile(32, 4, 2), Tile(16, 8, 1)),
    (64, 128): (Tile(32, 4, 2), Tile(16, 8, 1)),
}
_HOPPER = {
    (64, 64): (Tile(64, 4, 2), Tile(32, 4, 2)),
    (128, 64): (Tile(64, 4, 2), Tile(32, 8, 2)),
    (256, 64): (Tile(64, 4, 2), Tile(32, 8, 2)),
    (64, 128): (Tile(64, 4, 2), Tile(32, 8, 2)),
    (128, 128): (Tile(64, 4, 2), Tile(32, 8, 2)),
}
_BLACKWELL = {
    (64, 64): (Tile(64, 4, 1), Tile(32, 8, 1)),
    (128, 64): (Tile(64, 4, 1), Tile(32, 8, 1)),
    (256, 64): (Tile(64, 8, 1), Tile(32, 8, 1)),
    (64, 128): (Tile(64, 4, 1), Tile(32, 4, 1)),
    (128, 128): (Tile(64, 4, 1), Tile(32, 8, 1)),
}
TILES = {(8, 0): _AMPERE, (9, 0): _HOPPER, (10, 0): _BLACKWELL, (12, 0): _AMPERE}

LOG2E = tl.constexpr(1.4426950408889634)


class Plan(NamedTuple):
    forward: Tile
    backward: Tile
    keys: int
    dim: int
    tall: bool  # products of at least 64 rows, as wgmma and tcgen05 want them


def capability(device: torch.device | None = None) -> tuple[int, int]:
    """Of this device, or the current one; where kernels are interpreted, the one that takes most."""
    return (9, 0) if triton.knobs.runtime.interpret else torch.cuda.get_device_capability(device)


def plan(tokens: int, head_dim: int, here: tuple[int, int]) -> Plan | None:
    """How a device of this capability does it; None if it cannot without spilling registers."""
    tiles = TILES[max((known for known in TILES if known <= here), default=min(TILES))]
    keys, dim = (max(64, triton.next_power_of_2(n)) for n in (tokens, head_dim))
    # There a mask over the features is one register too many beside 256 keys.
    if (keys, dim) not in tiles or (tiles is _AMPERE and keys == 256 and head_dim < dim):
        return None
    return Plan(*tiles[keys, dim], keys, dim, tiles is not _AMPERE)


@triton.jit
def load(x, rows, tokens, stride, HEAD_DIM: tl.constexpr, DIM: tl.constexpr):
    """x[rows], zeros beyond the edges."""
    d = tl.arange(0, DIM)
    mask = (rows < tokens)[:, None]
    if HEAD_DIM < DIM:
        mask = mask & (d < HEAD_DIM)[None, :]
    return tl.load(x + (rows * stride)[:, None] + d[None, :], mask=mask, other=0.0)


@triton.jit
def store(x, tile, rows, tokens, stride, HEAD_DIM: tl.constexpr, DIM: tl.constexpr):
    d = tl.arange(0, DIM)
    mask = (rows < tokens)[:, None]
    if HEAD_DIM < DIM:
        mask = mask & (d < HEAD_DIM)[None, :]
    tl.store(x + (rows * stride)[:, None] + d[None, :], round_to(tile, x.dtype.element_ty), mask=mask)


@triton.jit
def product(left, right):
    return dot(left, right, tl.zeros((left.shape[0], right.shape[1]), tl.float32))


@triton.jit
def over_keys(weights, x, TALL: tl.constexpr):
    """weightsᵀ x, for weights [keys, queries] and x [keys, features]; TALL: with features as the rows."""
    if TALL:
        sums = tl.trans(product(tl.trans(x), weights))
    else:
        sums = product(tl.trans(weights), x)
    return sums


@triton.jit(do_not_specialize=("heads", "tokens"))
def forward_kernel(
    qkv, out, lse, heads, tokens, scale,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, KEYS: tl.constexpr, ROWS: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    picture, head = (program // heads).to(tl.int64), program % heads
    width = heads * HEAD_DIM
    qkv += picture * tokens * 3 * width + head * HEAD_DIM
    out += picture * tokens * width + head * HEAD_DIM
    lse += program.to(tl.int64) * tokens
    j = tl.arange(0, KEYS)
    k = load(qkv + width, j, tokens, 3 * width, HEAD_DIM, DIM)
    v = load(qkv + 2 * width, j, tokens, 3 * width, HEAD_DIM, DIM)
    for first in range(0, tokens, ROWS):
        i = first + tl.arange(0, ROWS)
        q = load(qkv, i, tokens, 3 * width, HEAD_DIM, DIM)
        keep = (j < tokens)[None, :]
        if CAUSAL:
            keep = keep & (j[None, :] <= i[:, None])
        s = tl.where(keep, product(q, tl.trans(k)) * (scale * LOG2E), float("-inf"))
        m = tl.max(s, 1)
        p = tl.exp2(s - m[:, None])
        l = tl.sum(p, 1)  # noqa: E741
        sums = product(round_to(p, v.dtype), v)
        store(out, sums * (1.0 / l)[:, None], i, tokens, width, HEAD_DIM, DIM)
        tl.store(lse + i, (m + tl.log2(l)) / LOG2E, mask=i < tokens)


@triton.jit(do_not_specialize=("heads", "d_heads", "tokens"))
def backward_kernel(
    d_out, qkv, lse, d_qkv, out, heads, d_heads, tokens, scale,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, KEYS: tl.constexpr, ROWS: tl.constexpr, CAUSAL: tl.constexpr,
    TALL: tl.constexpr,
):  # fmt: skip
    """out may be None. d_heads is heads: so that no address of k is kept in a register until dk has its own."""
    program = tl.program_id(0)
    picture, head = (program // heads).to(tl.int64), program % heads
    width, d_width = heads * HEAD_DIM, d_heads * HEAD_DIM
    single = picture * tokens * width + head * HEAD_DIM
    qkv += picture * tokens * 3 * width + head * HEAD_DIM
    d_qkv += picture * tokens * 3 * d_width + head * HEAD_DIM
    d_out += single
    lse += program.to(tl.int64) * tokens
    j = tl.arange(0, KEYS)
    k = load(qkv + width, j, tokens, 3 * width, HEAD_DIM, DIM)
    v = load(qkv + 2 * width, j, tokens, 3 * width, HEAD_DIM, DIM)
    dk = tl.zeros((KEYS, DIM), tl.float32)
    dv = tl.zeros((KEYS, DIM), tl.float32)
    # What could be hoisted out of the loop is addresses, which are cheap, and registers there are none left.
    for first in tl.range(0, tokens, ROWS, disable_licm=True):
        i = first + tl.arange(0, ROWS)
        q = load(qkv, i, tokens, 3 * width, HEAD_DIM, DIM)
        g = load(d_out, i, tokens, width, HEAD_DIM, DIM)
        # Queries beyond the edge get P = 0.
        l = tl.load(lse + i, mask=i < tokens, other=float("inf")) * LOG2E  # noqa: E741
        s = product(k, tl.trans(q))
        dp = product(v, tl.trans(g))
        keep = (j < tokens)[:, None]
        if CAUSAL:
            keep = keep & (j[:, None] <= i[None, :])
        p = tl.where(keep, tl.exp2(s * (scale * LOG2E) - l[None, :]), 0.0)
        ds = p * (dp - tl.sum(p * dp, 0)[None, :])
        p, ds = round_to(p, q.dtype), round_to(ds, q.dtype)
        dv = dot(p, g, dv)
        if out is not None:
            store(out + single, over_keys(p, v, TALL), i, tokens, width, HEAD_DIM, DIM)
        # The last product of a turn decides. ptxas runs every wgmma by itself if one is on its way across the loop's
        # end, so dq, which is waited for, comes last; of the forms for mma.sync the one with dk last spills nothing.
        if TALL:
            dk = dot(ds, q, dk)
        store(d_qkv, over_keys(ds, k, TALL) * scale, i, tokens, 3 * width, HEAD_DIM, DIM)
        if not TALL:
            dk = dot(ds, q, dk)
    store(d_qkv + d_width, dk * scale, j, tokens, 3 * d_width, HEAD_DIM, DIM)
    store(d_qkv + 2 * d_width, dv, j, tokens, 3 * d_width, HEAD_DIM, DIM)


def sizes(qkv: Tensor, causal: bool) -> tuple[Plan, dict]:
    """The plan, and what both kernels take by name."""
    found = plan(qkv.shape[1], qkv.shape[4], capability(qkv.device))
    assert found is not None, "ask refuses() first"
    return found, {"HEAD_DIM": qkv.shape[4], "DIM": found.dim, "KEYS": found.keys, "CAUSAL": causal}


def forward(qkv: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    batch, tokens, _, heads, head_dim = qkv.shape
    out = qkv.new_empty((batch, tokens, heads, head_dim))
    lse = qkv.new_empty((batch, heads, tokens), dtype=torch.float32)
    found, named = sizes(qkv, causal)
    tile = found.forward
    forward_kernel[(batch * heads,)](
        qkv, out, lse, heads, tokens, scale, **named, ROWS=tile.rows, num_warps=tile.warps, num_stages=tile.stages
    )
    return out, lse


def backward(
    d_out: Tensor, qkv: Tensor, lse: Tensor, scale: float, causal: bool, want_out: bool
) -> tuple[Tensor, Tensor | None]:
    batch, tokens, _, heads, _ = qkv.shape
    d_qkv, out = torch.empty_like(qkv), torch.empty_like(d_out) if want_out else None
    found, named = sizes(qkv, causal)
    tile = found.backward
    backward_kernel[(batch * heads,)](
        d_out, qkv, lse, d_qkv, out, heads, heads, tokens, scale, **named,
        ROWS=tile.rows, TALL=found.tall, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return d_qkv, out
