"""Layer normalisation (Ba et al., arXiv 1607.06450), with the addition of a residual before it.

    s = x + residual,   y = (s − mean(s)) · rstd(s) · weight + bias,   rstd = 1 / √(var(s) + eps)

Statistics are float32. The forward keeps s, mean and rstd. The backward reads s once and computes the gradients of s,
weight and bias in that pass; it can also write y again, so that the next layer need not keep its input.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..backends import spares_dynamo
from .contract import LayerNorm, LayerNormGrad, choose


def reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, residual: Tensor | None = None) -> Tensor:
    """The definition of y, in the dtype of its inputs (float64 for tests)."""
    s = x if residual is None else x + residual
    deviation = s - s.mean(dim=-1, keepdim=True)
    return deviation * (deviation.square().mean(dim=-1, keepdim=True) + eps).rsqrt() * weight + bias


def layernorm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """y; with a residual, (y, s) for s = x + residual rounded to x's dtype, which is what is normalised.

    x: [..., width] float32, bfloat16, float16 or float64; residual: the same shape and dtype, or None; weight, bias:
    [width]. y and s have x's shape and dtype and are contiguous. Autocast has no effect: statistics are float32 anyway.
    Raises ValueError for shapes or dtypes that do not match, BackendError for an unavailable backend.
    """
    check(x, residual, weight, bias)
    y, s = _LayerNorm.apply(x, residual, weight, bias, eps, backend)
    return y if residual is None else (y, s)


def check(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor) -> None:
    """Validates the arguments of `layernorm`. Raises ValueError."""
    width = x.shape[-1] if x.dim() else 0
    if not x.is_floating_point() or weight.shape != (width,) or bias.shape != (width,):
        shapes = f"x {tuple(x.shape)} {x.dtype}, weight {tuple(weight.shape)}, bias {tuple(bias.shape)}"
        raise ValueError(f"layernorm takes floating [..., width], [width] and [width], not {shapes}")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(f"residual {tuple(residual.shape)} {residual.dtype} must match x {tuple(x.shape)} {x.dtype}")


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of weights, biases, statistics and their sums for tokens of a dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float, backend: str | None
    ) -> tuple[Tensor, Tensor | None]:
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        r = None if residual is None else residual.reshape(rows.shape).contiguous()
        w, b = weight.to(wide(x.dtype)), bias.to(wide(x.dtype))
        y, s, mean, rstd = torch.ops.lift_fast.layernorm(rows, r, w, b, eps, backend)
        ctx.save_for_backward(rows if r is None else s, mean, rstd, w, b)
        ctx.backend, ctx.added = backend, residual is not None
        ctx.dtypes = weight.dtype, bias.dtype
        return y.view(x.shape), s.view(x.shape) if ctx.added else None

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, ds: Tensor | None) -> tuple:
        s, mean, rstd, weight, bias = ctx.saved_tensors
        d = dy.reshape(s.shape).clone(memory_format=torch.contiguous_format)
        more = None if ds is None else ds.reshape(s.shape).contiguous()
        d_weight, d_bias, _ = torch.ops.lift_fast.layernorm_backward(
            d, s, mean, rstd, weight, bias, more, False, ctx.backend
        )
        dx = d.view(dy.shape)
        return dx, dx if ctx.added else None, d_weight.to(ctx.dtypes[0]), d_bias.to(ctx.dtypes[1]), None, None


@spares_dynamo
@torch.library.custom_op(
    "lift_fast::layernorm",
    mutates_args=(),
    schema="(Tensor x, Tensor? residual, Tensor weight, Tensor bias, float eps, str? backend) "
    "-> (Tensor y, Tensor s, Tensor mean, Tensor rstd)",
)
def _forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float, backend: str | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, residual: [rows, width], contiguous. s is empty without a residual."""
    y, s, mean, rstd = _outputs(x, residual, weight)
    stream = None if residual is None else s
    call = LayerNorm(x, residual, weight, bias, eps, y, stream, mean, rstd)
    choose(x.device.type, x.dtype, backend).layernorm(call)
    return y, s, mean, rstd


@_forward.register_fake
def _(x, residual, weight, bias, eps, backend):
    return _outputs(x, residual, weight)


def _outputs(x: Tensor, residual: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    s = x.new_empty(0) if residual is None else torch.empty_like(x)
    return torch.empty_like(x), s, weight.new_empty(len(x)), weight.new_empty(len(x))


@spares_dynamo
@torch.library.custom_op(
    "lift_fast::layernorm_backward",
    mutates_args=("dy",),
    schema="(Tensor(a!) dy, Tensor s, Tensor mean, Tensor rstd, Tensor weight, Tensor bias, Tensor? d_s, bool again, "
    "str? backend) -> (Tensor d_weight, Tensor d_bias, Tensor y)",
)
def _backward(
    dy: Tensor,
    s: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    d_s: Tensor | None,
    again: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Overwrites dy with the gradient of s, d_s included. y is computed again if `again`, else empty."""
    y = torch.empty_like(s) if again else s.new_empty(0)
    call = LayerNormGrad(dy, s, mean, rstd, weight, bias, d_s, dy, y if again else None)
    d_weight, d_bias = choose(s.device.type, s.dtype, backend).layernorm_backward(call)
    return d_weight, d_bias, y


@_backward.register_fake
def _(dy, s, mean, rstd, weight, bias, d_s, again, backend):
    return torch.empty_like(weight), torch.empty_like(bias), torch.empty_like(s) if again else s.new_empty(0)
