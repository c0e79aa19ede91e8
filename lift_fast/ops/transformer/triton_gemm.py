"""The "triton_gemm" backend: as "triton", with mlp's activation in the epilogue of the matrix product next to it.

The activation then needs no pass over memory of its own. `mlp` uses these products in bfloat16 and float16; exact
float32 products, and float8 ones, are cuBLAS's, with the activation as in "triton".
"""

from typing import Any

import torch
from torch import Tensor

from ..backends import HALF
from .contract import Activation
from .triton import bias_act, bias_act_backward, layernorm, layernorm_backward, setting, why_not

__all__ = [
    "bias_act",
    "bias_act_backward",
    "layernorm",
    "layernorm_backward",
    "linear_act",
    "linear_act_backward",
    "why_not",
]


def linear_act(x: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation) -> tuple[Tensor, Tensor]:
    """(h, a): h = x @ weight.T rounded to x's dtype, without bias; a = act(h + bias) of that h, rounded likewise.

    x [rows, width_in], weight [width_out, width_in] of one dtype, contiguous; bias float32 [width_out]. Keep h for the
    backward, which computes exactly the same a from it. Raises ValueError for dtypes other than bfloat16 and float16.
    """
    from ...kernels import mlp as kernels

    _check(x, weight)
    h = x.new_empty(len(x), len(weight))
    a = torch.empty_like(h)
    if h.numel():
        with torch.cuda.device_of(x):
            tile = kernels.ProductTile(**_product_setting("linear_act", x, weight, h, a))
            kernels.linear_act(x, weight, bias, activation, h, a, tile)
    return h, a


def linear_act_backward(
    dm: Tensor, weight: Tensor, h: Tensor, bias: Tensor | None, activation: Activation
) -> tuple[Tensor, Tensor, Tensor]:
    """(dh, a, d_bias) from the gradient of m = a @ weight.T: dh = (dm @ weight) · act'(h + bias), a again, Σ_rows dh.

    dm [rows, width_2], weight [width_2, width_out], h [rows, width_out] of one dtype, contiguous; bias and d_bias
    float32 [width_out]. d_bias sums dh before it is rounded, with the same bits at every run. dm @ weight stays in
    float32. Raises ValueError as `linear_act` does.
    """
    from ...kernels import mlp as kernels

    _check(dm, weight, h)
    dh, a = torch.empty_like(h), torch.empty_like(h)
    if not h.numel():
        return dh, a, torch.zeros(h.shape[1], dtype=torch.float32, device=h.device)
    with torch.cuda.device_of(dm):
        tile = kernels.ProductTile(**_product_setting("linear_act_backward", dm, weight, h, dh, a))
        merged = kernels.MergeTile(**setting("merge", h))
        return dh, a, kernels.linear_act_backward(dm, weight, h, bias, activation, dh, a, tile, merged)


def _product_setting(name: str, *operands: Tensor) -> dict[str, Any]:
    """Whether operands are aligned is a fact: if not, they pass through registers on their way to shared memory."""
    from ...kernels.pairs import aligned

    even = all(map(aligned, operands))
    return setting(name, operands[2], dim=operands[0].shape[1], aligned=even) | {"aligned": even}


def _check(*operands: Tensor) -> None:
    """Raises ValueError."""
    dtypes = {operand.dtype for operand in operands}
    if len(dtypes) > 1 or not dtypes <= set(HALF):
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise ValueError(f"products with an activation take bfloat16 or float16, the same for all, not {names}")
    if not all(operand.is_contiguous() for operand in operands):
        raise ValueError("products with an activation take contiguous tensors")
