"""Attention of a whole short sequence: all keys and values of a head are on the chip at once.

S = scale · q kᵀ,   P = exp(S − lse),   out = P v                                 lse_i = log Σ_j exp(S_ij)
dv = Pᵀ d_out,   dP = d_out vᵀ,   dS = P · (dP − Δ),   Δ_i = Σ_j (P dP)_ij = Σ_d (out d_out)_id
dq = scale · dS k,   dk = scale · dSᵀ q

    forward, a program per image and head:               backward in two passes, likewise:
        k, v into shared memory                              k, v into shared memory
        for ROWS queries:                                    for ROWS queries:
            S = q kᵀ                                             P from q kᵀ and lse;  out = P v again
            m, l = max S, Σ exp(S − m)                           Δ = Σ out d_out, into memory
            out = exp(S − m) v / l                               dS from d_out vᵀ;  dq = dS k
            lse = m + log l                                  q, d_out into shared memory
                                                             for ROWS keys:
    backward in one pass, likewise:                              Sᵀ = k qᵀ,  dPᵀ = v d_outᵀ
        k, v into shared memory;  dk = dv = 0, registers         P, dS from them, lse and Δ
        for ROWS queries:                                        dv = Pᵀ d_out;  dk = dSᵀ q
            Sᵀ = k qᵀ,  dPᵀ = v d_outᵀ
            P, dS from them and lse
            dv += Pᵀ d_out;  out = P v again;  dk += dSᵀ q;  dq = dS k

Every output is written once and by one program, so the bits are the same at every run. The operand that is in shared
memory whole is loaded in pieces: powers of two that add up to the tokens, rounded up to a multiple of 16 or 64; 197
tokens are 128 + 64 + 16. The caller chooses the form of the backward and the sizes (the tables of ops/tuned).

With one pass, a multiprocessor runs one program at 256 keys, because their dk and dv fill half of all registers. P and
dS go through shared memory for out and dq, and those products, of 16 queries, wait for it. Two passes compute S and dP
twice, and out in two products, from the leading and the remaining bits of P, since Δ must be as exact as float32: nine
products instead of six. But dk and dv of 64 keys let two programs run at once, every product has 64 rows and reads P or
dS from the registers in which they were computed, and the second pass reads from the L2 cache.

ViT-B/16 at batch 256: 3 072 heads of 64, 197 tokens, padded to 256 along ROWS and to 208 along the other side. For a
tile of 64 × 208, each of 4 warps issues 970 instructions forward, 1 470 and 1 200 backward (SASS of sm_90).
    forward      reads 232 MB, writes 80 MB        3 072 · 4 · 256 · 208 · 64 =  42 GFLOP, 164 million exponentials
    backward     reads 312 MB, writes 310 MB      3 072 · 18 · 256 · 208 · 64 = 188 GFLOP, 327 million exponentials
An H100 moves these bytes in 0.10 and 0.20 ms (3.1 TB/s) and computes the products in 0.05 and 0.24 ms (800 TFLOP/s), if
one program's exponentials overlap with the other's products: alone, the exponentials take 0.03 and 0.09 ms to compute,
and 0.05 and 0.15 ms to issue with the instructions around them. So the forward is bound by memory, the backward by the
tensor cores and their waits: an estimated 0.3 ms, and 0.5 ms in one pass. Not measured on a GPU yet.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .interpreter import dot, round_to

LOG2E = tl.constexpr(1.4426950408889634)


class Tile(NamedTuple):
    """The form and sizes of a program."""

    rows: int  # queries, or keys, per step
    warps: int
    stages: int  # in which loads and products overlap
    most: int = 128  # rows of a piece of the other side at most
    least: int = 16  # and at least
    passes: int = 1  # of the backward: 1 or 2
    tall: bool = False  # in one pass: products have at least 64 rows, as wgmma and tcgen05 need


def pieces_of(tokens: int, least: int, most: int) -> tuple[int, ...]:
    """Powers of two, up to `most`, that add up to tokens rounded up to a multiple of `least`."""
    left, found = triton.cdiv(tokens, least) * least, []
    while left:
        found.append(min(most, 1 << left.bit_length() - 1))
        left -= found[-1]
    return tuple(found)


def padded(n: int) -> int:
    """The size to which keys or features of a row are padded: the next power of two, at least 64."""
    return max(64, triton.next_power_of_2(n))


@triton.jit
def load(
    x,  # [tokens, HEAD_DIM], rows `stride` elements apart
    rows, tokens, stride, HEAD_DIM: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """x[rows] as [rows, DIM], with zeros beyond the edges."""
    d = tl.arange(0, DIM)
    mask = (rows < tokens)[:, None]
    if HEAD_DIM < DIM:
        mask = mask & (d < HEAD_DIM)[None, :]
    return tl.load(x + (rows * stride)[:, None] + d[None, :], mask=mask, other=0.0)


@triton.jit
def load_pieces(
    x,  # [tokens, HEAD_DIM], rows `stride` elements apart
    tokens, stride, SIZES: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """All rows of x: a tuple of tensors [SIZES[k], DIM]."""
    found = ()
    start = 0
    for at in tl.static_range(len(SIZES)):
        found = found + (load(x, start + tl.arange(0, SIZES[at]), tokens, stride, HEAD_DIM, DIM),)
        start += SIZES[at]
    return found


@triton.jit
def store(
    x,  # [tokens, HEAD_DIM], rows `stride` elements apart
    tile, rows, tokens, stride, HEAD_DIM: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
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
    """weightsᵀ x, for weights [keys, queries] and x [keys, features]; TALL: as a product whose rows are features."""
    if TALL:
        sums = tl.trans(product(tl.trans(x), weights))
    else:
        sums = product(tl.trans(weights), x)
    return sums


@triton.jit
def leading(p, dtype: tl.constexpr):
    """float32 p with only as many leading mantissa bits as dtype holds."""
    mask: tl.constexpr = 0xFFFF0000 if dtype == tl.bfloat16 else 0xFFFFE000
    return (p.to(tl.uint32, bitcast=True) & mask).to(tl.float32, bitcast=True)


@triton.jit
def of_this_head(x, heads, tokens, PARTS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """The pointer to this program's image and head in x [batch, tokens, PARTS, heads, HEAD_DIM]."""
    image, head = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
    return x + image * tokens * PARTS * heads * HEAD_DIM + head * HEAD_DIM


