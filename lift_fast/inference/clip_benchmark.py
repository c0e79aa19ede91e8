"""A Model as LAION's clip_benchmark takes one (github.com/LAION-AI/CLIP_benchmark): an outside check of the scores."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .model import Model
from .preprocessing import Preprocessing


class ForClipBenchmark:
    """What clip_benchmark's metrics and data sets take of a model: `encode_image`, `encode_text`, and apart from them
    `tokenizer` and `transform`.

    A Model encodes texts, not tokens: `tokenizer` keeps each text and gives its number in place of tokens, which
    `encode_text` takes back. One object is both the model and the tokenizer of a call. Pass amp=False: a Model computes
    in its own dtype.
    """

    def __init__(self, model: Model):
        self.model = model
        self._numbers: dict[str, int] = {}
        self._texts: list[str] = []

    @property
    def transform(self) -> Preprocessing:
        """The transform of an image, for a data set: as of the model's `preprocess`."""
        return self.model.preprocess

    def tokenizer(self, texts: str | Sequence[str]) -> Tensor:
        """The numbers of texts, int64 [texts, 1]: equal texts have equal numbers."""
        texts = [texts] if isinstance(texts, str) else texts
        for text in texts:
            if text not in self._numbers:
                self._numbers[text] = len(self._texts)
                self._texts.append(text)
        return torch.tensor([self._numbers[text] for text in texts], dtype=torch.int64).unsqueeze(1)

    def encode_text(self, numbers: Tensor) -> Tensor:
        """The features of the texts that `tokenizer` gave these numbers, int64 [texts, 1]: float32 [texts, dim] of unit
        length. Raises IndexError for a number that it gave no text; what Model.encode_text raises."""
        return self.model.encode_text([self._texts[number] for number in numbers.flatten().tolist()])

    def encode_image(self, pixels: Tensor) -> Tensor:
        """The features of normalised pixels, float [images, 3, H, W]: float32 [images, dim] of unit length."""
        return self.model.encode_image(pixels, batch_size=max(len(pixels), 1))
