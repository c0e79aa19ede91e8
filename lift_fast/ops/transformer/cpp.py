"""The "cpp" backend of layernorm and mlp: csrc/transformer/layernorm.cpp and csrc/transformer/mlp.cpp, on the CPU."""

import torch
from torch import Tensor

from ..backends import _C, DTYPES, address
from ..backends import why_no_cpp as why_not
from .contract import ACTIVATIONS, Activation

__all__ = ["bias_act", "bias_act_backward", "layernorm", "layernorm_backward", "why_not"]


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
        residual=address(residual),
        weight=weight.data_ptr(),
        bias=bias.data_ptr(),
        eps=eps,
        y=y.data_ptr(),
        stream=address(stream),
        mean=mean.data_ptr(),
        rstd=rstd.data_ptr(),
        rows=x.shape[0],
        width=x.shape[1],
        type=DTYPES[x.dtype],
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
        d_stream=address(d_stream),
        dx=dx.data_ptr(),
        y=address(y),
        d_weight=d_weight.data_ptr(),
        d_bias=d_bias.data_ptr(),
        rows=dy.shape[0],
        width=dy.shape[1],
        type=DTYPES[dy.dtype],
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
        type=DTYPES[h.dtype],
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
        a=address(a),
        d_bias=d_bias.data_ptr(),
        rows=h.shape[0],
        width=h.shape[1],
        activation=ACTIVATIONS.index(activation),
        type=DTYPES[h.dtype],
        threads=torch.get_num_threads(),
    )
    return d_bias
