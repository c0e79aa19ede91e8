"""Evaluates a model on held-out sets: retrieval on each, composition and zero-shot where a set's metadata allow it."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import run_folder
from ..data.images import read_header
from ..data.open import open_data
from ..data.options import DataOptions
from ..data.samples import Samples
from ..errors import ConfigError, DataError, TrainingError
from ..nn import Clip, Lift
from ..ranks import Rank, together
from ..run_folder import EncodeText
from .composition import evaluate_composition, has_foils
from .images import Images, image_features
from .retrieval import retrieval
from .texts import Captions, Texts, encode_texts, matched, read_captions
from .zero_shot import LABELS, evaluate_zero_shot, has_numbers, labels_of

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
    rank: Rank | None = None,
) -> dict[str, Any]:
    """Evaluates the trained run in `folder` on `sets`: name -> path of a held-out data set.

    loader: what decodes the images: auto, host or dali, as in TrainConfig. trust_remote_code: whether LIFT's text
    encoder may run code from its repository. examples, and what is returned: as of evaluate_model.

    field: the caption to read. Default: the one that the run was trained on, or "txt" in a set that does not have it.
    images: the folder of the image files of each set, or none at all. options: how the sets are read; where they have
    the default, as the run's own data was read. rank: this process among those that share the work, in one process
    group and each on its own device; all of them return the same.

    Raises DataError and ConfigError when the sets or the run cannot be read; what run_folder.conditioning_of,
    run_folder.text_encoder and evaluate_model raise, each also when it is raised on another rank.
    """
    rank = rank or Rank()

    def opened() -> tuple[Lift | Clip, EncodeText, dict[str, Samples], DataOptions, str]:
        model, run = run_folder.load(folder, device)
        conditioning = run_folder.conditioning_of(folder, run)
        reading = options_of(run, options or DataOptions())
        if images and len(images) != len(sets):
            raise ConfigError(f"one --pictures for each --data, or none: got {len(images)} for {len(sets)}")
        folders: Sequence[Path | None] = images or len(sets) * [None]
        held_out = {
            name: open_data(path, of_images, reading)
            for (name, path), of_images in zip(sets.items(), folders, strict=True)
        }
        encode_text = run_folder.text_encoder(model, run, device, trust_remote_code, conditioning)
        return model, encode_text, held_out, reading, run.get("field", "txt")

    model, encode_text, held_out, reading, wanted = together(opened)
    fields = together(
        lambda: {name: field or field_of(data, wanted) for name, data in held_out.items()}, only_first=True
    )
    result = evaluate_model(
        model,
        encode_text,
        held_out,
        device,
        loader=loader,
        examples=examples,
        fields=fields,
        skip_bad=reading.skip_bad,
        rank=rank,
    )
    for name, found in fields.items():
        if field is None:
            result["notes"][name] += notes_on_field(found, wanted)
    return result


def options_of(run: Mapping[str, Any], given: DataOptions) -> DataOptions:
    """How the held-out sets of a run are read: as given; where that has the default, as the run's own data was."""
    settings = {**run.get("read", {}), **given.recorded()}
    return replace(given, **{name: value for name, value in settings.items() if hasattr(given, name)})


