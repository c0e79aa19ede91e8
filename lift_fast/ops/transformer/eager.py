"""The "torch" backend of layernorm and mlp: plain torch, on any device, in any floating dtype."""

import torch
from torch import Tensor
from torch.nn import functional as F

from .contract import Activation, BiasAct, BiasActGrad, LayerNorm, LayerNormGrad

SQRT_2_OVER_PI, CUBE = 0.7978845608028654, 0.044715  # in the tanh form of GELU
INV_SQRT_2, INV_SQRT_2PI = 0.7071067811865476, 0.3989422804014327
QUICK = 1.702


def why_not() -> str | None:
    return None


def activate(z: Tensor, activation: Activation) -> Tensor:
    """GELU (Hendrycks and Gimpel, arXiv 1606.08415): z Φ(z), its tanh form, or z σ(1.702 z)."""
    if activation == "quick_gelu":
        return z * torch.sigmoid(QUICK * z)
    return F.gelu(z, approximate="tanh" if activation == "gelu_tanh" else "none")


def slope(z: Tensor, activation: Activation) -> Tensor:
    """The activation's derivative."""
    if activation == "quick_gelu":
        s = torch.sigmoid(QUICK * z)
        return s * (1 + QUICK * z * (1 - s))
    if activation == "gelu_tanh":
        t = torch.tanh(SQRT_2_OVER_PI * (z + CUBE * z**3))
        return 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * SQRT_2_OVER_PI * (1 + 3 * CUBE * z * z)
    return 0.5 * (1 + torch.erf(z * INV_SQRT_2)) + z * INV_SQRT_2PI * torch.exp(-0.5 * z * z)


def layernorm(call: LayerNorm) -> None:
    s, weight, mean, rstd = call.x, call.weight, call.mean, call.rstd
    if call.residual is not None and call.stream is not None:
        s = torch.add(s, call.residual, out=call.stream)
    if not len(s):
        return
    wide = s.to(mean.dtype)
    variance, m = torch.var_mean(wide, dim=1, correction=0)
    mean.copy_(m)
    torch.rsqrt(variance + call.eps, out=rstd)
    call.y.copy_((wide - mean[:, None]) * rstd[:, None] * weight + call.bias)


def layernorm_backward(call: LayerNormGrad) -> tuple[Tensor, Tensor]:
    dy, stream, mean, rstd, weight, bias, d_stream, dx, y = call
    normed = (stream.to(mean.dtype) - mean[:, None]) * rstd[:, None]
    g = dy.to(mean.dtype)
    d_weight, d_bias = (g * normed).sum(dim=0), g.sum(dim=0)
    g = g * weight
    d = rstd[:, None] * (g - g.mean(dim=1, keepdim=True) - normed * (g * normed).mean(dim=1, keepdim=True))
    dx.copy_(d if d_stream is None else d + d_stream)
    if y is not None:
        y.copy_(normed * weight + bias)
    return d_weight, d_bias


def bias_act(call: BiasAct) -> None:
    call.a.copy_(activate(call.h.to(call.bias.dtype) + call.bias, call.activation))


def bias_act_backward(call: BiasActGrad) -> Tensor:
    da, h, bias, activation, dh, a = call
    z = h.to(bias.dtype) + bias
    g = da.to(bias.dtype) * slope(z, activation)
    dh.copy_(g)
    if a is not None:
        a.copy_(activate(z, activation))
    return g.sum(dim=0)
