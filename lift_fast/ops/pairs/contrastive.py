"""Symmetric InfoNCE (arXiv 2103.00020, figure 3): the loss LIFT and CLIP share.

z = logit_scale · image @ textᵀ + logit_bias                                 [rows, cols]
loss = ½ · mean_i( R_i − z_ii ) + ½ · mean_j( C_j − z_jj ),   R_i = lse_j z_ij,   C_j = lse_i z_ij

One pass over z, block by block, finds R, C, the loss and logit_scale's gradient; a second, only where features
need a gradient, multiplies g_ij = ½ (exp(z_ij − R_i) + exp(z_ij − C_j)) / rows − δ_ij / rows with the features.
Own pairs are kept out of the sums and come in at the end: log1p of the others and 1 − p = others / all stay exact
where p rounds to 1. R and C travel as (m, l), R = m + log l: for logits of 1e12, m + log l is m.
It starts from the scores that the first pass kept, as far as the budget goes, and recomputes the others. All of
it happens in the forward; the backward multiplies with the gradient of the loss.

With a group each rank does this for its own images and all texts; see `exchange`.
"""

import functools
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
    free_memory,
    gradient_of,
    kept_dtype,
    operands,
    row_scales,
    scalar,
    text_grad,
    times,
    without_autocast,
)
from .eager import with_own


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
    labels = torch.arange(len(image), device=image.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def contrastive(
    image: Tensor,
    text: Tensor | QuantizedRows,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
    *,
    normalize: bool = False,
    group: "dist.ProcessGroup | str | None" = None,
    local_loss: bool = False,
    gather_with_grad: bool = False,
    budget: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Symmetric InfoNCE of image and text features [rows, dim]; row i of one belongs to row i of the other.

    text: features, trained or not, or QuantizedRows from a cache, which are never widened as a whole.
    logit_scale (the scale itself, not its log), logit_bias: numbers, or tensors that hold one.
    normalize: the rows are divided by their norms here, in float32; otherwise they are taken as they are.
    Features may be float32, bfloat16, float16 or float64. The wider of their dtypes, or autocast's, is multiplied;
    products, logits and sums are float32 (float64 for float64): bfloat16 logits at scale 100 are off by 0.2 to 0.4.

    group: a process group (or its name), each rank with its own rows: images [rows, dim] and either the texts that
    belong to them or those of all ranks, [world · rows, dim], in which case none are exchanged. local_loss and
    gather_with_grad: as in open_clip, in value and gradients: the loss of this rank's rows and columns instead of
    all; gradients of the sum over the ranks' losses instead of this rank's. Every rank must scale its loss alike.

    budget: bytes that kept scores may take; 0: none, all are recomputed; None: the policy's choice.
    backend: "cpp" or "torch" on the CPU, "cuda", "triton" or "torch" on a GPU; None: the first that is here.

    Returns a scalar, float32 or float64. Differentiable once. NaN in any feature makes it NaN.
    Raises ValueError for shapes, dtypes and devices that do not fit, and BackendError for a missing backend.
    """
    name = exchange.named(group)
    image, t, q, dtype = checked(image, text, name is not None)
    scale = scalar(logit_scale, image, dtype)
    bias = None if logit_bias is None else scalar(logit_bias, image, dtype)
    grad = torch.is_grad_enabled()
    needs = grad and image.requires_grad, grad and t.requires_grad
    options = normalize, *needs, name, local_loss, gather_with_grad, budget, backend
    return torch.ops.lift_fast.contrastive(image, t, q, scale, bias, *options)[0]


@torch.library.custom_op(
    "lift_fast::contrastive",
    mutates_args=(),
    schema="(Tensor image, Tensor text, Tensor? text_scales, Tensor scale, Tensor? bias, bool normalize, "
    "bool need_image, bool need_text, str? group, bool local_loss, bool gather_with_grad, int? budget, "
    "str? backend) -> (Tensor loss, Tensor d_image, Tensor d_text, Tensor d_scale)",
)
def _contrastive(
    image: Tensor,
    text: Tensor,
    text_scales: Tensor | None,
    scale: Tensor,
    bias: Tensor | None,
    normalize: bool,
    need_image: bool,
    need_text: bool,
    group: str | None,
    local_loss: bool,
    gather_with_grad: bool,
    budget: int | None,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss, the gradients of the features that need one (else empty) and logit_scale's."""
    with without_autocast(image.device):
        x, t, wide = operands(image, text)
        a, q = row_scales(x, None, normalize, wide), row_scales(t, text_scales, normalize, wide)
        bias = scale.new_zeros(()) if bias is None else bias
        rows = len(x)
        settings = normalize, need_image, local_loss, gather_with_grad
        columns = exchange.columns(t, q, rows, need_text, group, settings)
        name, launch, table = choose(x, backend)
        keep, sizes = need_image or need_text, (rows, columns.count, x.shape[1], x.element_size())
        plan = policy.plan(*sizes, name, budget, keep, table, functools.partial(free_memory, x.device))

        # First pass.
        row, col = _start(rows, scale), _start(columns.width, scale)
        own = scale.new_full((rows,), torch.nan)
        kept = launch.room(plan.kept, columns.count, scale)
        for at, tt, qq, (seen,) in columns.visit(col):
            block = ScoreTile(x, launch.operand(tt, x.dtype), a, qq, scale, bias, columns.first - at)
            for start, stop in plan.chunks:
                products = kept[start:stop, at : at + len(tt)] if stop <= plan.kept else None
                launch.stats(block.rows(start, stop), row[:, start:stop], seen, own[start:stop], products)
        col = columns.merge(col)
        # A rank's gradient is that of the loss of all, of its own, or of the sum over the ranks.
        weight = 0.5 / rows if local_loss or gather_with_grad else 0.5 / (rows * columns.world)
        found = launch.own_pairs(row, columns.own(col), own, scale, bias, weight)
        loss, d_scale = found[0].mean(), found[1].mean()
        if not local_loss and columns.world > 1:
            loss, d_scale = columns.mean(torch.stack([loss, d_scale])).unbind()
            loss, d_scale = loss.clone(), d_scale.clone()
        none = gradient_of(image, False), gradient_of(text, False)
        if not keep:
            return loss, *none, d_scale

        # Second pass.
        g_row, g_col, g_both = found[2:5]
        row = found[5:7]
        col = found[7:] if columns.only_own else with_own(col, columns.everyone(torch.addcmul(bias, own, scale)))
        # Images learn from all softmaxes and so do texts; or images from their rows' only, texts from their columns'.
        sides = [(weight, weight, g_both, True, True)]
        if local_loss and not gather_with_grad and columns.world > 1:
            sides = [(weight, 0.0, g_row, True, False), (0.0, weight, g_col, False, True)]
        d_image = ImageGrad(x, a, columns.turns, wide) if need_image else None
        d_text = scale.new_zeros(columns.width, x.shape[1]) if need_text else None
        for at, tt, qq, (seen, *d_texts) in columns.visit(col, *([] if d_text is None else [d_text])):
            block = ScoreTile(x, launch.operand(tt, x.dtype), a, qq, scale, bias, columns.first - at)
            for start, stop in plan.chunks:
                products = kept[start:stop, at : at + len(tt)] if stop <= plan.kept else None
                d, e = d_image.chunk(start, stop) if d_image else None, d_texts[0] if d_texts else None
                for row_weight, col_weight, own_g, to_image, to_text in sides:
                    outs = d if to_image else None, e if to_text else None
                    if outs != (None, None):
                        part, mine = block.rows(start, stop), row[:, start:stop]
                        given = own_g[start:stop], 1.0, products
                        launch.grads(part, mine, seen, row_weight, col_weight, *given, *outs)
                if d_image and d is not None:
                    d_image.take(start, stop, d)
        return (
            loss,
            d_image.done().to(kept_dtype(image.dtype)) if d_image else none[0],
            none[1] if d_text is None else text_grad(columns.home(d_text), t, q).to(kept_dtype(text.dtype)),
            d_scale,
        )


def _start(n: int, like: Tensor) -> Tensor:
    """(m, l, w) of n rows or columns of which nothing was seen."""
    state = like.new_zeros(3, n)
    state[0].fill_(-torch.inf)
    return state


@_contrastive.register_fake
def _(image, text, text_scales, scale, bias, normalize, need_image, need_text, *options):
    d_image, d_text = gradient_of(image, need_image), gradient_of(text, need_text)
    return scale.new_empty(()), d_image, d_text, scale.new_empty(())


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.dtypes, ctx.needs, ctx.bias = (inputs[0].dtype, inputs[1].dtype), inputs[6:8], inputs[4] is not None
    ctx.save_for_backward(*output[1:])


def _backward(ctx: Any, g: Tensor, *unused: Tensor) -> tuple:
    image, text, scale = ctx.saved_tensors
    grads: list[Tensor | None] = [None] * 13
    for i, d in enumerate((image, text)):
        grads[i] = times(g, d).to(ctx.dtypes[i]) if ctx.needs[i] else None
    grads[3] = times(g, scale)
    grads[4] = torch.zeros_like(g) if ctx.bias else None  # a bias moves all logits of a softmax alike
    return tuple(grads)


_contrastive.register_autograd(_backward, setup_context=_setup)


@register_flop_formula(torch.ops.lift_fast.contrastive)
def _flops(image, text, text_scales, scale, bias, normalize, need_image, need_text, group, *options, **_) -> int:
    """Of the products that no method can do without: the scores, and each gradient that is asked for."""
    cols = image[0] * (exchange.resolve(group).size() if group else 1)
    return 2 * image[0] * cols * image[1] * (1 + need_image + need_text)
