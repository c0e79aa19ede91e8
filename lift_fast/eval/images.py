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
from ..errors import ConfigError, DataError, LiftFastError
from ..progress import bar
from ..ranks import Rank, of_first, together
from .kept import Kept, KeptImages, Piece
from .shares import cut, in_order, mine, rounds

_PIECE = 8192  # samples whose features are kept in a file
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
    """The images of a set, decoded in chunks, which are shared by the ranks.

    device: of the tower. loader: auto, host or dali, as in TrainConfig. batch_size: samples of a chunk; those of them
    that decode go through the tower at once.

    Raises ConfigError for a batch_size below 1.
    """

    def __init__(
        self,
        data: Samples,
        pixels: Pixels,
        device: torch.device,
        loader: str = "auto",
        rank: Rank | None = None,
        batch_size: int = 64,
    ):
        if batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size}; it must be at least 1 image")
        self.data, self.pixels, self.device, self.loader, self.rank = data, pixels, device, loader, rank or Rank()
        self.batch_size = batch_size
        self.chunks = cut(len(data), batch_size)
        self.none = Loaded(torch.zeros(1, pixels.size, pixels.size, 3, dtype=torch.uint8), [], {})
        self._kept: dict[int, Loaded] = {}

    @property
    def pieces(self) -> list[range]:
        """The sample numbers in pieces of whole chunks."""
        return cut(len(self.data), max(1, _PIECE // self.batch_size) * self.batch_size)

    @property
    def made_by(self) -> list[object]:
        """What decides the features of an image besides the model, as JSON values. Where only the batch size or the
        kind of device differs, features differ by rounding."""
        decoder = "dali" if dali.wanted(self.loader, self.device.type == "cuda") else "host"
        return [list(self.pixels), decoder, self.device.type, self.batch_size]

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
        where = "; name the folder of the images with --pictures" if set(causes) == {"missing"} else ""
        return DataError(f"{self.data.folder}: no image decodes ({in_words(causes)}){where}")

    def keep(self) -> None:
        """Decodes the share of this rank of all chunks and keeps its pixels in the memory of the host."""
        chunks = mine(self.chunks, self.rank)
        for chunk, loaded in zip(chunks, self.share(self.chunks), strict=True):
            self._kept[chunk.start] = loaded._replace(pixels=loaded.pixels.cpu())

    def share(self, chunks: Sequence[range]) -> Iterator[Loaded]:
        """This rank's share of these chunks, decoded; pixels of a chunk of which none decodes are one black image.

        Raises BackendError for loader dali when it is not installed, and where DALI fails.
        """
        own = mine(chunks, self.rank)
        if all(chunk.start in self._kept for chunk in own):
            yield from (self._kept[chunk.start] for chunk in own)
            return
        at_once = max(1, _BYTES // (self.batch_size * self.none.pixels.numel()))
        for start in range(0, len(own), at_once):
            yield from self._decoded(own[start : start + at_once])

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


def image_features(
    encode_image: Callable[[Tensor], Tensor],
    images: Images,
    kept: Kept | None = None,
    title: str | None = None,
) -> ImageFeatures:
    """The features of every image of a set. A collective of the images' ranks, each of which gets all.

    encode_image: normalised pixels [batch, 3, H, W] on the images' device -> features [batch, dim]. Every rank calls it
    equally often, since with FSDP2 each call is a collective. kept: on rank 0, features to be used again; those that
    are missing are added, a piece at a time. title: of a bar on stderr; None for no bar.

    Raises DataError when no image decodes; BackendError as Images.share; each also when it is raised on another rank.
    """
    pieces = images.pieces
    found: list[Piece | None] = []
    store: KeptImages | None = None

    def read() -> None:
        nonlocal store
        store = kept.images(images.data, images.made_by) if kept else None
        found.extend(store.read(piece) if store else None for piece in pieces)

    together(read, only_first=True)
    missing = of_first([piece is None for piece in found])
    done = sum(len(piece) for piece, absent in zip(pieces, missing, strict=True) if not absent)
    hidden = title is None or not images.rank.is_first or not any(missing)
    made: list[Piece] = []
    with bar(desc=title or "", total=len(images.data), initial=done, unit="image", disable=hidden) as shown:
        for number, piece in enumerate(pieces):
            if missing[number]:
                made.append(_encoded(encode_image, images, piece, shown.update))
                if store:
                    store.write(piece, made[-1])
            else:
                made.append(of_first(found[number] if found else None))  # type: ignore[arg-type]
    if len({piece.features.shape[1] for piece in made}) > 1:  # those that were kept are not of this model
        return image_features(encode_image, images, None, title)
    causes = sum((piece.causes for piece in made), Counter[str]())
    samples = [sample for piece in made for sample in piece.samples]

    def check() -> None:
        if not samples:
            raise images.none_decodes(causes)

    together(check, only_first=True)
    return ImageFeatures(torch.cat([piece.features for piece in made]), samples, causes)


@torch.no_grad()
def _encoded(
    encode_image: Callable[[Tensor], Tensor], images: Images, piece: range, update: Callable[[int], object]
) -> Piece:
    """The features of a piece, on every rank. update: is given the numbers of samples that are done."""
    size, world = images.batch_size, images.rank.world
    chunks = images.chunks[piece.start // size : -(-piece.stop // size)]

    def encode() -> list[Piece]:
        share, done, failed = images.share(chunks), [], None
        for number in range(rounds(len(chunks), images.rank)):
            loaded = None
            try:
                loaded = next(share, None)
            except (LiftFastError, OSError) as error:  # the other ranks wait for this one in the tower
                failed = error
            encoded = encode_image(images.normalised(loaded or images.none)).float().cpu()
            if loaded is not None:
                features = F.normalize(encoded[: len(loaded.samples)], dim=-1)
                done.append(Piece(features, loaded.samples, Counter(loaded.causes)))
            update(sum(map(len, chunks[number * world : (number + 1) * world])))
        if failed is not None:
            raise failed
        return done

    parts = in_order(together(encode))
    causes = sum((part.causes for part in parts), Counter[str]())
    samples = [sample for part in parts for sample in part.samples]
    return Piece(torch.cat([part.features for part in parts]), samples, causes)
