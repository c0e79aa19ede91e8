"""Retrieval of 40 000 images and 200 000 captions (--quick: 8 000 and 40 000), of dim 512 in float32: the time of
eval.retrieval a score, against torch.mm of the same tiles alone, and its memory.

Every 16th product of a run is computed three times more, one after the other, into memory of its own: the time of
these is torch.mm's, and is taken off the run's. So both are measured on the same machine at the same time.

Features are generated: of a model that finds some right answers, of random ones, and of a model that has collapsed to
one point, whose scores float32 cannot tell apart.
"""

import time
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional as F

from lift_fast.eval.retrieval import ranks, retrieval

from .bench_conditioning import Memory
from .harness import Suite

IMAGES, QUICK_IMAGES, CAPTIONS = 40_000, 8_000, 5  # captions of each image
DIM = 512
NOISE = 0.3  # of a caption's features, each of which is its image's and this times a normal number
EVERY, AGAIN = 16, 3
MODELS = ("trained", "random", "collapsed")
MOST_TIME, MOST_MEMORY = 1.3, 2048  # of torch.mm's; MiB


class Products:
    """Stands for torch.mm: computes every EVERY-th product AGAIN times more. seconds: of these; scores: theirs."""

    def __init__(self) -> None:
        self.mm, self.calls, self.seconds, self.scores = torch.mm, 0, 0.0, 0

    def __call__(self, x: Tensor, y: Tensor, *, out: Tensor) -> Tensor:
        self.mm(x, y, out=out)
        if self.calls % EVERY == 0:
            again = torch.empty_like(out)
            began = time.perf_counter()
            for _ in range(AGAIN):
                self.mm(x, y, out=again)
            self.seconds += time.perf_counter() - began
            self.scores += AGAIN * out.numel()
        self.calls += 1
        return out


def features(model: str, images: int, image_of: Tensor) -> tuple[Tensor, Tensor]:
    """Of unit length: images [images, DIM], and a text for each caption."""
    generator = torch.Generator().manual_seed(0)
    image, text = (torch.randn(n, DIM, generator=generator) for n in (images, len(image_of)))
    F.normalize(image, dim=1, out=image)
    if model == "trained":
        text.mul_(NOISE).add_(image[image_of])
    elif model == "collapsed":
        image[:] = text[:] = image[0].clone()
    return image, F.normalize(text, dim=1, out=text)


def run(suite: Suite) -> None:
    images = QUICK_IMAGES if suite.quick else IMAGES
    image_of = torch.arange(images).repeat_interleave(CAPTIONS)
    for model in MODELS:
        if suite.over():
            suite.note(f"{model} was not measured: out of time")
            continue
        image, text = features(model, images, image_of)
        ranks(image[:1000], text[:5000], image_of[:5000])
        products = Products()
        with Memory() as memory, patch.object(torch, "mm", products):
            began = time.perf_counter()
            found = ranks(image, text, image_of)
            seconds = time.perf_counter() - began - products.seconds
        recalls = retrieval(image, text, image_of, found=found)
        nanoseconds = seconds / (images * len(text)) * 1e9
        plain = products.seconds / products.scores * 1e9
        row: dict[str, Any] = {
            "model": model,
            "images": images,
            "captions": len(text),
            "dim": DIM,
            "threads": torch.get_num_threads(),
            "seconds": seconds,
            "ns_a_score": nanoseconds,
            "mm_ns_a_score": plain,
            "over_mm": nanoseconds / plain,
            "features_mib": (image.nbytes + text.nbytes) / 2**20,
            **memory.columns(),
        }
        suite.add(row | {f"{way}_r1": recalls[way]["r1"] for way in ("i2t", "t2i")})
        case = f"{model}: {images:,} images, {len(text):,} captions"
        suite.bar(f"{case}: time over that of torch.mm", nanoseconds / plain, MOST_TIME, at_most=True)
        suite.bar(f"{case}: peak memory of the process, MiB", memory.resident / 2**20, MOST_MEMORY, at_most=True)
