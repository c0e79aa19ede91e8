"""The images of a held-out set on their way through the image tower, shared by the ranks."""

import base64
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from ..data import dali, host
from ..data.loading import Loaded
from ..data.pixels import MEAN, STD, normalise
from ..data.samples import Samples
from ..data.skipped import in_words
from ..devices import gpu_index
from ..errors import DataError
from ..ranks import Rank, every
from .shares import cut, in_order, mine, rounds

_CHUNK = 64  # samples; those of them that decode go through the tower at once
_BYTES = 1 << 28  # of pixels that are decoded at once
_WHITE = base64.b64decode("R0lGODdhAQABAIABAP///////ywAAAAAAQABAAACAkQBADs=")  # a GIF of 1 x 1


class Pixels(NamedTuple):
    """What a tower expects: the shorter side resized to `resize`, the centred square of `size` pixels, normalised by
    mean and std (data.pixels.normalise)."""

    size: int
    resize: int
    mean: Sequence[float] = MEAN
    std: Sequence[float] = STD

    @staticmethod
    def of_size(size: int) -> "Pixels":
        """What the models of lift-fast expect."""
        return Pixels(size, size)


class Images:
    """A rank's share of the images of a set, decoded. Each iteration yields Loaded for each of its chunks; pixels of a
    chunk without any are one black image.

    device: of the tower. loader: auto, host or dali, as in TrainConfig.

    Raises BackendError while iterating for loader dali when it is not installed.
    """

    def __init__(
        self, data: Samples, pixels: Pixels, device: torch.device, loader: str = "auto", rank: Rank | None = None
    ):
        self.data, self.pixels, self.device, self.loader, self.rank = data, pixels, device, loader, rank or Rank()
        self.chunks = cut(len(data), _CHUNK)
        self.none = Loaded(torch.zeros(1, pixels.size, pixels.size, 3, dtype=torch.uint8), [], {})
        self._kept: list[Loaded] | None = None

    def normalised(self, loaded: Loaded) -> Tensor:
        """The pixels of a chunk as the tower takes them: float32 [n, 3, size, size] on the device."""
        return normalise(loaded.pixels.to(self.device), self.pixels.mean, self.pixels.std)

    @property
    def bytes(self) -> int:
        """The size of the pixels of all ranks."""
        return len(self.data) * self.none.pixels.numel()

    def check(self) -> None:
        """Decodes samples, from the first chunk, until one decodes. Raises DataError when none does, BackendError."""
        causes = Counter[str]()
        for chunk in self.chunks:
            [loaded] = self._decoded([chunk])
            if loaded.samples:
                return
            causes.update(loaded.causes)
        raise self.none_decodes(causes)

    def none_decodes(self, causes: Counter[str]) -> DataError:
        """The error for a set of which no image decodes."""
        return DataError(f"{self.data.folder}: no image decodes ({in_words(causes)})")

    def keep(self) -> None:
        """Decodes the share and keeps its pixels in the memory of the host, for all iterations."""
        self._kept = [loaded._replace(pixels=loaded.pixels.cpu()) for loaded in self]

    def __iter__(self) -> Iterator[Loaded]:
        if self._kept is not None:
            yield from self._kept
            return
        chunks = mine(self.chunks, self.rank)
        at_once = max(1, _BYTES // (_CHUNK * self.none.pixels.numel()))
        for start in range(0, len(chunks), at_once):
            yield from self._decoded(chunks[start : start + at_once])

    def _decoded(self, chunks: Sequence[range]) -> Iterator[Loaded]:
        part = _Part(self.data, [sample for chunk in chunks for sample in chunk])
        size, resize = self.pixels.size, self.pixels.resize
        if dali.wanted(self.loader, self.device.type == "cuda"):
            pixels, positions, causes = dali.load_images(cast(Samples, part), size, gpu_index(self.device), resize)
        else:
            pixels, positions, causes = host.load_images(cast(Samples, part), size, resize)
        first = end = 0
        for chunk in chunks:
            end += len(chunk)
            last = bisect_left(positions, end)
            samples = [part.samples[i] for i in positions[first:last]]
            yield Loaded(pixels[first:last] if samples else self.none.pixels, samples, causes)
            first, causes = last, {}


class _Part:
    """Some samples of a set, and after them an image that decodes, since the loaders refuse a part without one."""

    def __init__(self, data: Samples, samples: Sequence[int]):
        self.data, self.samples, self.folder = data, samples, data.folder

    def __len__(self) -> int:
        return len(self.samples) + 1

    def image_bytes(self, i: int) -> bytes:
        return self.data.image_bytes(self.samples[i]) if i < len(self.samples) else _WHITE


class ImageFeatures(NamedTuple):
    """The images of a set that decode. features: float32 [n, dim] on the CPU, of unit length; samples: their n sample
    numbers, ascending; causes: how many others there are, by cause."""

    features: Tensor
    samples: list[int]
    causes: Counter[str]


@torch.no_grad()
def image_features(encode_image: Callable[[Tensor], Tensor], images: Images) -> ImageFeatures:
    """The features of every image of a set. A collective of the images' ranks, each of which gets all.

    encode_image: normalised pixels [batch, 3, H, W] on the images' device -> features [batch, dim]. Every rank calls it
    equally often, since with FSDP2 each call is a collective.

    Raises DataError when no image decodes; BackendError as Images.
    """
    features, samples, causes = [], [], Counter[str]()
    share = iter(images)
    for _ in range(rounds(len(images.chunks), images.rank)):
        loaded = next(share, images.none)
        encoded = encode_image(images.normalised(loaded))
        features.append(encoded.float().cpu()[: len(loaded.samples)])
        samples += loaded.samples
        causes.update(loaded.causes)
    shares = every((samples, causes))
    causes = sum((part for _, part in shares), Counter[str]())
    everyone = sorted(sample for part, _ in shares for sample in part)
    if not everyone:
        raise images.none_decodes(causes)
    return ImageFeatures(F.normalize(in_order(features), dim=-1), everyone, causes)
