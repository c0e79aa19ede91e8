"""What the losses share: rows that belong to each other, checked and widened to what is computed in."""

from torch import Tensor, float32, float64

from ..quantized import QuantizedRows


def widened_pair(image: Tensor, text: Tensor | QuantizedRows) -> tuple[Tensor, Tensor]:
    """image and text, both [rows > 0, dim], as float32 (float64 where image is).

    Raises ValueError when the shapes do not match.
    """
    dtype = float64 if image.dtype == float64 else float32
    text = text.widen(dtype) if isinstance(text, QuantizedRows) else text.to(dtype)
    if image.shape != text.shape or image.dim() != 2 or not len(image):
        raise ValueError(f"image {tuple(image.shape)} and text {tuple(text.shape)} must both be [rows > 0, dim]")
    return image.to(dtype), text
