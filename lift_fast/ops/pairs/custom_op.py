"""What the two custom ops of the pair losses have in common: arguments, fake, autograd and the FLOP formula.

Their schemas begin with (image, text, text_scales, scale, bias, normalize, need_image, need_text, group) and return
(loss, d_image, d_text, d_scale) and, if the loss depends on the bias, d_bias. The forward computes the gradients too;
the backward only multiplies them by the gradient of the loss.
"""

import contextlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import exchange
from .features import ScaledRows, gradient_of, validated


def shared_arguments(
    image: Tensor,
    text: Tensor | ScaledRows,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None,
    normalize: bool,
    group: "dist.ProcessGroup | str | None",
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None, bool, bool, bool, str | None]:
    """The first nine arguments of both ops. Raises ValueError for arguments that do not match."""
    name = exchange.group_name(group)
    image, t, scales, dtype = validated(image, text, name is not None)
    scale = scalar(logit_scale, image, dtype)
    bias = None if logit_bias is None else scalar(logit_bias, image, dtype)
    grad = torch.is_grad_enabled()
    return image, t, scales, scale, bias, normalize, grad and image.requires_grad, grad and t.requires_grad, name


def scalar(value: Tensor | float, image: Tensor, dtype: torch.dtype) -> Tensor:
    """A scale or bias (0-d, [1] or a number) as a 0-d tensor on image's device, without a host sync."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"logit_scale and logit_bias must be numbers or hold one, not {tuple(value.shape)}")
        return value.reshape(()).to(image.device, dtype)
    return torch.full((), value, dtype=dtype, device=image.device)


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Disables autocast inside. Entering torch.autocast costs more than asking whether it is on."""
    kind = device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else contextlib.nullcontext()


def register(op: Any, packet: Any) -> None:
    """Registers the fake, the autograd and the FLOP formula of the custom op `packet`, torch.ops.lift_fast.NAME."""
    schema = packet.default._schema
    scalars = len(schema.returns) - 3  # d_scale and perhaps d_bias

    @op.register_fake
    def fake(image, text, text_scales, scale, bias, normalize, need_image, need_text, *options):
        d_image, d_text = gradient_of(image, need_image), gradient_of(text, need_text)
        return scale.new_empty(()), d_image, d_text, *(scale.new_empty(()) for _ in range(scalars))

    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.dtypes, ctx.needs, ctx.bias = (inputs[0].dtype, inputs[1].dtype), inputs[6:8], inputs[4] is not None
        ctx.save_for_backward(*output[1:])

    def backward(ctx: Any, g: Tensor, *unused: Tensor) -> tuple:
        d_image, d_text, d_scale, *d_bias = ctx.saved_tensors
        grads: list[Tensor | None] = [None] * len(schema.arguments)
        for i, d in enumerate((d_image, d_text)):
            grads[i] = times(g, d).to(ctx.dtypes[i]) if ctx.needs[i] else None
        grads[3] = times(g, d_scale)
        if ctx.bias:
            grads[4] = times(g, d_bias[0]) if d_bias else torch.zeros_like(g)
        return tuple(grads)

    op.register_autograd(backward, setup_context=setup_context)
    register_flop_formula(packet)(flops)


def times(g: Tensor, d: Tensor) -> Tensor:
    """g · d in the backward, which cannot be differentiated again: d is known as a number only."""
    return _Once.apply(g, d.detach().requires_grad_()) if torch.is_grad_enabled() else g * d


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, g, d):
        return g * d

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError("the losses over pairs can be differentiated once only")


def flops(image, text, text_scales, scale, bias, normalize, need_image, need_text, group, *options, **_) -> int:
    """FLOPs of the matrix products that no method avoids: the scores, and each feature gradient that is needed."""
    cols = image[0] * (exchange.resolve(group).size() if group else 1)
    return 2 * image[0] * cols * image[1] * (1 + need_image + need_text)
