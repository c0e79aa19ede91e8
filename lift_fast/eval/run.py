"""Evaluates a model on held-out sets: retrieval on each, composition and zero-shot where a set's metadata allow it."""

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import run_folder
from ..data import dali, host
from ..data.open import open_data
from ..data.pixels import normalise
from ..data.samples import Samples
from ..devices import gpu_index
from ..errors import ConfigError
from ..nn import Clip, Lift
from ..run_folder import EncodeText
from .composition import evaluate_composition, has_foils
from .retrieval import retrieval
from .zero_shot import evaluate_zero_shot, groups_of

_IMAGES_AT_ONCE = 256  # in the image tower


def evaluate(
    folder: Path,
    sets: Mapping[str, Path],
    device: torch.device,
    *,
    loader: str = "auto",
    trust_remote_code: bool = False,
    examples: int = 8,
) -> dict[str, Any]:
    """Evaluates the trained run in `folder` on `sets`: name -> path of a held-out data set.

    loader: what decodes the images: auto, host or dali, as in TrainConfig. trust_remote_code: whether LIFT's text
    encoder may run code from its repository. examples, and what is returned: as of evaluate_model.

    Raises DataError and ConfigError when the sets or the run cannot be read; what run_folder.text_encoder and
    evaluate_model raise.
    """
    held_out = {name: open_data(path) for name, path in sets.items()}
    model, run = run_folder.load(folder, device)
    encode_text = run_folder.text_encoder(model, run, device, trust_remote_code)
    return evaluate_model(model, encode_text, held_out, device, loader=loader, examples=examples)


@torch.no_grad()
def evaluate_model(
    model: Lift | Clip,
    encode_text: EncodeText,
    sets: Mapping[str, Samples],
    device: torch.device,
    *,
    loader: str = "auto",
    examples: int = 8,
) -> dict[str, Any]:
    """Evaluates `model`, in eval mode and on `device`, on `sets`: name -> data set.

    encode_text: captions -> features float32 [captions, dim] on the CPU, of unit length.

    Returns the content of eval.json:
        retrieval     {set: scores}, see retrieval.retrieval
        composition   scores of the set in which every sample has foils, see composition.composition; None without one
        zero_shot     scores of the set with at least two groups, see zero_shot.zero_shot; None without one
        pictures      of each set the first `examples` images, with their caption and the one that the model ranks first
        skipped       {set: number of images that do not decode}; these count in no score

    Raises ConfigError when two sets have foils or two have groups, since each of these scores is of one set; DataError
    when no image of a set decodes; BackendError for loader dali when it is not installed.
    """
    result: dict[str, Any] = {"retrieval": {}, "composition": None, "zero_shot": None, "pictures": [], "skipped": {}}
    for name, data in sets.items():
        image, samples = image_features(model, data, device, loader)
        captions = [data.caption(sample) for sample in samples]
        text = encode_text(captions)
        result["skipped"][name] = len(data) - len(samples)
        result["retrieval"][name] = retrieval(image, text)
        result["pictures"] += _examples(name, data, samples[:examples], captions, image, text)

        metas = [data.meta(sample) for sample in samples]
        if has_foils(metas):
            _require_first(result, "composition", name)
            result["composition"] = evaluate_composition(image, metas, encode_text)
        if len(groups_of(metas)) > 1:
            _require_first(result, "zero_shot", name)
            result["zero_shot"] = evaluate_zero_shot(image, metas, encode_text)
    return result


def image_features(
    model: Lift | Clip, data: Samples, device: torch.device, loader: str = "auto"
) -> tuple[Tensor, list[int]]:
    """The features of every image of a set that decodes, and the numbers of their samples.

    Features: float32 [n, dim] on the CPU, of unit length. Raises DataError when no image decodes; BackendError for
    loader dali when it is not installed.
    """
    size = model.visual.config.image_size
    if dali.wanted(loader, device.type == "cuda"):
        pixels, samples, _ = dali.load_images(data, size, gpu_index(device))
    else:
        pixels, samples, _ = host.load_images(data, size)
    parts = [model.encode_image(normalise(part.to(device))).float().cpu() for part in pixels.split(_IMAGES_AT_ONCE)]
    return F.normalize(torch.cat(parts), dim=-1), samples


def _examples(
    name: str, data: Samples, samples: Sequence[int], captions: Sequence[str], image: Tensor, text: Tensor
) -> list[dict[str, Any]]:
    """For the report: the first images of a set, each with its caption and the caption that the model ranks first."""
    best = (image[: len(samples)] @ text.T).argmax(dim=1).tolist()
    return [
        {
            "set": name,
            "png_base64": base64.b64encode(data.image_bytes(sample)).decode(),
            "caption": captions[i],
            "first": captions[first],
            "right": first == i,
        }
        for i, (sample, first) in enumerate(zip(samples, best, strict=True))
    ]


def _require_first(result: dict[str, Any], task: str, name: str) -> None:
    """Raises ConfigError when an earlier set has been scored on this task."""
    if result[task] is not None:
        raise ConfigError(f"{name} is the second set for {task}; evaluate the sets one at a time")
