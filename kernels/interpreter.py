"""Workarounds for what Triton's CPU interpreter gets wrong with bfloat16.

The interpreter truncates a float32 where the compiler rounds it to nearest even, misreads subnormals while doing so,
converts integers to wrong bit patterns, and multiplies the raw 16-bit patterns in a dot. On a GPU the functions of this
module are the plain operations.
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


@triton.jit
def widen(x, dtype: tl.constexpr):
    """int8 x as dtype, exactly; x of that dtype as it is."""
    if INTERPRETING and x.dtype == tl.int8:
        wide = round_to(x.to(tl.float32), dtype)
    else:
        wide = x.to(dtype)
    return wide


@triton.jit
def dot(left, right, sums):
    """sums + left @ right in float32, exact products: float32 operands are not rounded to tf32."""
    if INTERPRETING and left.dtype == tl.bfloat16:
        left = (left.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
        right = (right.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return tl.dot(left, right, sums, input_precision="ieee")
