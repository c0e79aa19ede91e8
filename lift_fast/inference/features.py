"""The features of many images, of which some may be bad, and the opening of data sets for them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..data.links import Folder
from ..data.open import open_data
from ..data.options import DataOptions
from ..data.samples import BadSample, Samples
from ..data.scan import IMAGE_SUFFIXES, OTHER_IMAGES
from ..errors import DataError
from .model import Model
from .preprocessing import in_batches

_SUFFIXES = {*IMAGE_SUFFIXES, *OTHER_IMAGES}


def open_images(path: str | Path, images: str | Path | None = None, options: DataOptions | None = None) -> Samples:
    """Opens the images of a data set: open_data, but images need no captions, and bad samples are left out.

    Raises DataError and ConfigError as open_data does.
    """
    return open_data(path, images, replace(options or DataOptions(), skip_bad=True), images_only=True)


def how_read(images: str | Path | None = None, options: DataOptions | None = None) -> list[Any]:
    """What decides which images and keys open_images finds at a path, as JSON values."""
    return [None if images is None else str(Path(images).resolve()), (options or DataOptions()).recorded()]


def image_files(paths: Sequence[Path]) -> list[Path]:
    """The files among `paths`, and those with the suffix of an image in the folders among them and below, by name.

    A file need not exist. Raises DataError for a folder without image files, and for a link in it that leads out.
    """
    found: list[Path] = []
    for path in paths:
        if not path.is_dir():
            found.append(path)
            continue
        below = [file for file in path.rglob("*") if file.suffix[1:].lower() in _SUFFIXES and file.is_file()]
        below = [file for file in below if not any(part.startswith(".") for part in file.relative_to(path).parts)]
        folder = Folder(path)
        if outside := next(filter(folder.leads_out, below), None):
            raise DataError(f"{outside} is a link that leads out of {path}; name that file, or the folder of the files")
        if not below:
            raise DataError(f"{path} holds no image file; name the folder that holds the images")
        found += sorted(below)
    return found


class Encoded(NamedTuple):
    """A batch. features: float32 [n, dim] of unit length, on the model's device; numbers: of their images; bad: number
    -> what is wrong with an image that has no feature."""

    features: Tensor
    numbers: list[int]
    bad: dict[int, BadSample]


def encode_images(
    model: Model, image_bytes: Callable[[int], bytes], numbers: Sequence[int], batch_size: int = 64
) -> Iterator[Encoded]:
    """Yields the features of images, `batch_size` images at a time, in their order.

    image_bytes: number -> encoded image, by any thread; it may raise BadSample. numbers: of the images. A bad image
    ends nothing: its batch names it.
    """

    def rendered(number: int) -> np.ndarray | BadSample:
        try:
            return model.preprocess.rendered(image_bytes(number))
        except BadSample as error:
            return error.with_traceback(None)

    done = 0
    for images in in_batches(rendered, numbers, batch_size, model.device):
        made = dict(zip(numbers[done : done + len(images)], images, strict=True))
        done += len(images)
        bad = {number: image for number, image in made.items() if isinstance(image, BadSample)}
        good = {number: image for number, image in made.items() if not isinstance(image, BadSample)}
        if good:
            pixels = torch.from_numpy(np.stack(list(good.values()))).to(model.device)
            features = model.encode_image(model.preprocess.normalise(pixels), batch_size=len(good))
        else:
            features = model.encode_image([])
        yield Encoded(features, list(good), bad)
