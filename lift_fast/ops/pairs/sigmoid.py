"""The sigmoid loss of SigLIP (arXiv 2303.15343): every pair is a yes-or-no question of its own.

z = logit_scale · image @ textᵀ + logit_bias                                 [rows, cols]
loss = Σ_ij softplus(−y_ij z_ij) / rows,   y = +1 for own pairs, −1 for others;   g_ij = −y_ij σ(−y_ij z_ij) / rows

No score depends on another, so one pass, block by block, finds the loss and all gradients, in the forward; the
backward multiplies with the gradient of the loss. With a group each rank does this for its own images and all
texts; see `exchange`.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from ..rows.quantized import QuantizedRows
from . import exchange, policy
from .contract import (
    ImageGrad,
    ScoreTile,
    checked,
    choose,
    gradient_of,
    kept_dtype,
    operands,
    row_scales,
    scalar,
    text_grad,
    times,
    without_autocast,
)


def reference(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
    *,
    normalize: bool = False,
) -> Tensor:
    """The definition: dense, in the dtype of its inputs (float64 for tests). Returns a scalar."""
    if normalize:
        image, text = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
    logits = logit_scale * image @ text.T + (0.0 if logit_bias is None else logit_bias)
    labels = 2 * torch.eye(len(image), dtype=image.dtype, device=image.device) - 1
    return -F.logsigmoid(labels * logits).sum() / len(image)


def sigmoid(
    image: Tensor,
    text: Tensor | QuantizedRows,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
    *,
    normalize: bool = False,
    group: "dist.ProcessGroup | str | None" = None,
    budget: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """The sigmoid loss of image and text features [rows, dim]; row i of one belongs to row i of the other.

    Arguments, dtypes and errors as for `contrastive`. With a group the loss is that of this rank's images against
    the texts of all ranks, over its own number of rows, and a trained text's gradient is that of the sum over the
    ranks' losses, as in open_clip. No score is used twice, so none is kept, whatever the budget.

    Returns a scalar, float32 or float64. Differentiable once. NaN in any feature makes it NaN.
    """
    name = exchange.named(group)
    image, t, q, dtype = checked(image, text, name is not None)
    scale = scalar(logit_scale, image, dtype)
    bias = None if logit_bias is None else scalar(logit_bias, image, dtype)
    grad = torch.is_grad_enabled()
    needs = grad and image.requires_grad, grad and t.requires_grad
    return torch.ops.lift_fast.sigmoid(image, t, q, scale, bias, normalize, *needs, name, backend)[0]


@torch.library.custom_op(
    "lift_fast::sigmoid",
    mutates_args=(),
    schema="(Tensor image, Tensor text, Tensor? text_scales, Tensor scale, Tensor? bias, bool normalize, "
    "bool need_image, bool need_text, str? group, str? backend) "
    "-> (Tensor loss, Tensor d_image, Tensor d_text, Tensor d_scale, Tensor d_bias)",
)
def _sigmoid(
    image: Tensor,
    text: Tensor,
    text_scales: Tensor | None,
    scale: Tensor,
    bias: Tensor | None,
    normalize: bool,
    need_image: bool,
    need_text: bool,
    group: str | None,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss, the gradients of the features that need one (else empty), logit_scale's and logit_bias's."""
    with without_autocast(image.device):
        x, t, wide = operands(image, text)
        a, q = row_scales(x, None, normalize, wide), row_scales(t, text_scales, normalize, wide)
        bias = scale.new_zeros(()) if bias is None else bias
        rows = len(x)
        columns = exchange.columns(t, q, rows, need_text, group, (normalize, need_image))
        name, launch, table = choose(x, backend)
        plan = policy.plan(rows, columns.width, x.shape[1], x.element_size(), name, None, False, table)

        sums = scale.new_zeros(3, rows)  # loss, d_scale, d_bias of each row
        d_image = ImageGrad(x, a, columns.turns, wide) if need_image else None
        d_text = scale.new_zeros(columns.width, x.shape[1]) if need_text else None
        for at, tt, qq, d_texts in columns.visit(*([] if d_text is None else [d_text])):
            block = ScoreTile(x, launch.operand(tt, x.dtype), a, qq, scale, bias, columns.first - at)
            for start, stop in plan.chunks:
                d, e = d_image.chunk(start, stop) if d_image else None, d_texts[0] if d_texts else None
                loss, d_scale, d_bias = sums[:, start:stop]
                launch.sigmoid(block.rows(start, stop), 1 / rows, loss, d_scale, d_bias, d, e)
                if d_image and d is not None:
                    d_image.take(start, stop, d)
        return (
            sums[0].mean(),
            d_image.done().to(kept_dtype(image.dtype)) if d_image else gradient_of(image, False),
            gradient_of(text, False)
            if d_text is None
            else text_grad(columns.home(d_text), t, q).to(kept_dtype(text.dtype)),
            sums[1].sum(),
            sums[2].sum(),
        )


@_sigmoid.register_fake
def _(image, text, text_scales, scale, bias, normalize, need_image, need_text, group, backend):
    d_image, d_text = gradient_of(image, need_image), gradient_of(text, need_text)
    return scale.new_empty(()), d_image, d_text, scale.new_empty(()), scale.new_empty(())


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.dtypes, ctx.needs, ctx.bias = (inputs[0].dtype, inputs[1].dtype), inputs[6:8], inputs[4] is not None
    ctx.save_for_backward(*output[1:])


def _backward(ctx: Any, g: Tensor, *unused: Tensor) -> tuple:
    image, text, scale, bias = ctx.saved_tensors
    grads: list[Tensor | None] = [None] * 10
    for i, d in enumerate((image, text)):
        grads[i] = times(g, d).to(ctx.dtypes[i]) if ctx.needs[i] else None
    grads[3] = times(g, scale)
    grads[4] = times(g, bias) if ctx.bias else None
    return tuple(grads)


_sigmoid.register_autograd(_backward, setup_context=_setup)


@register_flop_formula(torch.ops.lift_fast.sigmoid)
def _flops(image, text, text_scales, scale, bias, normalize, need_image, need_text, group, *options, **_) -> int:
    """Of the products that no method can do without: the scores, and each gradient that is asked for."""
    cols = image[0] * (exchange.resolve(group).size() if group else 1)
    return 2 * image[0] * cols * image[1] * (1 + need_image + need_text)
