"""LIFT's loss without negatives: mean over the pairs of −cos(image, text) (arXiv 2506.04209, section 3)."""

import torch
from torch import Tensor
from torch.nn import functional as F

from .features import TINY, ScaledRows, factors, row_scales


def reference(image: Tensor, text: Tensor) -> Tensor:
    """The definition, in the dtype of its inputs. image, text: [rows, dim]. Returns a scalar."""
    return -(F.normalize(image, dim=-1) * F.normalize(text, dim=-1)).sum(dim=-1).mean()


def cosine(image: Tensor, text: Tensor | ScaledRows) -> Tensor:
    """The mean of −cos over matching rows of image and text [rows, dim]; text: features or QuantizedRows.

    Only matching rows are multiplied; integer codes are multiplied as they are, and their scales cancel.
    Computed in float32 (float64 for float64 inputs), also under autocast. Returns a scalar.
    Raises ValueError when the shapes do not match.
    """
    t, scales = factors(text, image.dtype)
    if image.shape != t.shape or image.dim() != 2 or not len(image):
        raise ValueError(f"image {tuple(image.shape)} and text {tuple(t.shape)} must both be [rows > 0, dim]")
    wide = torch.float64 if image.dtype == torch.float64 else torch.float32
    with torch.autocast(image.device.type, enabled=False):
        x = image.to(wide)
        if scales is None:
            t = t.to(wide)
            q: Tensor | None = t.norm(dim=1).clamp(min=TINY).reciprocal()
        else:
            q = row_scales(t, scales.to(wide), True, wide)
        cosines = (x * t).sum(dim=1) / x.norm(dim=1).clamp(min=TINY) * q
        return -cosines.mean()
