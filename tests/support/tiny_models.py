"""A model that is made in no time, for tests of what uses its features."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lift_fast.inference.model import Model, Parts
from lift_fast.inference.preprocessing import Preprocessing

WORDS = ("red", "green", "blue")


class Tower(nn.Module):
    """The features of an image are its mean colour, a little of each 4 x 4 cell, and nothing else."""

    def __init__(self, seed: int = 0):
        super().__init__()
        self.seen = 0  # images
        weight = torch.randn(12, 4, generator=torch.Generator().manual_seed(seed))
        self.register_buffer("weight", weight)

    def encode_image(self, pixels: Tensor) -> Tensor:
        self.seen += len(pixels)
        cells = F.adaptive_avg_pool2d(pixels, 2).flatten(1)
        return torch.cat([pixels.mean(dim=(2, 3)), 0.1 * cells @ self.weight], dim=1)


def tiny_model(seed: int = 0) -> Model:
    """A Model of dim 7: images of 8 pixels; of texts only the words red, green and blue count."""

    def make_text(device: torch.device):
        def encode(texts):
            rows = [[float(word in text) for word in WORDS] + [0.0] * 4 for text in texts]
            return F.normalize(torch.tensor(rows), dim=1)

        return encode

    return Model(Parts(Tower(seed), Preprocessing(8, 8), 10.0, {}, make_text), "tiny", "cpu")
