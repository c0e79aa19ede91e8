"""Other loaders from tars of JPEGs to batches of random crops, uint8 [batch, size, size, 3], set up as documented.

"DataLoader" is torch's with Pillow: a map-style dataset reads images by offset, one worker per core decodes and crops
them, and batches go through shared memory. In its draft variant libjpeg scales images while it decodes. "webdataset"
streams the same tars through the library of that name and also crops with Pillow. "DALI's reader" is NVIDIA's own for
such tars; it decodes only the part of an image that the crop needs.

The epochs of all of them are endless, so that none pauses between two. Workers are started by a fork server, because a
fork of this process would copy locks that are held by threads of DALI or OpenMP.
"""

import io
import math
import multiprocessing
import os
import random
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler, default_collate

PREFETCH = 2  # batches that a worker prefetches; the default of all three
ENDLESS = 1 << 40  # samples of an epoch

Box = tuple[int, int, int, int]  # left, top, right, bottom


@dataclass(frozen=True)
class Crops:
    """What every rival makes of an image: a crop of `least` to all of its area, resized to size x size."""

    folder: Path
    batch: int
    size: int
    least: float
    workers: int  # or threads

    def tars(self) -> list[str]:
        return [str(path) for path in sorted(self.folder.glob("*.tar"))]


@dataclass(frozen=True)
class Feed:
    """A running loader.

    held: batches that it may have made or begun while none is requested. at_once: batches that its workers finish
    together, one per worker.
    """

    batches: Iterator[Any]
    held: int
    at_once: int = 1


def random_box(width: int, height: int, least: float) -> Box:
    """The box of a random crop, as torchvision's RandomResizedCrop.get_params computes it; torchvision is not used."""
    for _ in range(10):
        area = width * height * random.uniform(least, 1)
        aspect = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = random.randint(0, width - w), random.randint(0, height - h)
            return left, top, left + w, top + h
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def crop(data: bytes, size: int, least: float, draft: bool) -> Tensor:
    """A random crop by Pillow, uint8 [size, size, 3].

    draft: the image is decoded at 1/8, 1/4 or 1/2 of its size if the crop is large enough for that.
    """
    image = Image.open(io.BytesIO(data))
    width, height = image.size
    box: tuple[float, ...] = random_box(width, height, least)
    if draft:
        scale = size / min(box[2] - box[0], box[3] - box[1])
        image.draft("RGB", (math.ceil(width * scale), math.ceil(height * scale)))
        box = tuple(edge * image.size[axis % 2] / (width, height)[axis % 2] for axis, edge in enumerate(box))
    return torch.from_numpy(np.array(image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC, box=box)))


class TarImages(Dataset):
    """Random crops of the images in a folder of tars, by number."""

    def __init__(self, crops: Crops, draft: bool):
        self.crops, self.draft = crops, draft
        self.files: dict[str, int] = {}  # each worker opens its own
        self.places: list[tuple[str, int, int]] = []
        for path in crops.tars():
            with tarfile.open(path) as tar:
                self.places += [(path, m.offset_data, m.size) for m in tar if m.name.endswith(".jpg")]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, i: int) -> Tensor:
        path, offset, size = self.places[i]
        if path not in self.files:
            self.files[path] = os.open(path, os.O_RDONLY)
        data = os.pread(self.files[path], size, offset)
        return crop(data, self.crops.size, self.crops.least, self.draft)


def _workers(crops: Crops) -> dict[str, Any]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # otherwise every worker would import torch
    return {"num_workers": crops.workers, "prefetch_factor": PREFETCH, "multiprocessing_context": context}


def data_loader(crops: Crops, draft: bool = False) -> Feed:
    """torch's DataLoader with Pillow."""
    images = TarImages(crops, draft)
    sampler = RandomSampler(images, replacement=True, num_samples=ENDLESS)
    loader = DataLoader(images, crops.batch, sampler=sampler, drop_last=True, **_workers(crops))
    return Feed(iter(loader), (PREFETCH + 1) * crops.workers, crops.workers)


def _sample(parts: Sequence[bytes], size: int, least: float) -> tuple[Tensor]:
    return (crop(parts[0], size, least, draft=False),)


def webdataset(crops: Crops) -> Feed:
    """webdataset with Pillow. Raises ImportError if it is not installed."""
    from webdataset import WebDataset, WebLoader

    tars = crops.tars()
    stream = WebDataset(tars, resampled=True, shardshuffle=False).shuffle(1000).to_tuple("jpg")
    stream = stream.map(partial(_sample, size=crops.size, least=crops.least))
    stream = stream.batched(crops.batch, collation_fn=default_collate, partial=False)
    loader = WebLoader(stream, batch_size=None, **_workers(crops))
    return Feed((batch[0] for batch in loader), (PREFETCH + 1) * crops.workers, crops.workers)


def dali_reader(crops: Crops, device_id: int | None = None) -> Feed:
    """DALI's reader, decoder and resize, on the CPU or on GPU device_id. Raises ImportError without DALI."""
    from nvidia.dali import fn, pipeline_def, types
    from nvidia.dali.plugin.pytorch import DALIGenericIterator
    from wds2idx import IndexCreator

    indices = []
    for path in crops.tars():
        indices.append(str(Path(path).with_suffix(".idx")))
        if not Path(indices[-1]).exists():
            with IndexCreator(path, indices[-1], verbose=False) as creator:
                creator.create_index()

    @pipeline_def
    def pipeline() -> Any:
        jpegs = fn.readers.webdataset(
            paths=crops.tars(), index_paths=indices, ext=["jpg"], random_shuffle=True, name="reader"
        )
        device = "cpu" if device_id is None else "mixed"
        images = fn.decoders.image_random_crop(
            jpegs, device=device, random_area=[crops.least, 1], random_aspect_ratio=[3 / 4, 4 / 3], num_attempts=10
        )
        return fn.resize(images, size=[crops.size, crops.size], interp_type=types.INTERP_CUBIC)

    built = pipeline(
        batch_size=crops.batch, num_threads=crops.workers, device_id=device_id, prefetch_queue_depth=PREFETCH
    )
    batches = DALIGenericIterator(built, ["pixels"])
    return Feed((batch[0]["pixels"] for batch in batches), PREFETCH + 2)
