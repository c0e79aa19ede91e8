"""Composition: does the model prefer the true caption to a foil that differs in one thing?

The seven tasks of SugarCrepe (Hsieh et al., arXiv 2306.14610).
"""

from collections.abc import Sequence

from torch import Tensor

from ..errors import DataError
from ..sugarcrepe import TASKS


def composition(image: Tensor, captions: dict[str, Tensor], foils: dict[str, Tensor]) -> dict:
    """image [n, dim]; captions and foils: task -> [n, dim]; all of unit length.

    Returns the accuracy of each task, their mean, and n, the choices made. A tie is a miss. Chance is 0.5.
    """
    scores: dict = {
        task: ((image * captions[task]).sum(dim=1) > (image * foils[task]).sum(dim=1)).float().mean().item()
        for task in captions
    }
    return scores | {"mean": sum(scores.values()) / len(scores), "n": len(image) * len(scores)}


def pairs(metas: Sequence[dict]) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Samples' metadata -> (task -> captions, task -> foils). Raises DataError when one lacks a task."""
    for number, meta in enumerate(metas):
        for task in TASKS:
            if not {"caption", "foil"} <= set(meta["composition"].get(task, ())):
                raise DataError(f"sample {number} has no caption and foil for the composition task {task!r}")
    captions = {task: [meta["composition"][task]["caption"] for meta in metas] for task in TASKS}
    foils = {task: [meta["composition"][task]["foil"] for meta in metas] for task in TASKS}
    return captions, foils
