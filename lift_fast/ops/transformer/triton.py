"""The "triton" backend of layernorm and mlp: kernels/layernorm.py and kernels/mlp.py."""

from typing import Any

import torch
from torch import Tensor

from .. import tuned
from ..backends import why_no_triton as why_not
from .contract import BiasAct, BiasActGrad, LayerNorm, LayerNormGrad

__all__ = ["bias_act", "bias_act_backward", "layernorm", "layernorm_backward", "setting", "why_not"]


def layernorm(call: LayerNorm) -> None:
    from ...kernels import layernorm as kernels

    if call.x.numel():
        with torch.cuda.device_of(call.x):
            kernels.layernorm(*call, kernels.RowTile(**setting("layernorm", call.x)))


def layernorm_backward(call: LayerNormGrad) -> tuple[Tensor, Tensor]:
    from ...kernels import layernorm as kernels

    if not call.dy.numel():
        return torch.zeros_like(call.weight), torch.zeros_like(call.bias)
    with torch.cuda.device_of(call.dy):
        tile = kernels.RowTile(**setting("layernorm_backward", call.dy))
        merged = kernels.MergeTile(**setting("merge", call.dy))
        d_weight, d_bias = kernels.layernorm_backward(*call, tile, merged)
        return d_weight, d_bias.clone()  # both are views of one tensor, which an operator's results may not be


def bias_act(call: BiasAct) -> None:
    from ...kernels import mlp as kernels

    if call.h.numel():
        with torch.cuda.device_of(call.h):
            kernels.bias_act(*call, kernels.Tile(**setting("bias_act", call.h)))


def bias_act_backward(call: BiasActGrad) -> Tensor:
    from ...kernels import mlp as kernels

    if not call.h.numel():
        return torch.zeros_like(call.bias)
    with torch.cuda.device_of(call.h):
        tile = kernels.Tile(**setting("bias_act_backward", call.h))
        merged = kernels.MergeTile(**setting("merge", call.h))
        return kernels.bias_act_backward(*call, tile, merged)


def setting(name: str, tokens: Tensor, **facts: int | str | bool) -> dict[str, Any]:
    """A setting of the table for the GPU of tokens [rows, width], by their width and element size and these facts."""
    facts |= {"width": tokens.shape[1], "itemsize": tokens.element_size()}
    return tuned.lookup("transformer", tuned.gpu("transformer", tokens.device), name, **facts)