def field_of(data: Samples, wanted: str) -> str:
    """The caption field `wanted` if the first samples have it, else "txt"."""
    for sample in range(min(_TRIED, len(data))):
        try:
            data.caption(sample, wanted)
            return wanted
        except DataError:
            continue
    return "txt"


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
    rank: Rank | None = None,
) -> dict[str, Any]:
    """Evaluates `model`, in eval mode and on `device`, on `sets`: name -> data set.

    encode_text: captions -> features float32 [captions, dim] on the CPU, of unit length. fields: name -> the caption
    field to read; default "txt". skip_bad: leave out samples without a usable caption. rank: as of evaluate.

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
    rank = rank or Rank()
    result: dict[str, Any] = {"retrieval": {}, "composition": None, "zero_shot": None, "pictures": []}
    result |= {"skipped": {}, "skipped_causes": {}, "problems": {}, "notes": {}}
    for name, data in sets.items():
        field = (fields or {}).get(name, "txt")
        scores = _evaluate_set(model, encode_text, name, data, device, loader, examples, field, skip_bad, rank)
        for task in ("composition", "zero_shot"):
            if scores[task] is not None:
                _require_first(result, task, name)
                result[task] = scores[task]
        result["pictures"] += scores["pictures"]
        for key in ("retrieval", "skipped", "skipped_causes", "notes"):
            result[key][name] = scores[key]
        result["problems"][name] = [problem._asdict() for problem in data.problems]
    return result


def _evaluate_set(
    model: Lift | Clip,
    encode_text: EncodeText,
    name: str,
    data: Samples,
    device: torch.device,
    loader: str,
    examples: int,
    field: str,
    skip_bad: bool,
    rank: Rank,
) -> dict[str, Any]:
    """What evaluate_model returns of one set."""
    images = Images(data, model.visual.config.image_size, device, loader, rank)
    features = image_features(model.encode_image, images)
    captions = together(lambda: read_captions(data, features.samples, field, skip_bad) if rank.is_first else None)
    texts = encode_texts(captions, encode_text, rank, skip_bad)

    def score() -> dict[str, Any]:
        assert captions is not None  # on rank 0
        image, chosen, causes = matched(features, captions, texts)
        found = score_set(image, chosen, texts)
        return found | {
            "skipped": sum(causes.values()),
            "skipped_causes": causes,
            "notes": notes_on(found["retrieval"], chosen.metas),
            "pictures": _examples(name, data, image[:examples], chosen, texts),
        }

    return together(score, only_first=True)


def score_set(image: Tensor, captions: Captions, texts: Texts) -> dict[str, Any]:
    """The scores of one set: retrieval; composition where every sample has foils and zero_shot where there are two
    classes, else None.

    image: features of unit length, float32 [n, dim]; captions: of the same n samples.

    Raises TrainingError when a feature is not finite.
    """
    if not (image.isfinite().all() and texts.vectors.isfinite().all()):
        raise TrainingError("the model's features are not finite: its weights have diverged; take earlier ones")
    distinct = list(dict.fromkeys(captions.captions))
    number = {caption: i for i, caption in enumerate(distinct)}
    caption_of = [number[caption] for caption in captions.captions]
    repeated = len(distinct) < len(caption_of)
    metas = captions.metas
    return {
        "retrieval": retrieval(image, texts(distinct), caption_of if repeated else None),
        "composition": evaluate_composition(image, metas, texts) if has_foils(metas) else None,
        "zero_shot": evaluate_zero_shot(image, metas, texts) if len(labels_of(metas)) > 1 else None,
    }


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


def notes_on_field(found: str, wanted: str) -> list[str]:
    """What to know of a set whose captions `found` were read, by a run that was trained on those called `wanted`."""
    if found == wanted:
        return []
    return [f"the run was trained on the captions {wanted!r}, which it does not have; {found!r} was read"]


def _examples(name: str, data: Samples, image: Tensor, captions: Captions, texts: Texts) -> list[dict[str, Any]]:
    """For the report: the first images of a set, each with its caption and the caption that the model ranks first.

    image: the features of these first images; captions: of all.
    """
    distinct = list(dict.fromkeys(captions.captions))
    best = (image @ texts(distinct).T).argmax(dim=1).tolist()
    return [
        {
            "set": name,
            "image": data_uri(data.image_bytes(sample)),
            "caption": caption,
            "first": distinct[first],
            "right": distinct[first] == caption,
        }
        for sample, caption, first in zip(captions.samples, captions.captions, best, strict=False)
    ]


def data_uri(image: bytes) -> str:
    """An encoded image as an address that a page can hold, with its media type: "data:image/jpeg;base64,…"."""
    return f"data:image/{read_header(image).format};base64,{base64.b64encode(image).decode()}"


def _require_first(result: dict[str, Any], task: str, name: str) -> None:
    """Raises ConfigError when an earlier set has been scored on this task."""
    if result[task] is not None:
        raise ConfigError(f"{name} is the second set for {task}; evaluate the sets one at a time")
