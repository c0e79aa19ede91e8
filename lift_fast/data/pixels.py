"""Decoded pixels to what a model takes, on any device."""

import torch
from torch import Tensor

# ImageNet's, as LIFT's authors use them (arXiv 2506.04209).
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def normalise(pixels: Tensor) -> Tensor:
    """uint8 [batch, H, W, 3] on any device -> float32 [batch, 3, H, W], ImageNet mean and std taken out."""
    # Filled on the device: a tensor made of a list would be copied there, and the host would wait.
    mean, std = (torch.cat([pixels.new_full((1,), 255 * v, dtype=torch.float32) for v in vs]) for vs in (MEAN, STD))
    return ((pixels - mean) / std).permute(0, 3, 1, 2)


def laid_out(pixels: Tensor, dtype: torch.dtype, layout: str) -> Tensor:
    """uint8 [batch, H, W, 3] -> contiguous in the layout ("NHWC", "NCHW") and dtype; floats are normalised."""
    planes = pixels.permute(0, 3, 1, 2) if dtype == torch.uint8 else normalise(pixels).to(dtype)
    return (planes if layout == "NCHW" else planes.permute(0, 2, 3, 1)).contiguous()
