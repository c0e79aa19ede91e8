"""Others' ways from tars of JPEGs to batches of random crops, uint8 [batch, size, size, 3], each as its manual has it.

"DataLoader" is torch's with Pillow: a map-style dataset that reads its pictures by offset, decodes and crops them in
one worker a core, and sends batches through shared memory. Its draft variant lets libjpeg scale while it decodes.
"webdataset" streams the same tars through the library of that name and does the same with Pillow. "DALI's reader" is
NVIDIA's own for such tars, which decodes no more of a picture than its crop.

None of them ever comes to the end of an epoch, so none stops to begin one. Workers come from a fork server: a fork of
this process would take along locks that DALI's or OpenMP's threads hold.
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

PREFETCH = 2  # batches a worker makes ahead, the default of all three
ENDLESS = 1 << 40  # samples

Box = tuple[int, int, int, int]  # left, top, right, bottom


@dataclass(frozen=True)
class Crops:
    """What every rival does with a picture: a crop of `least` to all of its area, made size x size."""

    folder: Path
    batch: int
    size: int
    least: float
    workers: int  # or threads

    def tars(self) -> list[str]:
        return [str(path) for path in sorted(self.folder.glob("*.tar"))]


@dataclass(frozen=True)
class Feed:
    """A loader at work. held: batches it may have made or begun when nobody asks for more. at_once: that it finishes
    together, one a worker."""

    batches: Iterator[Any]
    held: int
    at_once: int = 1


def random_box(width: int, height: int, least: float) -> Box:
    """torchvision's RandomResizedCrop.get_params, which is not needed for more."""
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
    """uint8 [size, size, 3] by Pillow. draft: decoded at an 8th, a quarter or half where the crop allows it."""
    image = Image.open(io.BytesIO(data))
    width, height = image.size
    box: tuple[float, ...] = random_box(width, height, least)
    if draft:
        scale = size / min(box[2] - box[0], box[3] - box[1])
        image.draft("RGB", (math.ceil(width * scale), math.ceil(height * scale)))
        box = tuple(edge * image.size[axis % 2] / (width, height)[axis % 2] for axis, edge in enumerate(box))
    return torch.from_numpy(np.array(image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC, box=box)))


class TarPictures(Dataset):
    """The pictures of a folder of tars, by number."""

    def __init__(self, crops: Crops, draft: bool):
        self.crops, self.draft = crops, draft
        self.files: dict[str, int] = {}  # opened where they are read: in a worker
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
    context.set_forkserver_preload([__name__])  # else every worker imports torch
    return {"num_workers": crops.workers, "prefetch_factor": PREFETCH, "multiprocessing_context": context}


def data_loader(crops: Crops, draft: bool = False) -> Feed:
    pictures = TarPictures(crops, draft)
    sampler = RandomSampler(pictures, replacement=True, num_samples=ENDLESS)
    loader = DataLoader(pictures, crops.batch, sampler=sampler, drop_last=True, **_workers(crops))
    return Feed(iter(loader), (PREFETCH + 1) * crops.workers, crops.workers)


def _sample(parts: Sequence[bytes], size: int, least: float) -> tuple[Tensor]:
    return (crop(parts[0], size, least, draft=False),)


def webdataset(crops: Crops) -> Feed:
    """Raises ImportError where it is not installed."""
    from webdataset import WebDataset, WebLoader

    tars = crops.tars()
    stream = WebDataset(tars, resampled=True, shardshuffle=False).shuffle(1000).to_tuple("jpg")
    stream = stream.map(partial(_sample, size=crops.size, least=crops.least))
    stream = stream.batched(crops.batch, collation_fn=default_collate, partial=False)
    loader = WebLoader(stream, batch_size=None, **_workers(crops))
    return Feed((batch[0] for batch in loader), (PREFETCH + 1) * crops.workers, crops.workers)


def dali_reader(crops: Crops, device_id: int | None = None) -> Feed:
    """DALI's reader, decoder and resize; device_id: it decodes on that GPU. Raises ImportError without DALI."""
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

    made = pipeline(
        batch_size=crops.batch, num_threads=crops.workers, device_id=device_id, prefetch_queue_depth=PREFETCH
    )
    batches = DALIGenericIterator(made, ["pixels"])
    return Feed((batch[0]["pixels"] for batch in batches), PREFETCH + 2)
