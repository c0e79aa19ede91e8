"""Images of any kind -> the normalised pixels that a model takes."""

from __future__ import annotations

import io
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from .. import foreign
from ..data.images import decode, read_header
from ..data.pixels import MEAN, STD, normalise
from ..data.reading import MOST_BYTES, cpu_count
from ..data.samples import BadSample
from ..data.transforms import centre_of, render_centre, resize
from ..errors import ConfigError, DataError
from ..files import read_regular

if TYPE_CHECKING:
    from PIL.Image import Image

    ImageLike = str | os.PathLike[str] | bytes | Image | np.ndarray

T = TypeVar("T")
R = TypeVar("R")
_LARGEST = 100_000  # pixels of a side; also a bound of mean and std
_AHEAD = 2  # batches that are decoded while a GPU works on one
_TRIED = 4  # images of a batch whose decoding is timed
_QUICK = 3e-4  # seconds for which an image is decoded by one thread: most of it is Python's


@dataclass(frozen=True)
class Preprocessing:
    """What a model expects of its images: the shorter side resized (bicubic, antialiased) to `resize_size`, then the
    centred square of `image_size` pixels, divided by 255, minus `mean`, divided by `std`.

    A call takes one image, as a path, the bytes of an encoded image, a PIL image, or uint8 [H, W, 3], and returns
    float32 [3, image_size, image_size]. It can be the transform of another project's data set.

    Raises ConfigError for sizes and numbers that no images are prepared by; when called, DataError for an image that
    cannot be read or decoded.
    """

    image_size: int
    resize_size: int
    mean: tuple[float, float, float] = MEAN
    std: tuple[float, float, float] = STD

    def __post_init__(self) -> None:
        if not 1 <= self.image_size <= self.resize_size <= _LARGEST:
            raise ConfigError(
                f"resize_size must be at least image_size and at most {_LARGEST}, not {self.resize_size} for images of "
                f"{self.image_size}"
            )
        if not all(abs(m) <= _LARGEST for m in self.mean) or not all(1 / _LARGEST <= s <= _LARGEST for s in self.std):
            raise ConfigError(f"std must be above 0, and mean and std finite, not {self.mean} and {self.std}")

    @staticmethod
    def of_dict(values: Mapping[str, Any]) -> Preprocessing:
        """The Preprocessing of `as_dict`, from a file. Raises ConfigError for values that are not valid."""
        try:
            foreign.check(values, Preprocessing, "preprocessing")
        except ValueError as error:
            raise ConfigError(f"this model's description: {error}") from error
        numbers = {name: tuple(values[name]) for name in ("mean", "std") if name in values}
        return Preprocessing(**dict(values) | numbers)

    def __call__(self, image: ImageLike) -> Tensor:
        return self.normalise(torch.from_numpy(self.cropped(image))[None])[0]

    def cropped(self, image: ImageLike) -> np.ndarray:
        """The resized and cropped image, uint8 [image_size, image_size, 3]. Raises DataError."""
        if isinstance(image, str | os.PathLike):
            try:
                data = read_regular(Path(image), MOST_BYTES)
            except (OSError, ValueError) as error:  # ValueError: a null byte in the name
                raise DataError(
                    f"{image}: the image cannot be read ({getattr(error, 'strerror', None) or error})"
                ) from error
            return self._decoded(data, os.fspath(image))
        if isinstance(image, bytes):
            return self._decoded(image, "an image given as bytes")
        if isinstance(image, np.ndarray):
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
                raise DataError(f"an array must be a uint8 image [H, W, 3], not {image.dtype} {list(image.shape)}")
            return self._resized(image)
        if hasattr(image, "convert"):  # PIL's, without the import
            try:
                return self._resized(_on_white(image))
            except (OSError, ValueError, ArithmeticError) as error:  # cut short, closed, or without pixels
                raise DataError(f"a PIL image: the image cannot be read ({error})") from error
        raise DataError(
            f"an image must be a path, bytes, a PIL image or a uint8 array [H, W, 3], not {type(image).__name__}"
        )

    def rendered(self, data: bytes) -> np.ndarray:
        """The same of an encoded image. Raises BadSample for one that does not decode."""
        return render_centre(data, read_header(data), self.image_size, self.resize_size)

    def normalise(self, pixels: Tensor) -> Tensor:
        """uint8 [batch, H, W, 3] on any device -> float32 [batch, 3, H, W]."""
        return normalise(pixels, self.mean, self.std)

    def as_dict(self) -> dict[str, Any]:
        """All fields, as JSON values."""
        return asdict(self)

    def _decoded(self, data: bytes, name: str) -> np.ndarray:
        try:
            return self.rendered(data)
        except BadSample as error:
            raise DataError(f"{name}: the image does not decode ({error.cause}: {error.reason})") from error

    def _resized(self, pixels: np.ndarray) -> np.ndarray:
        size = self.image_size
        (left, top, width, height), resized, (up, across) = centre_of(
            pixels.shape[1], pixels.shape[0], size, self.resize_size
        )
        pixels = resize(pixels[top : top + height, left : left + width], *resized)
        return np.ascontiguousarray(pixels[up : up + size, across : across + size])


def _on_white(image: Any) -> np.ndarray:
    """A PIL image as uint8 [H, W, 3], upright; transparency on white, as for files.

    It is encoded as PNG and read back, so that all modes (palettes, 16 bits, transparency) become what they are in
    a file.
    """
    from PIL import ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode == "RGB":
        return np.array(image)
    # PNG has none of these.
    if image.mode in ("CMYK", "YCbCr", "LAB", "HSV", "F", "I", "RGBX"):
        image = image.convert("RGB")
    elif image.mode in ("PA", "La", "RGBa"):
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=0)
    return decode(file.getvalue(), read_header(file.getvalue()))


def in_batches(
    decode: Callable[[T], R], items: Sequence[T], batch_size: int, device: torch.device
) -> Iterator[list[R]]:
    """Decodes images and yields the results a batch at a time, in order.

    For a model on a GPU, on one thread for each processor, and while it works on a batch the next ones are decoded. On
    the CPU both would compete for the same cores, so a batch is decoded when it is needed; and where the images are so
    small that Python takes most of the time, by one thread, since several would wait for each other.

    An error of `decode` is raised with its batch.
    """
    with ThreadPoolExecutor(cpu_count(), thread_name_prefix="decode") as pool:
        try:
            if device.type == "cpu":
                for start in range(0, len(items), batch_size):
                    batch = items[start : start + batch_size]
                    made, rest, quickest = [], batch[_TRIED:], math.inf
                    for item in batch[:_TRIED]:
                        began = time.perf_counter()
                        made.append(decode(item))
                        quickest = min(quickest, time.perf_counter() - began)
                    yield [*made, *(map(decode, rest) if quickest < _QUICK else pool.map(decode, rest))]
                return
            waiting: deque[list[Future[R]]] = deque()
            for start in range(0, len(items), batch_size):
                waiting.append([pool.submit(decode, item) for item in items[start : start + batch_size]])
                if len(waiting) > _AHEAD:
                    yield [future.result() for future in waiting.popleft()]
            for futures in waiting:
                yield [future.result() for future in futures]
        finally:
            pool.shutdown(cancel_futures=True)
