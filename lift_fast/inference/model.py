"""Model: the features of images and texts, and what follows from them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import progress as progress_bars
from ..cache import Conditioning
from ..data.captions import halved
from ..devices import pick_device
from ..errors import ConfigError, DataError
from ..run_folder import EncodeText
from .preprocessing import Preprocessing, in_batches

if TYPE_CHECKING:
    from .preprocessing import ImageLike

_TEXTS_AT_ONCE = 256


@dataclass
class Parts:
    """What `load` finds in a source: the parts of a Model.

    module: has encode_image, normalised pixels [batch, 3, H, W] -> [batch, dim]; a Lift or a Clip where the source is a
    run of lift-fast or can be one. logit_scale: the factor, not its logarithm. description: as in run.json; of other
    projects' models only the text encoder and the preprocessing. make_text: a device -> the function that encodes
    texts, called once, when a text is first encoded. read_conditioning: reads `conditioning`, that of the text; None
    without one. It is read when it is first asked for: images do without its file. download: whether the text encoder,
    where it is a model on the hub, may be downloaded: the user has named it, and not only the source.
    """

    module: nn.Module
    preprocessing: Preprocessing
    logit_scale: float
    description: dict[str, Any]
    make_text: Callable[[torch.device], EncodeText]
    read_conditioning: Callable[[], Conditioning | None] = lambda: None
    download: bool = False

    @cached_property
    def conditioning(self) -> Conditioning | None:
        """The conditioning of the text. Raises CacheError when its file is missing or damaged."""
        return self.read_conditioning()


class Model:
    """A trained image encoder and the text encoder that it was trained against, as `lift_fast.load` returns it.

    Features are float32, of unit length, and on the model's device. Attributes: `module` (the torch module: a Lift, a
    Clip, or another project's tower), `preprocess` (a Preprocessing, the transform of an image), `logit_scale` (the
    factor of the cosines before a softmax), `description` (of run.json), `source`, `device`, `dtype`,
    `download_encoder` (whether the text encoder, where it is a model on the hub, may be downloaded).
    """

    def __init__(self, parts: Parts, source: str, device: str | torch.device = "auto"):
        self.module = parts.module.eval().requires_grad_(False)
        self.preprocess = parts.preprocessing
        self.logit_scale = parts.logit_scale
        self.description = parts.description
        self.download_encoder = parts.download
        self.source = source
        self.device = torch.device("cpu")
        self.dtype = torch.float32
        self._parts = parts
        self._text: EncodeText | None = None
        self.to(device)

    @property
    def conditioning(self) -> Conditioning | None:
        """The conditioning of text vectors, which `encode_text` applies; None for a model without one.

        Raises CacheError when its file in the model's folder is missing or damaged.
        """
        return self._parts.conditioning

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> Model:
        """Moves the image encoder, and the text encoder, to a device ("auto", "cpu", "cuda", "cuda:1"), and converts
        the image encoder's weights to a dtype (float32, bfloat16 or float16). Returns the model itself.

        Raises ConfigError for another device or dtype.
        """
        if dtype is not None and dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ConfigError(f"dtype must be float32, bfloat16 or float16, not {dtype}")
        if device is not None:
            device = pick_device(str(device))
            if device != self.device:
                self._text = None  # made again on the new device
            self.device = device
        self.dtype = dtype or self.dtype
        self.module.to(self.device, self.dtype)
        return self

    @torch.no_grad()
    def encode_image(
        self, images: Tensor | ImageLike | Iterable[ImageLike], *, batch_size: int = 64, progress: bool = False
    ) -> Tensor:
        """The features of images: float32 [images, dim] of unit length.

        images: one or many; each a path, the bytes of an encoded image, a PIL image, or a uint8 array [H, W, 3]. Or a
        float tensor [images, 3, H, W] of normalised pixels, as `preprocess` makes them. progress: whether to show a
        bar on stderr.

        Raises DataError, with its name, for an image that cannot be read or decoded; ConfigError for a tensor of
        another shape, for a batch_size below 1, and for features that are not finite.
        """
        _check_batch_size(batch_size)
        if isinstance(images, Tensor):
            if images.dim() != 4 or images.shape[1] != 3 or 0 in images.shape[2:] or not images.is_floating_point():
                raise ConfigError(
                    f"a tensor of images must be normalised pixels, float [images, 3, H, W], not {images.dtype} "
                    f"{list(images.shape)}; `preprocess` makes it from one image"
                )
            batches: Iterator[Tensor] = (images[i : i + batch_size] for i in range(0, len(images), batch_size))
            count = len(images)
        else:
            if isinstance(images, str | bytes | os.PathLike | np.ndarray) or hasattr(images, "convert"):
                images = cast("list[ImageLike]", [images])
            several = cast("Iterable[ImageLike]", images)
            several = several if isinstance(several, Sequence) else list(several)
            count = len(several)
            batches = self._decoded(several, batch_size)
        features = []
        with progress_bars.bar(desc="images", total=count, unit="image", disable=not progress) as bar:
            for pixels in batches:
                features.append(self._encode(pixels))
                bar.update(len(pixels))
        return self._finite(torch.cat(features), "images") if features else self._encode(self._no_pixels())[:0]

    def encode_text(self, texts: str | Iterable[str], *, progress: bool = False) -> Tensor:
        """The features of texts: float32 [texts, dim] of unit length. The text encoder is loaded by the first call.

        progress: whether to show a bar on stderr.

        Raises EncoderError when the text encoder cannot be loaded or makes no tokens of a text; DataError for a text
        that is not valid Unicode; ConfigError when no text encoder is known, or it needs trust_remote_code, and for
        features that are not finite; CacheMismatch when its dim is not the image features'; CacheError as
        `conditioning`.
        """
        if self._text is None:
            self._text = self._parts.make_text(self.device)
        texts = [texts] if isinstance(texts, str) else list(texts)
        for text in texts:
            if halved(text):  # a command's argument in another encoding
                raise DataError(f"the text {text!r} holds half a Unicode character; correct it")
        features = []
        with progress_bars.bar(desc="texts", total=len(texts), unit="text", disable=not progress) as bar:
            for start in range(0, len(texts), _TEXTS_AT_ONCE):
                features.append(self._text(texts[start : start + _TEXTS_AT_ONCE]).to(self.device))
                bar.update(len(features[-1]))
        return self._finite(torch.cat(features), "texts") if features else self._text(["a"])[:0].to(self.device)

    @staticmethod
    def similarity(image_features: Tensor, text_features: Tensor) -> Tensor:
        """The cosines of two sets of features, [n, dim] and [m, dim]: float32 [n, m]. Times `logit_scale` they are
        the logits of the model's training."""
        one, other = (F.normalize(features.float(), dim=-1) for features in (image_features, text_features))
        return one @ other.T

    def zero_shot(self, classnames: Sequence[str], templates: Sequence[str] = ("a photo of a {}.",)) -> Classifier:
        """A zero-shot classifier (Radford et al., arXiv 2103.00020, section 3.1.4): a class's weight is the mean of
        the features of its name in every template, scaled to unit length.

        templates: texts in which {} stands for the name. Raises ConfigError when there are less than two classes, two
        of one name, or a template without {}; and what encode_text raises.
        """
        names, templates = list(classnames), list(templates)
        if isinstance(classnames, str) or len(names) < 2 or len(set(names)) < len(names):
            raise ConfigError(f"classes must be at least two different names, not {', '.join(names) or 'none'}")
        if not templates or any("{}" not in template for template in templates):
            raise ConfigError("each template must hold {} for the name of the class, as in 'a photo of a {}.'")
        prompts = [template.replace("{}", name) for name in names for template in templates]
        weights = self.encode_text(prompts).view(len(names), len(templates), -1).mean(dim=1)
        return Classifier(self, names, F.normalize(weights, dim=-1))

    def _finite(self, features: Tensor, what: str) -> Tensor:
        """The features [n, dim]. Raises ConfigError unless all are finite: of NaN any order would be one of ranks."""
        if not features.isfinite().all():
            raise ConfigError(
                f"the features of some {what} are not finite: the weights of {self.source}, in {self.dtype}, overflow, "
                "or the pixels that were given do; load it in float32, or take other weights"
            )
        return features

    def _encode(self, pixels: Tensor) -> Tensor:
        encode: Callable[[Tensor], Tensor] = self.module.encode_image  # type: ignore[assignment]
        try:
            return F.normalize(encode(pixels.to(self.device, self.dtype)).float(), dim=-1)
        except ValueError as error:  # of Vit, for another height or width
            raise ConfigError(f"a tensor of images must be of this model's size: {error}") from error

    def _decoded(self, images: Sequence[ImageLike], batch_size: int) -> Iterator[Tensor]:
        """Normalised pixels of the images, a batch at a time."""
        return map(self._stacked, in_batches(self.preprocess.cropped, images, batch_size, self.device))

    def _stacked(self, images: list[np.ndarray]) -> Tensor:
        return self.preprocess.normalise(torch.from_numpy(np.stack(images)).to(self.device))

    def _no_pixels(self) -> Tensor:
        return torch.zeros(1, 3, self.preprocess.image_size, self.preprocess.image_size)


class Classifier:
    """A zero-shot classifier, as `Model.zero_shot` makes it. classnames; weights: float32 [classes, dim]."""

    def __init__(self, model: Model, classnames: list[str], weights: Tensor):
        self.model, self.classnames, self.weights = model, classnames, weights

    def __call__(self, images: Any, **options: Any) -> Tensor:
        """The probabilities of the classes, float32 [images, classes]: the softmax of the scaled cosines. images,
        options: as of `Model.encode_image`, which it raises the errors of."""
        return self.probabilities(self.model.encode_image(images, **options))

    def probabilities(self, features: Tensor) -> Tensor:
        """The same of image features [images, dim]."""
        return (self.model.logit_scale * self.model.similarity(features, self.weights)).softmax(dim=-1)


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}; it must be at least 1 image")