@triton.jit
def row_sums_of(x, tokens):
    """The pointer to this program's image and head in x [batch, heads, tokens]."""
    return x + tl.program_id(0).to(tl.int64) * tokens


@triton.jit(do_not_specialize=("heads", "tokens"))
def forward_kernel(
    qkv,  # [batch, tokens, 3, heads, HEAD_DIM]
    out,  # [batch, tokens, heads, HEAD_DIM]
    lse,  # float32 [batch, heads, tokens]
    heads, tokens, scale,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, SIZES: tl.constexpr, ROWS: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    width = heads * HEAD_DIM
    qkv = of_this_head(qkv, heads, tokens, 3, HEAD_DIM)
    out = of_this_head(out, heads, tokens, 1, HEAD_DIM)
    lse = row_sums_of(lse, tokens)
    ks = load_pieces(qkv + width, tokens, 3 * width, SIZES, HEAD_DIM, DIM)
    vs = load_pieces(qkv + 2 * width, tokens, 3 * width, SIZES, HEAD_DIM, DIM)
    for first in range(0, tokens, ROWS):
        i = first + tl.arange(0, ROWS)
        q = load(qkv, i, tokens, 3 * width, HEAD_DIM, DIM)
        scores = ()
        m = tl.full((ROWS,), float("-inf"), tl.float32)
        start = 0
        for at in tl.static_range(len(SIZES)):
            s = product(q, tl.trans(ks[at])) * (scale * LOG2E)
            j = start + tl.arange(0, SIZES[at])
            if at == len(SIZES) - 1:
                s = tl.where((j < tokens)[None, :], s, float("-inf"))
            if CAUSAL:
                s = tl.where(j[None, :] <= i[:, None], s, float("-inf"))
            m = tl.maximum(m, tl.max(s, 1))
            scores = scores + (s,)
            start += SIZES[at]
        l = tl.zeros((ROWS,), tl.float32)  # noqa: E741
        sums = tl.zeros((ROWS, DIM), tl.float32)
        for at in tl.static_range(len(SIZES)):
            p = tl.exp2(scores[at] - m[:, None])
            l += tl.sum(p, 1)  # noqa: E741
            sums = dot(round_to(p, q.dtype), vs[at], sums)
        store(out, sums * (1.0 / l)[:, None], i, tokens, width, HEAD_DIM, DIM)
        tl.store(lse + i, (m + tl.log2(l)) / LOG2E, mask=i < tokens)


@triton.jit
def queries_pass(
    d_out, qkv, lse, d_qkv, out, delta, heads, tokens, scale,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, SIZES: tl.constexpr, ROWS: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """Stores dq, delta and, if it is not None, out. Arguments as of two_pass_kernel."""
    width = heads * HEAD_DIM
    qkv, d_qkv = of_this_head(qkv, heads, tokens, 3, HEAD_DIM), of_this_head(d_qkv, heads, tokens, 3, HEAD_DIM)
    d_out = of_this_head(d_out, heads, tokens, 1, HEAD_DIM)
    lse, delta = row_sums_of(lse, tokens), row_sums_of(delta, tokens)
    ks = load_pieces(qkv + width, tokens, 3 * width, SIZES, HEAD_DIM, DIM)
    vs = load_pieces(qkv + 2 * width, tokens, 3 * width, SIZES, HEAD_DIM, DIM)
    for first in tl.range(0, tokens, ROWS, disable_licm=True):
        i = first + tl.arange(0, ROWS)
        q = load(qkv, i, tokens, 3 * width, HEAD_DIM, DIM)
        g = load(d_out, i, tokens, width, HEAD_DIM, DIM)
        l = tl.load(lse + i, mask=i < tokens, other=float("inf")) * LOG2E  # noqa: E741
        weights = ()
        sums = tl.zeros((ROWS, DIM), tl.float32)
        start = 0
        for at in tl.static_range(len(SIZES)):
            p = tl.exp2(product(q, tl.trans(ks[at])) * (scale * LOG2E) - l[:, None])
            j = start + tl.arange(0, SIZES[at])
            if at == len(SIZES) - 1:
                p = tl.where((j < tokens)[None, :], p, 0.0)
            if CAUSAL:
                p = tl.where(j[None, :] <= i[:, None], p, 0.0)
            high = leading(p, q.dtype)
            sums = dot(round_to(high, q.dtype), vs[at], sums)
            sums = dot(round_to(p - high, q.dtype), vs[at], sums)
            weights = weights + (p,)
            start += SIZES[at]
        d = tl.sum(sums * g.to(tl.float32), 1)
        tl.store(delta + i, d, mask=i < tokens)
        if out is not None:
            store(of_this_head(out, heads, tokens, 1, HEAD_DIM), sums, i, tokens, width, HEAD_DIM, DIM)
        dq = tl.zeros((ROWS, DIM), tl.float32)
        for at in tl.static_range(len(SIZES)):
            ds = weights[at] * (product(g, tl.trans(vs[at])) - d[:, None])
            dq = dot(round_to(ds, q.dtype), ks[at], dq)
        store(d_qkv, dq * scale, i, tokens, 3 * width, HEAD_DIM, DIM)


@triton.jit
def keys_pass(
    d_out, qkv, lse, d_qkv, delta, heads, tokens, scale,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, SIZES: tl.constexpr, ROWS: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """Stores dk and dv. Arguments as of two_pass_kernel."""
    width = heads * HEAD_DIM
    qkv, d_qkv = of_this_head(qkv, heads, tokens, 3, HEAD_DIM), of_this_head(d_qkv, heads, tokens, 3, HEAD_DIM)
    d_out = of_this_head(d_out, heads, tokens, 1, HEAD_DIM)
    lse, delta = row_sums_of(lse, tokens), row_sums_of(delta, tokens)
    qs = load_pieces(qkv, tokens, 3 * width, SIZES, HEAD_DIM, DIM)
    gs = load_pieces(d_out, tokens, width, SIZES, HEAD_DIM, DIM)
    for first in tl.range(0, tokens, ROWS, disable_licm=True):
        j = first + tl.arange(0, ROWS)
        k = load(qkv + width, j, tokens, 3 * width, HEAD_DIM, DIM)
        v = load(qkv + 2 * width, j, tokens, 3 * width, HEAD_DIM, DIM)
        dk = tl.zeros((ROWS, DIM), tl.float32)
        dv = tl.zeros((ROWS, DIM), tl.float32)
        start = 0
        for at in tl.static_range(len(SIZES)):
            i = start + tl.arange(0, SIZES[at])
            # Queries beyond the edge get P = 0; rows of keys beyond the edge are never stored.
            l = tl.load(lse + i, mask=i < tokens, other=float("inf")) * LOG2E  # noqa: E741
            d = tl.load(delta + i, mask=i < tokens, other=0.0)
            p = tl.exp2(product(k, tl.trans(qs[at])) * (scale * LOG2E) - l[None, :])
            if CAUSAL:
                p = tl.where(j[:, None] <= i[None, :], p, 0.0)
            ds = p * (product(v, tl.trans(gs[at])) - d[None, :])
            dv = dot(round_to(p, k.dtype), gs[at], dv)
            dk = dot(round_to(ds, k.dtype), qs[at], dk)
            start += SIZES[at]
        store(d_qkv + width, dk * scale, j, tokens, 3 * width, HEAD_DIM, DIM)
        store(d_qkv + 2 * width, dv, j, tokens, 3 * width, HEAD_DIM, DIM)


@triton.jit(do_not_specialize=("heads", "tokens", "d_heads", "d_tokens"))
def two_pass_kernel(
    d_out,  # [batch, tokens, heads, HEAD_DIM]
    qkv,  # [batch, tokens, 3, heads, HEAD_DIM]
    lse,  # float32 [batch, heads, tokens]
    d_qkv,  # [batch, tokens, 3, heads, HEAD_DIM]
    out,  # [batch, tokens, heads, HEAD_DIM], or None if it is not wanted
    delta,  # float32 [batch, heads, tokens], scratch
    heads, tokens, d_heads, d_tokens, scale,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, SIZES: tl.constexpr, ROWS: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """d_heads = heads and d_tokens = tokens are passed again so that the passes share no address in a register."""
    queries_pass(
        d_out, qkv, lse, d_qkv, out, delta, heads, tokens, scale, HEAD_DIM, DIM, SIZES, ROWS, CAUSAL
    )  # fmt: skip
    tl.debug_barrier()  # until all of delta is stored
    keys_pass(
        d_out, qkv, lse, d_qkv, delta, d_heads, d_tokens, scale, HEAD_DIM, DIM, SIZES, ROWS, CAUSAL
    )  # fmt: skip


@triton.jit(do_not_specialize=("heads", "d_heads", "tokens"))
def one_pass_kernel(
    d_out,  # [batch, tokens, heads, HEAD_DIM]
    qkv,  # [batch, tokens, 3, heads, HEAD_DIM]
    lse,  # float32 [batch, heads, tokens]
    d_qkv,  # [batch, tokens, 3, heads, HEAD_DIM]
    out,  # [batch, tokens, heads, HEAD_DIM], or None if it is not wanted
    heads, d_heads, tokens, scale,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, KEYS: tl.constexpr, ROWS: tl.constexpr, CAUSAL: tl.constexpr,
    TALL: tl.constexpr,
):  # fmt: skip
    """d_heads = heads is passed again so that no address of k stays in a register for dk."""
    width, d_width = heads * HEAD_DIM, d_heads * HEAD_DIM
    qkv, d_qkv = of_this_head(qkv, heads, tokens, 3, HEAD_DIM), of_this_head(d_qkv, d_heads, tokens, 3, HEAD_DIM)
    d_out = of_this_head(d_out, heads, tokens, 1, HEAD_DIM)
    lse = row_sums_of(lse, tokens)
    j = tl.arange(0, KEYS)
    k = load(qkv + width, j, tokens, 3 * width, HEAD_DIM, DIM)
    v = load(qkv + 2 * width, j, tokens, 3 * width, HEAD_DIM, DIM)
    dk = tl.zeros((KEYS, DIM), tl.float32)
    dv = tl.zeros((KEYS, DIM), tl.float32)
    # Loop-invariant code is only cheap address arithmetic; hoisting it would take registers, and none are free.
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
            again = of_this_head(out, heads, tokens, 1, HEAD_DIM)
            store(again, over_keys(p, v, TALL), i, tokens, width, HEAD_DIM, DIM)
        # The order of the last products matters. ptxas serialises every wgmma if one is in flight across the end of the
        # loop, so for wgmma dq, whose result is stored, comes last. For mma.sync the order with dk last does not spill.
        if TALL:
            dk = dot(ds, q, dk)
        store(d_qkv, over_keys(ds, k, TALL) * scale, i, tokens, 3 * width, HEAD_DIM, DIM)
        if not TALL:
            dk = dot(ds, q, dk)
    store(d_qkv + d_width, dk * scale, j, tokens, 3 * d_width, HEAD_DIM, DIM)
    store(d_qkv + 2 * d_width, dv, j, tokens, 3 * d_width, HEAD_DIM, DIM)


def forward(qkv: Tensor, scale: float, causal: bool, tile: Tile) -> tuple[Tensor, Tensor]:
    """(out, lse). See Backend in ops/attention/contract.py."""
    batch, tokens, _, heads, head_dim = qkv.shape
    out = qkv.new_empty((batch, tokens, heads, head_dim))
    lse = qkv.new_empty((batch, heads, tokens), dtype=torch.float32)
    forward_kernel[(batch * heads,)](
        qkv, out, lse, heads, tokens, scale, HEAD_DIM=head_dim, DIM=padded(head_dim),
        SIZES=pieces_of(tokens, tile.least, tile.most), ROWS=tile.rows, CAUSAL=causal,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out, lse


def backward(
    d_out: Tensor, qkv: Tensor, lse: Tensor, scale: float, causal: bool, want_out: bool, tile: Tile
) -> tuple[Tensor, Tensor | None]:
    """(d_qkv, out or None). See Backend in ops/attention/contract.py."""
    batch, tokens, _, heads, head_dim = qkv.shape
    d_qkv, out = torch.empty_like(qkv), torch.empty_like(d_out) if want_out else None
    grid, named = (batch * heads,), {"HEAD_DIM": head_dim, "DIM": padded(head_dim), "ROWS": tile.rows, "CAUSAL": causal}
    named |= {"num_warps": tile.warps, "num_stages": tile.stages}
    if tile.passes == 2:
        two_pass_kernel[grid](
            d_out, qkv, lse, d_qkv, out, torch.empty_like(lse), heads, tokens, heads, tokens, scale,
            SIZES=pieces_of(tokens, tile.least, tile.most), **named,
        )  # fmt: skip
    else:
        one_pass_kernel[grid](
            d_out, qkv, lse, d_qkv, out, heads, heads, tokens, scale, KEYS=padded(tokens), TALL=tile.tall, **named
        )
    return d_qkv, out
