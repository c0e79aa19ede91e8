"""Symmetric InfoNCE over cosine similarities (arXiv 2103.00020, figure 3): the loss LIFT and CLIP share.

z = logit_scale · normalise(image) @ normalise(text)ᵀ + logit_bias          [rows, rows]
loss = ½ · mean_i( lse_j z_ij − z_ii ) + ½ · mean_j( lse_i z_ij − z_jj )
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ..quantized import QuantizedRows
from .pairs import widened_pair


def reference(image: Tensor, text: Tensor, logit_scale: Tensor | float, logit_bias: Tensor | float = 0.0) -> Tensor:
    """The definition: dense, in the dtype of its inputs (float64 for tests).

    image, text: [rows, dim], need not be normalised; logit_scale: the scale itself, not its log.
    Returns a scalar.
    """
    logits = logit_scale * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T + logit_bias
    labels = torch.arange(len(image), device=image.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def contrastive(
    image: Tensor, text: Tensor | QuantizedRows, logit_scale: Tensor | float, logit_bias: Tensor | float = 0.0
) -> Tensor:
    """Symmetric InfoNCE of image and text features, both [rows, dim]; row i of one belongs to row i of the other.

    Text is a Tensor (its gradient is computed where asked for) or QuantizedRows from a cache, widened here.
    Logits and their sums are float32 (float64 for float64 inputs), also under autocast: bfloat16 logits at
    scale 100 are off by 0.2 to 0.4. Returns a scalar of that dtype.

    Raises ValueError when the shapes do not match.
    """
    with torch.autocast(image.device.type, enabled=False):
        return reference(*widened_pair(image, text), logit_scale, logit_bias)
