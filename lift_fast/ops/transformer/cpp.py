"""The "cpp" backend of layernorm and mlp: csrc/transformer/layernorm.cpp and csrc/transformer/mlp.cpp, on the CPU."""

import torch
from torch import Tensor

from ..rows.dequant import _why_no_cpp as why_not
from .contract import ACTIVATIONS, Activation

try:
    from ... import _C
except ImportError:  # a source tree that nobody built
    _C = None  # type: ignore[assignment]

__all__ = ["bias_act", "bias_act_backward", "layernorm", "layernorm_backward", "why_not"]

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # `Element` of csrc/pairs/pairs.h


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


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
    _C.layernorm_cpu(
        x=x.data_ptr(),
        residual=_address(residual),
        weight=weight.data_ptr(),
        bias=bias.data_ptr(),
        eps=eps,
        y=y.data_ptr(),
        stream=_address(stream),
        mean=mean.data_ptr(),
        rstd=rstd.data_ptr(),
        rows=x.shape[0],
        width=x.shape[1],
        type=TYPES[x.dtype],
        threads=torch.get_num_threads(),
    )


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
    d_weight, d_bias = torch.empty_like(weight), torch.empty_like(weight)
    _C.layernorm_backward_cpu(
        dy=dy.data_ptr(),
        stream=stream.data_ptr(),
        mean=mean.data_ptr(),
        rstd=rstd.data_ptr(),
        weight=weight.data_ptr(),
        bias=bias.data_ptr(),
        d_stream=_address(d_stream),
        dx=dx.data_ptr(),
        y=_address(y),
        d_weight=d_weight.data_ptr(),
        d_bias=d_bias.data_ptr(),
        rows=dy.shape[0],
        width=dy.shape[1],
        type=TYPES[dy.dtype],
        threads=torch.get_num_threads(),
    )
    return d_weight, d_bias


def bias_act(h: Tensor, bias: Tensor, activation: Activation, a: Tensor) -> None:
    _C.bias_act_cpu(
        h=h.data_ptr(),
        bias=bias.data_ptr(),
        a=a.data_ptr(),
        rows=h.shape[0],
        width=h.shape[1],
        activation=ACTIVATIONS.index(activation),
        type=TYPES[h.dtype],
        threads=torch.get_num_threads(),
    )


def bias_act_backward(
    da: Tensor, h: Tensor, bias: Tensor, activation: Activation, dh: Tensor, a: Tensor | None
) -> Tensor:
    d_bias = torch.empty_like(bias)
    _C.bias_act_backward_cpu(
        da=da.data_ptr(),
        h=h.data_ptr(),
        bias=bias.data_ptr(),
        dh=dh.data_ptr(),
        a=_address(a),
        d_bias=d_bias.data_ptr(),
        rows=h.shape[0],
        width=h.shape[1],
        activation=ACTIVATIONS.index(activation),
        type=TYPES[h.dtype],
        threads=torch.get_num_threads(),
    )
    return d_bias
