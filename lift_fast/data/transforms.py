"""Encoded image -> pixels of the model's size, on the host: crop, resize, mirror, adjust colours."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from .images import Box, Header, decode, decode_box, memory_for, scale_of
from .loading import DRAWS, Loading

_TRIES = 10
assert DRAWS == 2 * _TRIES + 2 + 1 + 3  # area and aspect of each try; the position; the mirror; three colours
_MAX_ASPECT = 16
# The matrix of DALI's color_twist; its first row is the luma.
_RGB_TO_YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.321], [0.211, -0.523, 0.311]])
_YIQ_TO_RGB = np.linalg.inv(_RGB_TO_YIQ)


@dataclass(frozen=True)
class View:
    """One random view of an image. box: the crop, in pixels of the upright image; flip: whether it is mirrored; colour:
    factors of brightness, contrast and saturation, or None."""

    box: Box
    flip: bool
    colour: tuple[float, float, float] | None


def view_of(width: int, height: int, draws: np.ndarray, loading: Loading) -> View:
    """The random view of an image of width x height that `draws` choose: float64 [DRAWS], in [0, 1).

    The crop is torchvision's RandomResizedCrop: an area from min_crop_area to all of the image, an aspect of 3/4 to
    4/3 (log-uniform), at any position; the centred square when ten tries do not fit. Where a JPEG would be decoded at
    a reduced size, the box is aligned to the pixels of the reduced image.
    """
    u = draws.tolist()
    least, whole = loading.min_crop_area, width * height
    across, down, mirror, *levels = u[2 * _TRIES :]
    side = min(width, height)
    box = ((width - side) // 2, (height - side) // 2, side, side)
    for area, aspect in zip(u[0 : 2 * _TRIES : 2], u[1 : 2 * _TRIES : 2], strict=True):
        area = whole * (least + (1 - least) * area)
        ratio = math.exp((2 * aspect - 1) * math.log(4 / 3))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            box = (int(across * (width - w + 1)), int(down * (height - h + 1)), w, h)
            break
    factor = scale_of(box, loading.image_size)
    left, top, w, h = (edge - edge % factor for edge in box)
    colour = None
    if loading.colour:
        brightness, contrast, saturation = (1 + loading.colour * (2 * level - 1) for level in levels)
        colour = (brightness, contrast, saturation)
    return View((left, top, w, h), mirror < loading.flip, colour)


def resize(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 [h, w, 3] -> uint8 [height, width, 3], bicubic and antialiased; the same array when it has that size."""
    if pixels.shape[:2] == (height, width):
        return pixels
    # Without this torch makes the copy itself and starts a team of threads for it.
    planes = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None]
    resized = F.interpolate(planes, (height, width), mode="bicubic", antialias=True)
    return resized[0].permute(1, 2, 0).numpy()


def render(data: bytes, header: Header, view: View, size: int) -> np.ndarray:
    """Decodes a view of an image for training: uint8 [size, size, 3]. Raises BadSample."""
    with memory_for(header, view.box, size):
        decoded, (left, top, width, height) = decode_box(data, header, view.box, size)
        pixels = resize(decoded[top : top + height, left : left + width], size, size)
        del decoded
    if view.flip:
        pixels = pixels[:, ::-1]
    if view.colour:
        pixels = recoloured(pixels, *view.colour)
    return np.ascontiguousarray(pixels)


def render_centre(data: bytes, header: Header, size: int, resize_size: int | None = None) -> np.ndarray:
    """Decodes an image for evaluation, uint8 [size, size, 3]: its shorter side resized to `resize_size` (default:
    `size`), then the centred square, as torchvision's Resize and CenterCrop. An image longer than 16:1 is cropped to
    16:1 first.

    Raises BadSample.
    """
    (left, top, width, height), resized, (up, across) = centre_of(header.width, header.height, size, resize_size)
    with memory_for(header):
        pixels = resize(decode(data, header)[top : top + height, left : left + width], *resized)
    return np.ascontiguousarray(pixels[up : up + size, across : across + size])


def centre_of(
    width: int, height: int, size: int, resize_size: int | None = None
) -> tuple[Box, tuple[int, int], tuple[int, int]]:
    """The geometry of render_centre: the box of the image that is resized, its (height, width) after the resize, and
    the corner (top, left) of the centred size x size square in that."""
    short = min(width, height)
    shorter = resize_size or size
    # Without the crop an image of 60000 x 1 pixels would be enlarged to gigabytes.
    left, top = (max(0, extent - _MAX_ASPECT * short) // 2 for extent in (width, height))
    box = (left, top, width - 2 * left, height - 2 * top)
    resized = int(shorter * box[3] / short), int(shorter * box[2] / short)
    return box, resized, (round((resized[0] - size) / 2), round((resized[1] - size) / 2))


def recoloured(pixels: np.ndarray, brightness: float, contrast: float, saturation: float) -> np.ndarray:
    """Scales chroma by `saturation`, then contrast about 128, then brightness: one affine map of RGB, as in DALI's
    color_twist. pixels: uint8 [h, w, 3]; the result, too, rounded and clipped."""
    matrix = brightness * contrast * _YIQ_TO_RGB @ np.diag([1, saturation, saturation]) @ _RGB_TO_YIQ
    offset = 128 * (1 - contrast) * brightness
    # One plane after another: numpy's matrix product would start BLAS's threads.
    planes = np.ascontiguousarray(pixels.transpose(2, 0, 1)).astype(np.float32)
    out = np.empty(pixels.shape, dtype=np.uint8)
    for channel, (red, green, blue) in enumerate(matrix.tolist()):
        level = planes[0] * red
        level += planes[1] * green
        level += planes[2] * blue
        level += offset
        out[..., channel] = np.clip(np.rint(level, out=level), 0, 255, out=level)
    return out
