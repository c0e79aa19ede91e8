"""Models whose scores are known beforehand, for images of tiny_benchmarks.uniform."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from lift_fast.eval.images import Pixels
from lift_fast.eval.subject import Subject

from .tiny_benchmarks import number_of


class Scorer:
    """A model by a table. of_image: number of an image -> features; of_text: text -> features."""

    def __init__(self, of_image: Callable[[int], Tensor], of_text: Callable[[str], Tensor]):
        self.of_image, self.of_text = of_image, of_text

    def subject(self) -> Subject:
        # So that normalised pixels are colours, 0 … 1.
        return Subject(self.encode_image, self.encode_text, Pixels(8, 8, (0, 0, 0), (1, 1, 1)), torch.device("cpu"))

    def encode_image(self, pixels: Tensor) -> Tensor:
        colours = 255 * pixels.mean(dim=(2, 3))
        return torch.stack([self.of_image(number_of(red, green)) for red, green, _ in colours.tolist()])

    def encode_text(self, texts: list[str]) -> Tensor:
        return F.normalize(torch.stack([self.of_text(text) for text in texts]), dim=1)
