"""Decoded pixels -> the input of a model, on any device."""

import torch
from torch import Tensor

# ImageNet's mean and standard deviation, which LIFT's authors use (arXiv 2506.04209).
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def normalise(pixels: Tensor) -> Tensor:
    """uint8 [batch, H, W, 3] on any device -> float32 [batch, 3, H, W]: minus ImageNet's mean, divided by its std."""
    # Filled on the device: copying a tensor made from a list there would make the host wait.
    mean, std = (torch.cat([pixels.new_full((1,), 255 * v, dtype=torch.float32) for v in vs]) for vs in (MEAN, STD))
    return ((pixels - mean) / std).permute(0, 3, 1, 2)


def laid_out(pixels: Tensor, dtype: torch.dtype, layout: str) -> Tensor:
    """uint8 [batch, H, W, 3] -> a contiguous tensor in the layout ("NHWC", "NCHW") and dtype; floats are normalised."""
    planes = pixels.permute(0, 3, 1, 2) if dtype == torch.uint8 else normalise(pixels).to(dtype)
    return (planes if layout == "NCHW" else planes.permute(0, 2, 3, 1)).contiguous()
