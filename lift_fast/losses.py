"""The ops as modules, with the signatures people already use."""

from torch import Tensor, nn

from .ops.contrastive import contrastive
from .ops.cosine import cosine
from .quantized import QuantizedRows


class ClipLoss(nn.Module):
    """Symmetric InfoNCE; see `ops.contrastive`. `logit_scale` is the scale itself, not its log."""

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor | QuantizedRows,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float = 0.0,
    ) -> Tensor:
        return contrastive(image_features, text_features, logit_scale, logit_bias)


class CosineLoss(nn.Module):
    """−cos of the pairs, no negatives; see `ops.cosine`. Takes and ignores a scale, so that it drops in."""

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor | QuantizedRows,
        logit_scale: Tensor | float | None = None,
        logit_bias: Tensor | float | None = None,
    ) -> Tensor:
        return cosine(image_features, text_features)
