"""Evaluates a model on held-out sets: retrieval on each, composition and zero-shot where a set's metadata allow it."""

import base64
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import run_folder
from ..data import dali, host
from ..data.images import read_header
from ..data.open import open_data
from ..data.options import DataOptions
from ..data.pixels import normalise
from ..data.samples import BadText, Samples
from ..devices import gpu_index
from ..errors import ConfigError, DataError
from ..nn import Clip, Lift
from ..run_folder import EncodeText
from .composition import evaluate_composition, has_foils
from .retrieval import retrieval
from .zero_shot import LABELS, evaluate_zero_shot, has_numbers, labels_of

_IMAGES_AT_ONCE = 256  # in the image tower
_TRIED = 8  # samples that are asked for a caption, to see whether a set has the field


def evaluate(
    folder: Path,
    sets: Mapping[str, Path],
    device: torch.device,
    *,
    loader: str = "auto",
    trust_remote_code: bool = False,
    examples: int = 8,
    field: str | None = None,
    images: Sequence[Path] = (),
    options: DataOptions | None = None,
) -> dict[str, Any]:
    """Evaluates the trained run in `folder` on `sets`: name -> path of a held-out data set.

    loader: what decodes the images: auto, host or dali, as in TrainConfig. trust_remote_code: whether LIFT's text
    encoder may run code from its repository. examples, and what is returned: as of evaluate_model.

    field: the caption to read. Default: the one that the run was trained on, or "txt" in a set that does not have it.
    images: the folder of the image files of each set, or none at all. options: how the sets are read; where they have
    the default, as the run's own data was read.

    Raises DataError and ConfigError when the sets or the run cannot be read; what run_folder.text_encoder and
    evaluate_model raise.
    """
    model, run = run_folder.load(folder, device)
    given = options or DataOptions()
    settings = {**run.get("read", {}), **given.recorded()}
    reading = replace(given, **{name: value for name, value in settings.items() if hasattr(given, name)})
    if images and len(images) != len(sets):
        raise ConfigError(f"one --pictures for each --data, or none: got {len(images)} for {len(sets)}")
    folders: Sequence[Path | None] = images or len(sets) * [None]
    held_out = {
        name: open_data(path, of_images, reading) for (name, path), of_images in zip(sets.items(), folders, strict=True)
    }
    wanted = run.get("field", "txt")
    fields = {name: field or field_of(data, wanted) for name, data in held_out.items()}
    encode_text = run_folder.text_encoder(model, run, device, trust_remote_code)
    result = evaluate_model(
        model,
        encode_text,
        held_out,
        device,
        loader=loader,
        examples=examples,
        fields=fields,
        skip_bad=reading.skip_bad,
    )
    for name, found in fields.items():
        if field is None and found != wanted:
            result["notes"][name].append(
                f"the run was trained on the captions {wanted!r}, which it does not have; {found!r} was read"
            )
    return result


def field_of(data: Samples, wanted: str) -> str:
    """The caption field `wanted` if the first samples have it, else "txt"."""
    for sample in range(min(_TRIED, len(data))):
        try:
            data.caption(sample, wanted)
            return wanted
        except DataError:
            continue
    return "txt"


@torch.no_grad()
def evaluate_model(
    model: Lift | Clip,
    encode_text: EncodeText,
    sets: Mapping[str, Samples],
    device: torch.device,
    *,
    loader: str = "auto",
    examples: int = 8,
    fields: Mapping[str, str] | None = None,
    skip_bad: bool = False,
) -> dict[str, Any]:
    """Evaluates `model`, in eval mode and on `device`, on `sets`: name -> data set.

    encode_text: captions -> features float32 [captions, dim] on the CPU, of unit length. fields: name -> the caption
    field to read; default "txt". skip_bad: leave out samples without a usable caption.

    Returns the content of eval.json:
        retrieval      {set: scores}, see retrieval.retrieval
        composition    scores of the set in which every sample has foils, see composition.composition; None without one
        zero_shot      scores of the set with at least two classes, see zero_shot.zero_shot; None without one
        pictures       of each set the first `examples` images as data URIs, with their caption and the one that the
                       model ranks first
        skipped        {set: number of samples left out}: images that do not decode, captions that cannot be used; these
                       count in no score
        skipped_causes {set: the same by cause}
        problems       {set: what opening it found that belongs to no sample}
        notes          {set: what to know of its scores, in sentences}

    Raises ConfigError when two sets have foils or two have classes, since each of these scores is of one set; DataError
    when no image of a set decodes, and for a caption that cannot be used, unless skip_bad; BackendError for loader dali
    when it is not installed.
    """
    result: dict[str, Any] = {"retrieval": {}, "composition": None, "zero_shot": None, "pictures": []}
    result |= {"skipped": {}, "skipped_causes": {}, "problems": {}, "notes": {}}
    for name, data in sets.items():
        image, samples, causes = image_features(model, data, device, loader)
        captions, bad = captions_of(data, samples, (fields or {}).get(name, "txt"), skip_bad)
        if bad:
            kept = [i for i in range(len(samples)) if i not in bad]
            image, samples, captions = image[kept], [samples[i] for i in kept], [captions[i] for i in kept]
            causes = dict((Counter(causes) + Counter(error.cause for error in bad.values())).most_common())
        distinct = list(dict.fromkeys(captions))
        number = {caption: i for i, caption in enumerate(distinct)}
        caption_of = [number[caption] for caption in captions]
        text = encode_text(distinct)
        repeated = len(distinct) < len(captions)
        result["skipped"][name], result["skipped_causes"][name] = sum(causes.values()), causes
        result["problems"][name] = [problem._asdict() for problem in data.problems]
        result["retrieval"][name] = retrieval(image, text, caption_of if repeated else None)
        result["pictures"] += _examples(name, data, samples[:examples], distinct, caption_of, image, text)

        metas = [data.meta(sample) for sample in samples]
        if has_foils(metas):
            _require_first(result, "composition", name)
            result["composition"] = evaluate_composition(image, metas, encode_text)
        if len(labels_of(metas)) > 1:
            _require_first(result, "zero_shot", name)
            result["zero_shot"] = evaluate_zero_shot(image, metas, encode_text)
        result["notes"][name] = notes_on(result["retrieval"][name], metas)
    return result


