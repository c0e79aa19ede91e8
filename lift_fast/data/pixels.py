"""Decoded pixels -> the input of a model, on any device."""

from collections.abc import Sequence

import torch
from torch import Tensor

# ImageNet's mean and standard deviation, which LIFT's authors use (arXiv 2506.04209).
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def normalise(pixels: Tensor, mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> Tensor:
    """uint8 [batch, H, W, 3] on any device -> float32 [batch, 3, H, W]: divided by 255, minus mean, divided by std."""

    def filled(values: Sequence[float]) -> Tensor:
        # On the device: copying a tensor made from a list there would make the host wait.
        return torch.cat([pixels.new_full((1,), 255 * value, dtype=torch.float32) for value in values])

    # Converted first: on a CPU the difference of uint8 and float is several times slower.
    return pixels.float().sub_(filled(mean)).div_(filled(std)).permute(0, 3, 1, 2)


def laid_out(pixels: Tensor, dtype: torch.dtype, layout: str) -> Tensor:
    """uint8 [batch, H, W, 3] -> a contiguous tensor in the layout ("NHWC", "NCHW") and dtype; floats are normalised."""
    planes = pixels.permute(0, 3, 1, 2) if dtype == torch.uint8 else normalise(pixels).to(dtype)
    return (planes if layout == "NCHW" else planes.permute(0, 2, 3, 1)).contiguous()
