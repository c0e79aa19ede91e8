"""The model that is evaluated, as far as evaluation knows it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..run_folder import EncodeText
from .images import Pixels


@dataclass(frozen=True)
class Subject:
    """A model to be evaluated: a run of lift-fast, or another project's.

    encode_image: normalised pixels [batch, 3, size, size] on `device` -> features [batch, dim]. encode_text: texts ->
    float32 [texts, dim] on the CPU, of unit length. pixels: what encode_image expects. device: of the image tower.
    description: as in run.json, as far as it is known.

    image_identity, text_identity: what decides the features of the model's images and of its texts, in a word: another
    for other weights, preprocessing, encoder, prompt or conditioning. None: nothing is known, and no features are kept.
    """

    encode_image: Callable[[Tensor], Tensor]
    encode_text: EncodeText
    pixels: Pixels
    device: torch.device
    description: Mapping[str, Any] = field(default_factory=dict)
    image_identity: Callable[[], str | None] = lambda: None
    text_identity: Callable[[], str | None] = lambda: None