def captions_of(
    data: Samples, samples: Sequence[int], field: str, skip_bad: bool
) -> tuple[list[str], dict[int, BadText]]:
    """The captions of samples, and position in `samples` -> error for those that cannot be used, whose caption is "".

    Raises BadText for the first of these, unless skip_bad; DataError when none can be used.
    """
    captions: list[str] = []
    bad: dict[int, BadText] = {}
    for i, sample in enumerate(samples):
        try:
            captions.append(data.caption(sample, field))
        except BadText as error:
            if not skip_bad:
                raise
            captions.append("")
            bad[i] = error
    if len(bad) == len(samples):
        raise DataError(f"{data.folder}: no caption can be used; the first: {bad[0].reason}")
    return captions, bad


def notes_on(scores: dict[str, Any], metas: Sequence[dict[str, Any]]) -> list[str]:
    """What to know of a set's scores: captions that repeat, classes without names."""
    notes = []
    if scores["repeats"]:
        most = scores["ceiling"]
        notes.append(
            f"{scores['repeats']} of {scores['n']} captions repeat an earlier one, so a perfect model scores at most "
            f"{most['t2i']['r1']:.1%} R@1 from text to image and {most['i2t']['r1']:.1%} from image to text"
        )
    if len(labels_of(metas)) < 2 and has_numbers(metas):
        notes.append(
            "its classes are numbers, and zero-shot classification needs their names, in a column or an entry of the "
            f".json called one of {', '.join(LABELS)}"
        )
    return notes


def image_features(
    model: Lift | Clip, data: Samples, device: torch.device, loader: str = "auto"
) -> tuple[Tensor, list[int], dict[str, int]]:
    """The features of every image of a set that decodes, the numbers of their samples, and how many do not, by cause.

    Features: float32 [n, dim] on the CPU, of unit length. Raises DataError when no image decodes; BackendError for
    loader dali when it is not installed.
    """
    size = model.visual.config.image_size
    if dali.wanted(loader, device.type == "cuda"):
        pixels, samples, causes = dali.load_images(data, size, gpu_index(device))
    else:
        pixels, samples, causes = host.load_images(data, size)
    parts = [model.encode_image(normalise(part.to(device))).float().cpu() for part in pixels.split(_IMAGES_AT_ONCE)]
    return F.normalize(torch.cat(parts), dim=-1), samples, causes


def _examples(
    name: str,
    data: Samples,
    samples: Sequence[int],
    captions: Sequence[str],
    caption_of: Sequence[int],
    image: Tensor,
    text: Tensor,
) -> list[dict[str, Any]]:
    """For the report: the first images of a set, each with its caption and the caption that the model ranks first.

    captions: the distinct ones, whose features are text; caption_of: the number of each sample's among them.
    """
    best = (image[: len(samples)] @ text.T).argmax(dim=1).tolist()
    return [
        {
            "set": name,
            "image": data_uri(data.image_bytes(sample)),
            "caption": captions[own],
            "first": captions[first],
            "right": first == own,
        }
        for sample, own, first in zip(samples, caption_of, best, strict=False)
    ]


def data_uri(image: bytes) -> str:
    """An encoded image as an address that a page can hold, with its media type: "data:image/jpeg;base64,…"."""
    return f"data:image/{read_header(image).format};base64,{base64.b64encode(image).decode()}"


def _require_first(result: dict[str, Any], task: str, name: str) -> None:
    """Raises ConfigError when an earlier set has been scored on this task."""
    if result[task] is not None:
        raise ConfigError(f"{name} is the second set for {task}; evaluate the sets one at a time")
