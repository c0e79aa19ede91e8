"""Zero-shot classification: the class whose name is nearest to the image, averaged over prompt templates
(Radford et al., 2021, arXiv:2103.00020, section 3.1.4)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..run_folder import EncodeText

LABELS = ("group", "label", "class", "class_name", "cls")  # entries of the metadata that name a sample's class
TEMPLATES = ("{}", "a drawing of {}", "an emoji of {}", "a picture that belongs to {}")


def prompts(name: str) -> list[str]:
    """A class name, in lower case, in every template."""
    return [template.format(name.lower().replace("&", "and")) for template in TEMPLATES]


def zero_shot(image: Tensor, classes: Tensor, labels: Tensor) -> dict[str, Any]:
    """Classifies each image as the class whose mean over the templates is nearest.

    image [n, dim]; classes [classes, templates, dim]; labels int64 [n]; features of unit length.

    Returns top1; mean_per_class, the recall averaged over the classes that occur in labels; classes and n, the
    counts; chance; and majority, the top1 of always answering the most frequent class.
    """
    weights = F.normalize(classes.mean(dim=1), dim=-1)
    right = (image @ weights.T).argmax(dim=1) == labels
    counts = torch.bincount(labels, minlength=len(classes))
    hits = torch.bincount(labels[right], minlength=len(classes))
    seen = counts > 0
    return {
        "top1": right.float().mean().item(),
        "mean_per_class": (hits[seen] / counts[seen]).mean().item(),
        "classes": len(classes),
        "n": len(image),
        "chance": 1 / len(classes),
        "majority": (counts.max() / counts.sum()).item(),
    }


def label_of(meta: dict[str, Any]) -> str | None:
    """The class that a sample's metadata name: the first of LABELS that is there. None where there is none, and where
    it is a number, which says nothing to a text encoder."""
    for name in LABELS:
        value = meta.get(name)
        if isinstance(value, str) and value.strip() and not value.strip().isdigit():
            return value.strip()
    return None


def has_numbers(metas: Sequence[dict[str, Any]]) -> bool:
    """Whether samples' metadata hold classes as numbers, without names."""
    return any(str(meta.get(name, "")).strip().isdigit() for meta in metas for name in LABELS)


def labels_of(metas: Sequence[dict[str, Any]]) -> list[str]:
    """The distinct classes that samples' metadata name, sorted."""
    return sorted({label for meta in metas if (label := label_of(meta))})


def evaluate_zero_shot(image: Tensor, metas: Sequence[dict[str, Any]], encode_text: EncodeText) -> dict[str, Any]:
    """The scores of `zero_shot` for image features [n, dim] and the metadata of their samples.

    Samples without a class are left out.
    """
    names = labels_of(metas)
    number = {name: i for i, name in enumerate(names)}
    labelled = {i: number[label] for i, meta in enumerate(metas) if (label := label_of(meta))}
    texts = [prompt for name in names for prompt in prompts(name)]
    classes = encode_text(texts).view(len(names), len(TEMPLATES), -1)
    return zero_shot(image[list(labelled)], classes, torch.tensor(list(labelled.values())))
