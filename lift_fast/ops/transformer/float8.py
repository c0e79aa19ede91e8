"""The three matrix products of a linear layer in 8-bit floating point (Micikevicius et al., arXiv 2209.05433).

    a₈ = round₈(2^i a),   b₈ = round₈(2^j b),   a bᵀ ≈ 2^-(i+j) a₈ b₈ᵀ        sums in float32

Each operand has one scale, computed at every product, on the device, without a host sync: the largest power of two that
keeps the largest element representable. Such a scale leaves the mantissa as it is, so each element is rounded once; a
finer scale would not improve precision. Tokens and weights become e4m3 (3 bits of mantissa, up to 448), gradients e5m2
(2 bits, up to 57 344); results have the dtype of the first operand. Zeros stay zeros; a NaN or an infinity anywhere
makes the whole result NaN.

Before the product, each operand is read for its maximum, scaled in its own dtype and cast. This moves 9 bytes per
element in bfloat16, or 5 where torch.compile fuses the last two steps. cuBLASLt needs the summed dimension to be
contiguous in both operands; where it is not, the cast transposes. The forward may accumulate in fewer bits than
float32 (use_fast_accum), the backward may not.

A result whose columns are not a multiple of 16, and any in float64, is computed in the operands' own dtype. The summed
dimension is padded to a multiple of 16. Not run on a GPU yet.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

FORWARD, GRADIENT = torch.float8_e4m3fn, torch.float8_e5m2
LARGEST = {kind: torch.finfo(kind).max for kind in (FORWARD, GRADIENT)}
MULTIPLE = 16  # cuBLASLt's condition
TINY = 2.0**-100  # the least maximum that is assumed, so that the scale and its inverse stay finite


def why_not(device: torch.device) -> str | None:
    """Why this device cannot multiply in float8; None if it can."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if (major, minor) < (8, 9):
            return f"float8 needs a GPU of compute capability 8.9 or later, not {major}.{minor}"
        return None
    if device.type == "cpu" and torch._C._dispatch_has_kernel_for_dispatch_key("aten::_scaled_mm", "CPU"):
        return None
    return f"torch {torch.__version__} does not multiply float8 on {device.type}"


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [rows, in] · weight [out, in]ᵀ + bias [out]."""
    return _product(x, FORWARD, weight, bias, fast=True)


def input_product(g: Tensor, weight: Tensor) -> Tensor:
    """g [rows, out] · weight [out, in]: the gradient of x."""
    return _product(g, GRADIENT, weight.T)


def weight_product(g: Tensor, x: Tensor) -> Tensor:
    """g [rows, out]ᵀ · x [rows, in]: the gradient of the weight."""
    return _product(g.T, GRADIENT, x.T)


def _product(a: Tensor, kind: torch.dtype, b: Tensor, bias: Tensor | None = None, fast: bool = False) -> Tensor:
    """a [m, k] · b [n, k]ᵀ + bias [n], with a rounded to this float8 dtype."""
    if len(b) % MULTIPLE or a.dtype == torch.float64 or not a.numel():
        return F.linear(a, b, bias)
    (a8, scale_a), (b8, scale_b) = _rounded(a, kind), _rounded(b, FORWARD)
    apart = a.dtype == torch.float32  # cuBLASLt adds no bias to a float32 result
    c = torch._scaled_mm(a8, b8.T, scale_a, scale_b, None if apart else bias, out_dtype=a.dtype, use_fast_accum=fast)
    return c + bias if apart and bias is not None else c


def _rounded(x: Tensor, kind: torch.dtype) -> tuple[Tensor, Tensor]:
    """(x [rows, k] in float8, contiguous, columns padded to a multiple of 16; the factor that undoes the scale)."""
    largest = torch.linalg.vector_norm(x, torch.inf, dtype=torch.float32).clamp(min=TINY)
    scale = (LARGEST[kind] / largest).log2().floor().exp2()
    y = x * scale
    if missing := -x.shape[1] % MULTIPLE:
        y = F.pad(y, (0, missing))
    return y.to(kind, memory_format=torch.contiguous_format), scale.reciprocal()
