"""A held-out set: its images, and what it asks of a model."""

from dataclasses import dataclass

from ..data.samples import Samples
from .questions import Questions


@dataclass(frozen=True)
class HeldOutSet:
    """data: the images. questions: what is asked about them, by sample number. benchmark: the published set that this
    is, whose figures others report: "sugarcrepe", "sugarcrepe++", "imagenet", "coco-val2017", "coco-karpathy" or
    "flickr30k"; None for any other set, and for a part of one."""

    data: Samples
    questions: Questions
    benchmark: str | None = None
