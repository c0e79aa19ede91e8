"""Gather rows of int8 codes and widen them: out[i, c] = round(codes[rows[i], c] · scales[rows[i]]).

    program (r, c):                              a tile of ROWS × COLS of the output
        row   = rows[r·ROWS : +ROWS]             8 bytes a row
        scale = scales[row]                      4 bytes a row, a gather
        codes = codes[row, c·COLS : +COLS]       1 byte an element, whole rows at a time
        out[r tile, c tile] = (float32(codes) · scale) rounded to nearest even     4 or 2 bytes an element

One multiplication for 3 bytes (bf16) or 5 (float32) moved: the bound is memory bandwidth. A tile of 2 × 1024
moves 6 KB for bf16; one of 4 × 1024 spills on sm_80. A row outside the table gives NaN: raising would make
the host wait for the GPU.
"""

import triton
import triton.language as tl
from torch import Tensor

from .interpreter import round_to


@triton.jit
def dequant_kernel(
    codes, scales, rows, out, n, m, dim, codes_stride, scales_stride,
    HAS_ROWS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * COLS + tl.arange(0, COLS)
    if HAS_ROWS:
        row = tl.load(rows + i, mask=i < m, other=0)
    else:
        row = i
    inside = (row >= 0) & (row < n)
    scale = tl.load(scales + row * scales_stride, mask=inside, other=float("nan"))
    mask = (i < m)[:, None] & (c < dim)[None, :]
    code = tl.load(codes + row[:, None] * codes_stride + c[None, :], mask=mask & inside[:, None], other=0)
    wide = code.to(tl.float32) * scale[:, None]
    tl.store(out + i[:, None] * dim + c[None, :], round_to(wide, out.dtype.element_ty), mask=mask)


def tile(dim: int) -> tuple[int, int]:
    """(ROWS, COLS): 2048 elements, 16 for each of the 128 threads: one 16-byte load of codes."""
    cols = min(1024, max(16, triton.next_power_of_2(dim)))
    return 2048 // cols, cols


def dequant(codes: Tensor, scales: Tensor, rows: Tensor | None, out: Tensor) -> None:
    """Fills out [m, dim] (contiguous; float32, bfloat16 or float16).

    codes: int8 [n, dim], its last dimension contiguous; scales: float32 [n]; rows: int64 [m], contiguous,
    or None for all.
    """
    (m, dim), n = out.shape, len(codes)
    block_rows, block_cols = tile(dim)
    grid = (triton.cdiv(m, block_rows), triton.cdiv(dim, block_cols))
    dequant_kernel[grid](
        codes, scales, out if rows is None else rows, out, n, m, dim, codes.stride(0), scales.stride(0),
        HAS_ROWS=rows is not None, ROWS=block_rows, COLS=block_cols,
    )  # fmt: skip
