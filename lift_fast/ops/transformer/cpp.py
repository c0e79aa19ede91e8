"""The "cpp" backend of layernorm and mlp: csrc/transformer/layernorm.cpp and csrc/transformer/mlp.cpp, on the CPU."""

from typing import Any

import torch
from torch import Tensor

from ..backends import _C, DTYPES
from ..backends import why_no_cpp as why_not
from .contract import ACTIVATIONS, BiasAct, BiasActGrad, LayerNorm, LayerNormGrad, tensor_addresses

__all__ = ["bias_act", "bias_act_backward", "layernorm", "layernorm_backward", "why_not"]


def layernorm(call: LayerNorm) -> None:
    _C.layernorm_cpu(**tensor_addresses(call), eps=call.eps, **_sizes(call.x))


def layernorm_backward(call: LayerNormGrad) -> tuple[Tensor, Tensor]:
    d_weight, d_bias = torch.empty_like(call.weight), torch.empty_like(call.weight)
    sums: dict[str, Any] = {"d_weight": d_weight.data_ptr(), "d_bias": d_bias.data_ptr()}
    _C.layernorm_backward_cpu(**tensor_addresses(call), **sums, **_sizes(call.dy))
    return d_weight, d_bias


def bias_act(call: BiasAct) -> None:
    _C.bias_act_cpu(**tensor_addresses(call), activation=ACTIVATIONS.index(call.activation), **_sizes(call.h))


def bias_act_backward(call: BiasActGrad) -> Tensor:
    d_bias, activation = torch.empty_like(call.bias), ACTIVATIONS.index(call.activation)
    _C.bias_act_backward_cpu(
        **tensor_addresses(call), d_bias=d_bias.data_ptr(), activation=activation, **_sizes(call.h)
    )
    return d_bias


def _sizes(tokens: Tensor) -> dict[str, Any]:
    rows, width = tokens.shape
    return {"rows": rows, "width": width, "type": DTYPES[tokens.dtype], "threads": torch.get_num_threads()}
