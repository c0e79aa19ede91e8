"""The sigmoid loss of SigLIP (arXiv 2303.15343): a binary classification of every pair, independent of the others.

z = logit_scale · image @ textᵀ + logit_bias                                 [rows, cols]
loss = Σ_ij softplus(−y_ij z_ij) / rows,   y = +1 for positives, −1 otherwise;   g_ij = −y_ij σ(−y_ij z_ij) / rows

No score depends on another, so one pass, tile by tile, computes the loss and all gradients, in the forward; the
backward multiplies with the gradient of the loss. With a group each rank does this for its own images and all
texts; see `exchange`.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from ..backends import spares_dynamo
from . import exchange, policy
from .contract import FeatureGradients, ScoreTile, SigmoidSums, choose
from .custom_op import register, shared_arguments, without_autocast
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
    labels = 2 * torch.eye(len(image), dtype=image.dtype, device=image.device) - 1
    return -F.logsigmoid(labels * logits).sum() / len(image)


def sigmoid(
    image: Tensor,
    text: Tensor | ScaledRows,
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
    arguments = shared_arguments(image, text, logit_scale, logit_bias, normalize, group)
    return torch.ops.lift_fast.sigmoid(*arguments, backend)[0]


@spares_dynamo
@torch.library.custom_op(
    "lift_fast::sigmoid",
    mutates_args=(),
    schema="(Tensor image, Tensor text, Tensor? text_scales, Tensor scale, Tensor? bias, bool normalize, "
    "bool need_image, bool need_text, str? group, str? backend) "
    "-> (Tensor loss, Tensor d_image, Tensor d_text, Tensor d_scale, Tensor d_bias)",
)
def _sigmoid(
    image: Tensor, text: Tensor, text_scales: Tensor | None, scale: Tensor, bias: Tensor | None, normalize: bool,
    need_image: bool, need_text: bool, group: str | None, backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The loss, the gradients of the features that need one (else empty), logit_scale's and logit_bias's."""
    with without_autocast(image.device):
        x, t, a, q, wide = operands(image, text, text_scales, normalize)
        bias = scale.new_zeros(()) if bias is None else bias
        rows = len(x)
        columns = exchange.columns(t, q, rows, need_text, group, (normalize, need_image))
        name, module, table = choose(x, backend)
        plan = policy.plan(rows, columns.width, x.shape[1], x.element_size(), name, None, False, table)

        sums = scale.new_zeros(3, rows)  # loss, d_scale, d_bias of each row
        d_image = ImageGradient(x, a, columns.turns, wide) if need_image else None
        d_text = scale.new_zeros(columns.width, x.shape[1]) if need_text else None
        for first, turn_t, turn_q, turn_d in columns.visit(*([] if d_text is None else [d_text])):
            scores = ScoreTile(x, module.operand(turn_t, x.dtype), a, turn_q, scale, bias, columns.first - first)
            text_out = turn_d[0] if turn_d else None
            for start, stop in plan.chunks:
                image_out = d_image.chunk(start, stop) if d_image else None
                out = FeatureGradients(image_out, text_out)
                module.sigmoid(scores.rows(start, stop), 1 / rows, SigmoidSums(*sums[:, start:stop]), out)
                if d_image and image_out is not None:
                    d_image.add(start, stop, image_out)
        return (
            sums[0].mean(),
            d_image.finish().to(kept_dtype(image.dtype)) if d_image else gradient_of(image, False),
            gradient_of(text, False)
            if d_text is None
            else text_gradient(columns.reduce_scatter(d_text), t, q, text.dtype),
            sums[1].sum(),
            sums[2].sum(),
        )


register(_sigmoid, torch.ops.lift_fast.sigmoid)
