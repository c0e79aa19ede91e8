"""LIFT's loss without negatives: mean over the pairs of −cos(image, text) (arXiv 2506.04209, section 3)."""

import torch
from torch import Tensor
from torch.nn import functional as F

from ..quantized import QuantizedRows
from .pairs import widened_pair


def reference(image: Tensor, text: Tensor) -> Tensor:
    """The definition, in the dtype of its inputs. image, text: [rows, dim]. Returns a scalar."""
    return -(F.normalize(image, dim=-1) * F.normalize(text, dim=-1)).sum(dim=-1).mean()


def cosine(image: Tensor, text: Tensor | QuantizedRows) -> Tensor:
    """−cos of matching rows, averaged; image and text [rows, dim], text a Tensor or QuantizedRows.

    Computed in float32 (float64 for float64 inputs), also under autocast. Returns a scalar.
    Raises ValueError when the shapes do not match.
    """
    with torch.autocast(image.device.type, enabled=False):
        return reference(*widened_pair(image, text))
