"""The parts of a transformer block on a GPU: csrc/transformer/*.cu. See contract.py for what each does.

Sums over rows are cut into as many parts as keep this GPU's multiprocessors busy, and added in order: the same bits at
every run on one kind of GPU. Scratch memory is torch's, so that all of it can be captured in a CUDA graph.
"""

import torch
from torch import Tensor

from ..backends import _C, DTYPES, address, launch_on, why_no_cuda
from .contract import ACTIVATIONS, Activation


def why_not() -> str | None:
    return why_no_cuda()


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
    _C.layernorm_cuda(
        x=x.data_ptr(), residual=address(residual), weight=weight.data_ptr(), bias=bias.data_ptr(), eps=eps,
        y=y.data_ptr(), s=address(stream), mean=mean.data_ptr(), rstd=rstd.data_ptr(), **_shape(x), **launch_on(x),
    )  # fmt: skip


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
    shape = _shape(dy)
    parts = _C.layernorm_parts(**shape, multiprocessors=_multiprocessors(dy))
    width = shape["width"]
    d_weight, d_bias, scratch = _floats(width, dy), _floats(width, dy), _floats(parts * 2 * width, dy)
    _C.layernorm_backward_cuda(
        dy=dy.data_ptr(), s=stream.data_ptr(), mean=mean.data_ptr(), rstd=rstd.data_ptr(), weight=weight.data_ptr(),
        bias=bias.data_ptr(), d_s=address(d_stream), dx=dx.data_ptr(), y=address(y), d_weight=d_weight.data_ptr(),
        d_bias=d_bias.data_ptr(), scratch=scratch.data_ptr(), parts=parts, **shape, **launch_on(dy),
    )  # fmt: skip
    return d_weight, d_bias


def bias_act(h: Tensor, bias: Tensor, activation: Activation, a: Tensor) -> None:
    _C.bias_act_cuda(
        h=h.data_ptr(), bias=bias.data_ptr(), a=a.data_ptr(), activation=ACTIVATIONS.index(activation),
        multiprocessors=_multiprocessors(h), **_shape(h), **launch_on(h),
    )  # fmt: skip


def bias_act_backward(
    da: Tensor, h: Tensor, bias: Tensor, activation: Activation, dh: Tensor, a: Tensor | None
) -> Tensor:
    shape = _shape(h)
    parts = _C.bias_act_parts(**shape, multiprocessors=_multiprocessors(h))
    d_bias, scratch = _floats(shape["width"], h), _floats(parts * shape["width"], h)
    _C.bias_act_backward_cuda(
        da=da.data_ptr(), h=h.data_ptr(), bias=bias.data_ptr(), dh=dh.data_ptr(), a=address(a),
        d_bias=d_bias.data_ptr(), scratch=scratch.data_ptr(), parts=parts, activation=ACTIVATIONS.index(activation),
        **shape, **launch_on(h),
    )  # fmt: skip
    return d_bias


def _shape(tokens: Tensor) -> dict[str, int]:
    rows, width = tokens.shape
    return {"rows": rows, "width": width, "type": DTYPES[tokens.dtype]}


def _floats(count: int, like: Tensor) -> Tensor:
    return torch.empty(count, dtype=torch.float32, device=like.device)


def _multiprocessors(tensor: Tensor) -> int:
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count
