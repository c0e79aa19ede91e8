"""Triton's CPU interpreter and bfloat16: what it gets wrong, mended in this one place.

It cuts a float32 off where the compiler rounds it to nearest even, and misreads subnormals on the way. On a
GPU the functions here are the plain operation.
"""

import triton
import triton.language as tl

INTERPRETING = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """float32 x as dtype, rounded to nearest even."""
    if INTERPRETING and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        cast = tl.where(x != x, 0x7FC0, rounded).to(tl.uint16).to(dtype, bitcast=True)
    else:
        cast = x.to(dtype)
    return cast
