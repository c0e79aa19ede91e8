"""Pictures to pixels on the host: decode, crop, resize. Normalisation happens on the device."""

import io
import math
import random

import numpy as np
import torch
from PIL import Image
from torch import Tensor

# ImageNet's, as LIFT's authors use them (arXiv 2506.04209).
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


class UndecodablePicture(Exception):
    """The bytes are no picture; the pipeline skips and counts it."""


def decode(data: bytes) -> Image.Image:
    """Encoded bytes -> an RGB picture. Raises UndecodablePicture."""
    try:
        return Image.open(io.BytesIO(data)).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UndecodablePicture(str(error)) from error


def random_crop(picture: Image.Image, size: int, rng: random.Random, min_area: float) -> np.ndarray:
    """uint8 [size, size, 3]: a crop of min_area to all of the picture, aspect 3/4 to 4/3, resized (bicubic)."""
    width, height = picture.size
    for _ in range(10):
        area = width * height * rng.uniform(min_area, 1)
        aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.randint(0, width - w), rng.randint(0, height - h)
            box = (left, top, left + w, top + h)
            return np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC, box=box))
    return centre_crop(picture, size)


def centre_crop(picture: Image.Image, size: int) -> np.ndarray:
    """uint8 [size, size, 3]: the centred square of the picture, resized (bicubic); the evaluation transform."""
    width, height = picture.size
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    box = (left, top, left + side, top + side)
    return np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC, box=box))


def normalise(pixels: Tensor) -> Tensor:
    """uint8 [batch, H, W, 3] on any device -> float32 [batch, 3, H, W], ImageNet mean and std taken out."""
    # Filled on the device: a tensor made of a list would be copied there, and the host would wait.
    mean, std = (torch.cat([pixels.new_full((1,), 255 * v, dtype=torch.float32) for v in vs]) for vs in (MEAN, STD))
    return ((pixels - mean) / std).permute(0, 3, 1, 2)
