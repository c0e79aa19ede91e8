"""Composition: does the model prefer the true caption to a foil, a caption that differs in one object or attribute?

As SugarCrepe asks it (Hsieh et al., 2023, arXiv:2306.14610), and SugarCrepe++ with two true captions (Dumpala et al.,
2024, arXiv:2406.11171).
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

_CHUNK = 1024  # choices that are scored at once


class Rows(NamedTuple):
    """A choice by row numbers: of the image, of its true captions, and of the foil."""

    task: str
    image: int
    captions: tuple[int, ...]
    foil: int


def composition(image: Tensor, text: Tensor, choices: Sequence[Rows]) -> dict[str, Any]:
    """The accuracy of each task, their "mean", and "n", the number of choices made.

    image [n, dim], text [texts, dim], of unit length. A choice is right when the cosine of every true caption is larger
    than the foil's: a tie is a miss. Chance is 1/2 for one true caption, 1/3 for two.

    Also "ties" and "counts": task -> how many choices were ties (the least of the true captions and the foil), and how
    many there are; "chance": the accuracies and their mean for scores drawn at random; and "blind": the same with the
    mean of all images' features in place of each image's, so that the text alone decides.

    Raises ValueError for features that are not finite.
    """
    if not (image.isfinite().all() and text.isfinite().all()):
        raise ValueError("a feature is not finite")
    mean_image = F.normalize(image.double().mean(dim=0), dim=0).to(image.dtype)
    right, blind, ties, counts = Counter[str](), Counter[str](), Counter[str](), Counter[str]()
    chance: dict[str, float] = dict.fromkeys((choice.task for choice in choices), 0.0)
    for choice in choices:
        chance[choice.task] += 1 / (1 + len(choice.captions))
    for rows, features, captions, foils in _chunks(image, text, choices):
        margin = _margin(features, captions, foils)
        blind_margin = _margin(mean_image.expand_as(features), captions, foils)
        for row, found, without in zip(rows, margin.tolist(), blind_margin.tolist(), strict=True):
            right[row.task] += found > 0
            ties[row.task] += found == 0
            blind[row.task] += without > 0
            counts[row.task] += 1

    def accuracies(hits: Mapping[str, float]) -> dict[str, float]:
        each = {task: hits[task] / n for task, n in counts.items()}
        return each | {"mean": sum(each.values()) / len(each)}

    return accuracies(right) | {
        "n": len(choices),
        "ties": dict(ties),
        "counts": dict(counts),
        "chance": accuracies(chance),
        "blind": accuracies(blind),
    }


def _chunks(
    image: Tensor, text: Tensor, choices: Sequence[Rows]
) -> Iterator[tuple[Sequence[Rows], Tensor, Tensor, Tensor]]:
    """Some choices, and the features of their images [n, dim], true captions [n, captions, dim] and foils [n, dim]."""
    for start in range(0, len(choices), _CHUNK):
        rows = choices[start : start + _CHUNK]
        most = max(len(row.captions) for row in rows)
        # A caption that stands twice changes no minimum.
        captions = [(*row.captions, *row.captions[:1] * (most - len(row.captions))) for row in rows]
        yield rows, image[[row.image for row in rows]], text[torch.tensor(captions)], text[[row.foil for row in rows]]


def _margin(image: Tensor, captions: Tensor, foils: Tensor) -> Tensor:
    """How far the least cosine of the true captions is above the foil's, float64 [n]. Equal texts have equal cosines:
    each is summed in the same order."""
    image = image.double()
    true = (image.unsqueeze(1) * captions.double()).sum(dim=2).amin(dim=1)
    return true - (image * foils.double()).sum(dim=1)
