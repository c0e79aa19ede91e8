"""The two linear layers of a transformer block with a GELU between them (Hendrycks and Gimpel, arXiv 1606.08415).

    h = x W₁ᵀ,   a = act(h + b₁),   out = a W₂ᵀ + b₂

The forward keeps x and h. The pass of the backward that multiplies by act' also computes a again, which is four times
as wide as x, and sums b₁'s gradient. b₁ is added in the pass of the activation, not by the matrix product.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from ..backends import HALF, spares_dynamo
from .contract import ACTIVATIONS, FUSED_GEMM, Activation, BiasAct, BiasActGrad, choose
from .eager import activate
from .layernorm import wide
from .linear import input_product, multiplied_in, product, weight_product


def reference(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, activation: Activation = "gelu") -> Tensor:
    """The definition, in the dtype of its inputs (float64 for tests)."""
    return activate(x @ w1.T + b1, activation) @ w2.T + b2


def mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    activation: Activation = "gelu",
    *,
    fp8: bool = False,
    backend: str | None = None,
) -> Tensor:
    """act(x w1ᵀ + b1) w2ᵀ + b2, as [..., out].

    x: [..., width] of any floating dtype; w1 [hidden, width], b1 [hidden], w2 [out, hidden], b2 [out]. Computed in x's
    dtype, or autocast's. activation: "gelu" (exact), "gelu_tanh" or "quick_gelu" (z σ(1.702 z)). fp8: matrix products
    in float8, see float8.py. backend: for the activation; "triton_gemm" computes it in the matrix products' epilogue.
    Raises ValueError for shapes that do not match and unknown activations, BackendError for an unavailable backend.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"no activation {activation!r}; there are: {', '.join(ACTIVATIONS)}")
    if x.shape[-1:] != w1.shape[1:] or b1.shape != w1.shape[:1] or w1.shape[0] != w2.shape[1] or len(b2) != len(w2):
        shapes = ", ".join(str(tuple(t.shape)) for t in (x, w1, b1, w2, b2))
        raise ValueError(f"mlp takes [..., width], [hidden, width], [hidden], [out, hidden], [out], not {shapes}")
    dtype = multiplied_in(x)
    args = (w1.to(dtype), b1.to(wide(dtype)), w2.to(dtype), b2.to(dtype))
    return _Mlp.apply(x.to(dtype), *args, activation, fp8, backend)


def up(
    x: Tensor, w1: Tensor, b1: Tensor, activation: Activation, fp8: bool, backend: str | None
) -> tuple[Tensor, Tensor]:
    """(h, a) of rows x; h is without its bias."""
    if _fused(x, fp8, backend):
        return torch.ops.lift_fast.linear_act(x, w1, b1, activation)
    h = product(x, w1, None, fp8)
    return h, torch.ops.lift_fast.bias_act(h, b1, activation, backend)


def down_backward(
    g: Tensor, w2: Tensor, h: Tensor, b1: Tensor, activation: Activation, fp8: bool, backend: str | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(dh, a, b₁'s gradient) from the gradient g of out; a is computed again."""
    if _fused(h, fp8, backend):
        return torch.ops.lift_fast.linear_act_backward(g, w2, h, b1, activation)
    da = input_product(g, w2, fp8)
    a, d_b1 = torch.ops.lift_fast.bias_act_backward(da, h, b1, activation, backend)
    return da, a, d_b1


def _fused(x: Tensor, fp8: bool, backend: str | None) -> bool:
    """Whether the matrix products have the activation in their epilogue."""
    return backend == FUSED_GEMM and not fp8 and x.dtype in HALF


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w1, b1, w2, b2, activation, fp8, backend) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        h, a = up(rows, w1, b1, activation, fp8, backend)
        ctx.save_for_backward(rows, h, w1, b1, w2)
        ctx.options = activation, fp8, backend
        return product(a, w2, b2, fp8).view(*x.shape[:-1], len(w2))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple:
        rows, h, w1, b1, w2 = ctx.saved_tensors
        activation, fp8, backend = ctx.options
        shape, g = g.shape, g.reshape(-1, g.shape[-1]).contiguous()
        dh, a, d_b1 = down_backward(g, w2, h, b1, activation, fp8, backend)
        d_w2, d_w1 = weight_product(g, a, fp8), weight_product(dh, rows, fp8)
        dx = input_product(dh, w1, fp8).view(*shape[:-1], -1)
        return dx, d_w1, d_b1, d_w2, g.sum(dim=0), None, None, None


@spares_dynamo
@torch.library.custom_op(
    "lift_fast::bias_act",
    mutates_args=(),
    schema="(Tensor h, Tensor bias, str activation, str? backend) -> Tensor",
)
def _bias_act(h: Tensor, bias: Tensor, activation: str, backend: str | None) -> Tensor:
    a = torch.empty_like(h)
    choose(h.device.type, h.dtype, backend).bias_act(BiasAct(h, bias, activation, a))  # type: ignore[arg-type]
    return a


@_bias_act.register_fake
def _(h, bias, activation, backend):
    return torch.empty_like(h)


@spares_dynamo
@torch.library.custom_op(
    "lift_fast::bias_act_backward",
    mutates_args=("da",),
    schema="(Tensor(a!) da, Tensor h, Tensor bias, str activation, str? backend) -> (Tensor a, Tensor d_bias)",
)
def _bias_act_backward(
    da: Tensor, h: Tensor, bias: Tensor, activation: str, backend: str | None
) -> tuple[Tensor, Tensor]:
    """Overwrites da with dh."""
    a = torch.empty_like(h)
    call = BiasActGrad(da, h, bias, activation, da, a)  # type: ignore[arg-type]
    return a, choose(h.device.type, h.dtype, backend).bias_act_backward(call)


@_bias_act_backward.register_fake
def _(da, h, bias, activation, backend):
    return torch.empty_like(h), torch.empty_like(bias)


@spares_dynamo
@torch.library.custom_op(
    "lift_fast::linear_act",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor bias, str activation) -> (Tensor h, Tensor a)",
)
def _linear_act(x: Tensor, weight: Tensor, bias: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    fused: Any = choose(x.device.type, x.dtype, FUSED_GEMM)
    return fused.linear_act(x, weight, bias, activation)


@_linear_act.register_fake
def _(x, weight, bias, activation):
    return x.new_empty(len(x), len(weight)), x.new_empty(len(x), len(weight))


@spares_dynamo
@torch.library.custom_op(
    "lift_fast::linear_act_backward",
    mutates_args=(),
    schema="(Tensor g, Tensor weight, Tensor h, Tensor bias, str activation) -> (Tensor dh, Tensor a, Tensor d_bias)",
)
def _linear_act_backward(
    g: Tensor, weight: Tensor, h: Tensor, bias: Tensor, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    fused: Any = choose(h.device.type, h.dtype, FUSED_GEMM)
    return fused.linear_act_backward(g, weight, h, bias, activation)


@_linear_act_backward.register_fake
def _(g, weight, h, bias, activation):
    return torch.empty_like(h), torch.empty_like(h), torch.empty_like(bias)


@register_flop_formula([torch.ops.lift_fast.linear_act, torch.ops.lift_fast.linear_act_backward])
def _flops(x, weight, *args, **kwargs) -> int:
    return 2 * x[0] * weight[0] * weight[1]
