"""Composition: does the model prefer the true caption to a foil, a caption that differs in one object or attribute?

The seven tasks of SugarCrepe (Hsieh et al., 2023, arXiv:2306.14610).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..errors import DataError
from ..run_folder import EncodeText
from ..sugarcrepe import TASKS


def composition(image: Tensor, captions: Mapping[str, Tensor], foils: Mapping[str, Tensor]) -> dict[str, Any]:
    """The accuracy of each task, their "mean", and "n", the number of choices made.

    image [n, dim]; captions and foils: task -> [n, dim], of the same samples; all of unit length. A choice is correct
    when the caption's cosine is larger than the foil's: a tie is a miss. Chance is 0.5.
    """
    scores: dict[str, Any] = {
        task: ((image * captions[task]).sum(dim=1) > (image * foils[task]).sum(dim=1)).float().mean().item()
        for task in captions
    }
    return scores | {"mean": sum(scores.values()) / len(scores), "n": len(image) * len(scores)}


def has_foils(metas: Sequence[dict[str, Any]]) -> bool:
    """Whether the metadata of every sample have a "composition"."""
    return all("composition" in meta for meta in metas)


def captions_and_foils(metas: Sequence[dict[str, Any]]) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Samples' metadata -> (task -> captions, task -> foils), in the samples' order.

    Raises DataError when a sample lacks the caption or the foil of a task.
    """
    for number, meta in enumerate(metas):
        for task in TASKS:
            if not {"caption", "foil"} <= set(meta["composition"].get(task, ())):
                raise DataError(f"sample {number} has no caption and foil for the composition task {task!r}")
    captions = {task: [meta["composition"][task]["caption"] for meta in metas] for task in TASKS}
    foils = {task: [meta["composition"][task]["foil"] for meta in metas] for task in TASKS}
    return captions, foils


def evaluate_composition(image: Tensor, metas: Sequence[dict[str, Any]], encode_text: EncodeText) -> dict[str, Any]:
    """The scores of `composition` for image features [n, dim] and the metadata of their samples.

    Raises DataError as captions_and_foils does.
    """
    captions, foils = captions_and_foils(metas)
    # Tasks share captions: each distinct text is encoded once.
    texts = list(dict.fromkeys(text for side in (captions, foils) for task in side.values() for text in task))
    number = {text: i for i, text in enumerate(texts)}
    vectors = encode_text(texts)

    def features(side: dict[str, list[str]]) -> dict[str, Tensor]:
        return {task: vectors[[number[text] for text in task_texts]] for task, task_texts in side.items()}

    return composition(image, features(captions), features(foils))
