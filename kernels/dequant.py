"""Gather rows of a quantized table and widen them: out[i, c] = round(value(codes[rows[i], c]) · scales[rows[i]]).

    program (r, c):                              a tile of ROWS × COLS of the output
        row   = rows[r·ROWS : +ROWS]             8 bytes a row
        scale = scales[row]                      4 bytes a row, a gather
        codes = codes[row, c·COLS : +COLS]       2 bits to 4 bytes an element, whole rows at a time
        value = codes, or of packed ones         a shift out of a word of four levels
        out[r tile, c tile] = (value · scale) rounded to nearest even     4, 2 or 1 bytes an element
    normalize, program r:                        whole rows
        scale = 1 / sqrt(Σ value²)               over tiles; the first stays in registers, up to 4096 elements

A few integer operations and one multiplication for 3 bytes (int8 to bf16) or 5 (to float32) moved: the bound is memory
bandwidth or, for a table in pinned host memory, the bus. A tile reads whole cache lines over the bus, once (normalize
reads rows of more than 4096 elements twice). A tile of 2 × 1024 moves 6 KB for int8 to bf16; one of 4 × 1024 spills on
sm_80. A row outside the table gives NaN, 0 as int8, because raising would make the host wait for the GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .interpreter import round_to


@triton.jit
def _word(LEVELS: tl.constexpr, k: tl.constexpr):
    """Levels 4k to 4k + 3, a byte each, as an int32."""
    return tl.full((), (((LEVELS >> 32 * k) & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000, tl.int32)


@triton.jit
def _level(code, BITS: tl.constexpr, LEVELS: tl.constexpr):
    """The level, int32, of each code (the lowest BITS bits of an int32), without a table in memory."""
    word = _word(LEVELS, 0)
    if BITS == 4:
        low = tl.where((code & 4) != 0, _word(LEVELS, 1), word)
        high = tl.where((code & 4) != 0, _word(LEVELS, 3), _word(LEVELS, 2))
        word = tl.where((code & 8) != 0, high, low)
    return (word << ((~code & 3) << 3)) >> 24


@triton.jit
def _values(
    codes,  # [n, columns], rows codes_stride elements apart
    row, inside, start, columns, codes_stride,
    BITS: tl.constexpr, LEVELS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Columns start to start + COLS of the rows, without their scales: int32 for integer codecs, else float32."""
    PER: tl.constexpr = 8 // BITS if LEVELS else 1
    c = start // PER + tl.arange(0, COLS // PER)
    mask = inside[:, None] & (c < columns)[None, :]
    x = tl.load(codes + row[:, None] * codes_stride + c[None, :], mask=mask, other=0)
    if LEVELS:
        x = x.to(tl.int32)
        if BITS == 4:
            x = tl.join(_level(x, 4, LEVELS), _level(x >> 4, 4, LEVELS))
        else:
            even = tl.join(_level(x, 2, LEVELS), _level(x >> 4, 2, LEVELS))
            odd = tl.join(_level(x >> 2, 2, LEVELS), _level(x >> 6, 2, LEVELS))
            x = tl.join(even, odd)
        x = x.reshape([ROWS, COLS])
    elif x.dtype == tl.int8:
        x = x.to(tl.int32)
    elif x.dtype == tl.int16:  # bfloat16's bits
        x = (x.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    elif x.dtype == tl.uint8:  # e4m3's bits: its exponent and mantissa, read as float32's, are 2^120 too small
        bits = x.to(tl.int32)
        x = (((bits & 0x80) << 24) | ((bits & 0x7F) << 20)).to(tl.float32, bitcast=True) * 2.0**120
        x = tl.where((bits & 0x7F) == 0x7F, float("nan"), x)
    return x


@triton.jit
def _squares(x, start, dim, COLS: tl.constexpr):
    """The sum of squares of each row; exact for integers."""
    x = tl.where((start + tl.arange(0, COLS) < dim)[None, :], x, 0)
    if x.dtype == tl.int32:
        sums = tl.sum(x * x, 1).to(tl.int64)
    else:
        wide = x.to(tl.float64)
        sums = tl.sum(wide * wide, 1)
    return sums


@triton.jit
def _store(
    x, step, scale, inside,
    out,  # [m, dim]
    i, m, start, dim, COLS: tl.constexpr,
):  # fmt: skip
    c = start + tl.arange(0, COLS)
    if out.dtype.element_ty == tl.int8:
        x = tl.where(inside[:, None], x, 0).to(tl.int8)
    else:
        x = round_to(x.to(tl.float32) * step[:, None] * scale[:, None], out.dtype.element_ty)
    tl.store(out + i[:, None] * dim + c[None, :], x, mask=(i < m)[:, None] & (c < dim)[None, :])


# One compiled program for all sizes; only what wide loads and stores depend on compiles another.
@triton.jit(
    do_not_specialize=("n", "m", "dim", "columns", "codes_stride", "scales_stride"),
    do_not_specialize_on_alignment=("scales", "rows"),
)
def dequant_kernel(
    codes,  # [n, columns], rows codes_stride elements apart
    scales,  # float32 [n], scales_stride elements apart; not read without HAS_SCALES
    rows,  # int64 [m]; not read without HAS_ROWS
    out,  # [m, dim]
    n, m, dim, columns, codes_stride, scales_stride,
    HAS_ROWS: tl.constexpr, HAS_SCALES: tl.constexpr, NORMALIZE: tl.constexpr, UNIT: tl.constexpr,
    BITS: tl.constexpr, LEVELS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """columns: elements in a row of codes. dim, columns and codes_stride are given as multiples of UNIT.

    LEVELS: for packed codes of BITS bits, level k in byte k; else 0.
    """
    dim, columns, codes_stride = dim * UNIT, columns * UNIT, codes_stride * UNIT
    i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    if HAS_ROWS:
        row = tl.load(rows + i, mask=i < m, other=0)
    else:
        row = i
    inside = (row >= 0) & (row < n)
    step = tl.full((ROWS,), 1.0, tl.float32)
    if NORMALIZE:
        held = _values(codes, row, inside, 0, columns, codes_stride, BITS, LEVELS, ROWS, COLS)
        squares = _squares(held, 0, dim, COLS)
        for start in range(COLS, dim, COLS):
            x = _values(codes, row, inside, start, columns, codes_stride, BITS, LEVELS, ROWS, COLS)
            squares += _squares(x, start, dim, COLS)
        if squares.dtype == tl.int64:
            # Rounded as IEEE demands: the same bits as on the CPU.
            scale = tl.div_rn(step, tl.sqrt_rn(tl.maximum(squares, 1).to(tl.float32)))
        else:
            # A power of two that keeps the products of the shortest and the longest rows normal numbers.
            step = tl.where(squares < 2.0**-100, 2.0**64, tl.where(squares > 2.0**100, 2.0**-64, step))
            scale = (1.0 / (tl.sqrt(tl.where(squares == 0, 1.0, squares)) * step.to(tl.float64))).to(tl.float32)
        scale = tl.where(inside, tl.where(squares == 0, 0.0, scale), float("nan"))
        _store(held, step, scale, inside, out, i, m, 0, dim, COLS)
        for start in range(COLS, dim, COLS):
            x = _values(codes, row, inside, start, columns, codes_stride, BITS, LEVELS, ROWS, COLS)
            _store(x, step, scale, inside, out, i, m, start, dim, COLS)
    else:
        if HAS_SCALES:
            scale = tl.load(scales + row * scales_stride, mask=inside, other=float("nan"))
        else:
            scale = tl.where(inside, 1.0, float("nan"))
        start = tl.program_id(1) * COLS
        x = _values(codes, row, inside, start, columns, codes_stride, BITS, LEVELS, ROWS, COLS)
        _store(x, step, scale, inside, out, i, m, start, dim, COLS)


def tile(dim: int, normalize: bool = False) -> tuple[int, int]:
    """(ROWS, COLS) of a tile of 2048 elements; with normalize up to 4096 of one row."""
    cols = min(4096 if normalize else 1024, max(256, triton.next_power_of_2(dim)))
    return max(1, 2048 // cols), cols


def warps(rows: int, cols: int) -> int:
    """The number of warps with which a thread has 16 elements."""
    return rows * cols // 512


def packing(levels: tuple[int, ...]) -> dict[str, int]:
    """BITS and LEVELS of the kernel; levels: () for codes that are not packed."""
    bits = (len(levels) - 1).bit_length()
    return {"BITS": bits, "LEVELS": sum((level & 0xFF) << 8 * k for k, level in enumerate(levels))}


AS_BITS = {torch.bfloat16: torch.int16, torch.float8_e4m3fn: torch.uint8}


def dequant(
    codes: Tensor,
    scales: Tensor | None,
    rows: Tensor | None,
    out: Tensor,
    levels: tuple[int, ...] = (),
    normalize: bool = False,
) -> None:
    """Fills out [m, dim] (contiguous; float32, bfloat16, float16, or int8 for integer codecs) on the current device.

    codes: int8, float8_e4m3fn, bfloat16 or float32 [n, dim], or with levels (of 4 or 16 codes) packed uint8
    [n, bytes]; the last dimension contiguous. scales: float32 [n], or None for ones; rows: int64 [m], contiguous,
    or None for all. codes and scales may lie in pinned host memory. normalize: scales are not read.
    """
    (m, dim), n = out.shape, len(codes)
    codes = codes.view(AS_BITS.get(codes.dtype, codes.dtype))
    tile_rows, tile_cols = tile(dim, normalize)
    sizes = dim, codes.shape[1], codes.stride(0)
    unit = 16 if all(size % 16 == 0 for size in sizes) else 1
    grid = (triton.cdiv(m, tile_rows), 1 if normalize else triton.cdiv(dim, tile_cols))
    dequant_kernel[grid](
        codes, out if scales is None else scales, out if rows is None else rows, out, n, m,
        *(size // unit for size in sizes), 0 if scales is None else scales.stride(0), HAS_ROWS=rows is not None,
        HAS_SCALES=scales is not None, NORMALIZE=normalize, UNIT=unit, ROWS=tile_rows, COLS=tile_cols,
        **packing(levels), num_warps=warps(tile_rows, tile_cols),
    )  # fmt: skip
