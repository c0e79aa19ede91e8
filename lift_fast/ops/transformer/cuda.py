"""The "cuda" backend of layernorm and mlp: csrc/transformer/layernorm.cu and csrc/transformer/mlp.cu.

Sums over rows are divided into as many parts as keep this GPU's multiprocessors busy, and the parts are added in
order, so the bits are the same at every run on one kind of GPU. torch allocates the scratch memory, so a CUDA graph can
capture all of it.
"""

from typing import Any

import torch
from torch import Tensor

from ..backends import _C, DTYPES, launch_on, why_no_cuda
from .contract import ACTIVATIONS, BiasAct, BiasActGrad, LayerNorm, LayerNormGrad, tensor_addresses


def why_not() -> str | None:
    return why_no_cuda()


def layernorm(call: LayerNorm) -> None:
    _C.layernorm_cuda(**_addresses(call), eps=call.eps, **_shape(call.x), **launch_on(call.x))


def layernorm_backward(call: LayerNormGrad) -> tuple[Tensor, Tensor]:
    shape = _shape(call.dy)
    parts = _C.layernorm_parts(**shape, multiprocessors=_multiprocessors(call.dy))
    d_weight, d_bias, scratch = (_floats(n * shape["width"], call.dy) for n in (1, 1, 2 * parts))
    _C.layernorm_backward_cuda(
        **_addresses(call), d_weight=d_weight.data_ptr(), d_bias=d_bias.data_ptr(), scratch=scratch.data_ptr(),
        parts=parts, **shape, **launch_on(call.dy),
    )  # fmt: skip
    return d_weight, d_bias


def bias_act(call: BiasAct) -> None:
    _C.bias_act_cuda(
        **_addresses(call), activation=ACTIVATIONS.index(call.activation), multiprocessors=_multiprocessors(call.h),
        **_shape(call.h), **launch_on(call.h),
    )  # fmt: skip


def bias_act_backward(call: BiasActGrad) -> Tensor:
    shape = _shape(call.h)
    parts = _C.bias_act_parts(**shape, multiprocessors=_multiprocessors(call.h))
    d_bias, scratch = (_floats(n * shape["width"], call.h) for n in (1, parts))
    _C.bias_act_backward_cuda(
        **_addresses(call), d_bias=d_bias.data_ptr(), scratch=scratch.data_ptr(), parts=parts,
        activation=ACTIVATIONS.index(call.activation), **shape, **launch_on(call.h),
    )  # fmt: skip
    return d_bias


def _addresses(call: LayerNorm | LayerNormGrad | BiasAct | BiasActGrad) -> dict[str, Any]:
    """As tensor_addresses, with the residual stream as `s`: what these functions call `stream` is CUDA's."""
    return {name.replace("stream", "s"): pointer for name, pointer in tensor_addresses(call).items()}


def _shape(tokens: Tensor) -> dict[str, Any]:
    rows, width = tokens.shape
    return {"rows": rows, "width": width, "type": DTYPES[tokens.dtype]}


def _floats(count: int, like: Tensor) -> Tensor:
    return torch.empty(count, dtype=torch.float32, device=like.device)


def _multiprocessors(tensor: Tensor) -> int:
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count
