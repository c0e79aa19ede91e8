"""Symmetric InfoNCE (arXiv 2103.00020, figure 3): the loss LIFT and CLIP share.

z = logit_scale · image @ textᵀ + logit_bias                                 [rows, cols]
loss = ½ · mean_i( R_i − z_ii ) + ½ · mean_j( C_j − z_jj ),   R_i = lse_j z_ij,   C_j = lse_i z_ij

The first pass over z, tile by tile, computes R, C, the loss and logit_scale's gradient. The second, made only if
features need a gradient, multiplies g_ij = ½ (exp(z_ij − R_i) + exp(z_ij − C_j)) / rows − δ_ij / rows with the
features; it reads the scores that the first pass kept, as far as the budget goes, and recomputes the rest. Both are
part of the forward; the backward multiplies with the gradient of the loss.

Positives are left out of the sums and added at the end: the loss as log1p of the negatives' sum, and 1 − p as the
negatives' share, are then exact where p rounds to 1. R and C are stored as (m, l), R = m + log l, since for logits of
1e12 m + log l is m.

With a group each rank does this for its own images and all texts; see `exchange`.
"""

import functools

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from ..backends import spares_dynamo
from . import exchange, policy
from .contract import FeatureGradients, ScoreTile, SoftmaxGradient, choose, free_memory
from .custom_op import register, shared_arguments, without_autocast
from .eager import with_positives
from .features import ImageGradient, ScaledRows, gradient_of, kept_dtype, operands, text_gradient


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
    text: Tensor | ScaledRows,
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
    backend: "cpp" or "torch" on the CPU, "cuda", "triton" or "torch" on a GPU; None: the first that is available.

    Returns a scalar, float32 or float64. Differentiable once. NaN in any feature makes it NaN.
    Raises ValueError for shapes, dtypes and devices that do not match, and BackendError for a missing backend.
    """
    arguments = shared_arguments(image, text, logit_scale, logit_bias, normalize, group)
    return torch.ops.lift_fast.contrastive(*arguments, local_loss, gather_with_grad, budget, backend)[0]


@spares_dynamo
@torch.library.custom_op(
    "lift_fast::contrastive",
    mutates_args=(),
    schema="(Tensor image, Tensor text, Tensor? text_scales, Tensor scale, Tensor? bias, bool normalize, "
    "bool need_image, bool need_text, str? group, bool local_loss, bool gather_with_grad, int? budget, "
    "str? backend) -> (Tensor loss, Tensor d_image, Tensor d_text, Tensor d_scale)",
)
def _contrastive(
    image: Tensor, text: Tensor, text_scales: Tensor | None, scale: Tensor, bias: Tensor | None, normalize: bool,
    need_image: bool, need_text: bool, group: str | None, local_loss: bool, gather_with_grad: bool, budget: int | None,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The loss, the gradients of the features that need one (else empty) and logit_scale's."""
    with without_autocast(image.device):
        x, t, a, q, wide = operands(image, text, text_scales, normalize)
        bias = scale.new_zeros(()) if bias is None else bias
        rows = len(x)
        settings = normalize, need_image, local_loss, gather_with_grad
        columns = exchange.columns(t, q, rows, need_text, group, settings)
        name, module, table = choose(x, backend)
        keep, sizes = need_image or need_text, (rows, columns.count, x.shape[1], x.element_size())
        plan = policy.plan(*sizes, name, budget, keep, table, functools.partial(free_memory, x.device))

        # First pass.
        row, col = _empty_statistics(rows, scale), _empty_statistics(columns.width, scale)
        positive = scale.new_full((rows,), torch.nan)
        kept = module.allocate(plan.kept, columns.count, scale)
        for first, turn_t, turn_q, (turn_col,) in columns.visit(col):
            scores = ScoreTile(x, module.operand(turn_t, x.dtype), a, turn_q, scale, bias, columns.first - first)
            for start, stop in plan.chunks:
                products = kept[start:stop, first : first + len(turn_t)] if stop <= plan.kept else None
                module.stats(scores.rows(start, stop), row[:, start:stop], turn_col, positive[start:stop], products)
        col = columns.merge(col)
        # The gradient is that of the loss over all ranks, of this rank's loss, or of the sum of the ranks' losses.
        weight = 0.5 / rows if local_loss or gather_with_grad else 0.5 / (rows * columns.world)
        combined = module.positives(row, columns.local(col), positive, scale, bias, weight)
        loss, d_scale = combined[0].mean(), combined[1].mean()
        if not local_loss and columns.world > 1:
            loss, d_scale = columns.mean(torch.stack([loss, d_scale])).unbind()
            loss, d_scale = loss.clone(), d_scale.clone()
        none = gradient_of(image, False), gradient_of(text, False)
        if not keep:
            return loss, *none, d_scale

        # Second pass.
        g_row, g_col, g_both = combined[2:5]
        row = combined[5:7]
        if columns.local_only:
            col = combined[7:]
        else:
            col = with_positives(col, columns.all_gather(torch.addcmul(bias, positive, scale)))
        # Both gradients come from all softmaxes, or the images' from the rows' only and the texts' from the columns'.
        sides = [(weight, weight, g_both, True, True)]
        if local_loss and not gather_with_grad and columns.world > 1:
            sides = [(weight, 0.0, g_row, True, False), (0.0, weight, g_col, False, True)]
        d_image = ImageGradient(x, a, columns.turns, wide) if need_image else None
        d_text = scale.new_zeros(columns.width, x.shape[1]) if need_text else None
        for first, turn_t, turn_q, (turn_col, *turn_d) in columns.visit(col, *([] if d_text is None else [d_text])):
            scores = ScoreTile(x, module.operand(turn_t, x.dtype), a, turn_q, scale, bias, columns.first - first)
            text_out = turn_d[0] if turn_d else None
            for start, stop in plan.chunks:
                products = kept[start:stop, first : first + len(turn_t)] if stop <= plan.kept else None
                image_out = d_image.chunk(start, stop) if d_image else None
                for row_weight, col_weight, g_positive, to_image, to_text in sides:
                    out = FeatureGradients(image_out if to_image else None, text_out if to_text else None)
                    if out.image is not None or out.text is not None:
                        statistics = row[:, start:stop], turn_col, row_weight, col_weight
                        g = SoftmaxGradient(*statistics, g_positive[start:stop])
                        module.grads(scores.rows(start, stop), g, 1.0, products, out)
                if d_image and image_out is not None:
                    d_image.add(start, stop, image_out)
        return (
            loss,
            d_image.finish().to(kept_dtype(image.dtype)) if d_image else none[0],
            none[1] if d_text is None else text_gradient(columns.reduce_scatter(d_text), t, q, text.dtype),
            d_scale,
        )


def _empty_statistics(n: int, like: Tensor) -> Tensor:
    """(m, l, w) [3, n] of rows or columns before the first tile."""
    state = like.new_zeros(3, n)
    state[0].fill_(-torch.inf)
    return state


register(_contrastive, torch.ops.lift_fast.contrastive)
