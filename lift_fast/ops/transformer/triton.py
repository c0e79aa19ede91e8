"""The parts of a transformer block on a GPU, in Triton (kernels/layernorm.py, kernels/mlp.py).

`linear_act` and `linear_act_backward` are more than blocks.py asks for: the product beside the activation, which then
costs no pass over memory of its own. In bfloat16 and float16; exact float32 products are cuBLAS's.
"""

from typing import Any

import torch
from torch import Tensor

from .. import tuned
from .contract import Activation

HALF = (torch.bfloat16, torch.float16)


def layernorm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    y: Tensor,
    stream: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
) -> None:
    from ...kernels import layernorm as kernels

    if x.numel():
        with torch.cuda.device_of(x):
            tile = kernels.RowTile(**_setting("layernorm", x))
            kernels.layernorm(x, residual, weight, bias, eps, y, stream, mean, rstd, tile)


def layernorm_backward(
    dy: Tensor,
    stream: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    d_stream: Tensor | None,
    dx: Tensor,
    y: Tensor | None,
) -> tuple[Tensor, Tensor]:
    from ...kernels import layernorm as kernels

    if not dy.numel():
        return torch.zeros_like(weight), torch.zeros_like(bias)
    with torch.cuda.device_of(dy):
        tile, merged = kernels.RowTile(**_setting("layernorm_backward", dy)), kernels.MergeTile(**_setting("merge", dy))
        d_weight, d_bias = kernels.layernorm_backward(
            dy, stream, mean, rstd, weight, bias, d_stream, dx, y, tile, merged
        )
        return d_weight, d_bias.clone()  # both lie in one tensor, which two results of an operator may not


def bias_act(h: Tensor, bias: Tensor, activation: Activation, a: Tensor) -> None:
    from ...kernels import mlp as kernels

    if h.numel():
        with torch.cuda.device_of(h):
            kernels.bias_act(h, bias, activation, a, kernels.Tile(**_setting("bias_act", h)))


def bias_act_backward(
    da: Tensor, h: Tensor, bias: Tensor, activation: Activation, dh: Tensor, a: Tensor | None
) -> Tensor:
    from ...kernels import mlp as kernels

    if not h.numel():
        return torch.zeros_like(bias)
    with torch.cuda.device_of(h):
        tile, merged = kernels.Tile(**_setting("bias_act_backward", h)), kernels.MergeTile(**_setting("merge", h))
        return kernels.bias_act_backward(da, h, bias, activation, dh, a, tile, merged)


def linear_act(x: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation) -> tuple[Tensor, Tensor]:
    """(h, a): h = x @ weight.T rounded to x's dtype, without bias; a = act(h + bias) of that h, rounded likewise.

    x [rows, width_in], weight [width_out, width_in] of one dtype, contiguous; bias float32 [width_out]. Keep h for the
    backward, which forms the very same a from it. Raises ValueError for another dtype than bfloat16 and float16.
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

    dm [rows, width_2], weight [width_2, width_out], h [rows, width_out] of one dtype, contiguous; bias float32
    [width_out], as d_bias, which sums dh before it is rounded: the same bits at every run. dm @ weight stays in
    float32. Raises ValueError as `linear_act` does.
    """
    from ...kernels import mlp as kernels

    _check(dm, weight, h)
    dh, a = torch.empty_like(h), torch.empty_like(h)
    if not h.numel():
        return dh, a, torch.zeros(h.shape[1], dtype=torch.float32, device=h.device)
    with torch.cuda.device_of(dm):
        tile = kernels.ProductTile(**_product_setting("linear_act_backward", dm, weight, h, dh, a))
        merged = kernels.MergeTile(**_setting("merge", h))
        return dh, a, kernels.linear_act_backward(dm, weight, h, bias, activation, dh, a, tile, merged)


def _setting(name: str, x: Tensor, **facts: int | str | bool) -> dict[str, Any]:
    facts |= {"width": x.shape[1], "itemsize": x.element_size()}
    return tuned.lookup("transformer", tuned.gpu("transformer", x.device), name, **facts)


def _product_setting(name: str, *operands: Tensor) -> dict[str, Any]:
    """Operands that are not aligned pass through registers on their way to shared memory."""
    from ...kernels.pairs import aligned

    even = all(map(aligned, operands))
    return _setting(name, operands[2], dim=operands[0].shape[1], aligned=even) | {"aligned": even}


def _check(*operands: Tensor) -> None:
    dtypes = {operand.dtype for operand in operands}
    if len(dtypes) > 1 or not dtypes <= set(HALF):
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise ValueError(f"the products with an activation take bfloat16 or float16, all alike, and got {names}")
    if not all(operand.is_contiguous() for operand in operands):
        raise ValueError("the products with an activation take contiguous tensors")
