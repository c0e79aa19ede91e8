"""Zero-shot classification: the class whose name is nearest to the image, averaged over prompt templates
(Radford et al., 2021, arXiv:2103.00020, section 3.1.4)."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

_CHUNK = 4096  # images that are classified at once


def zero_shot(image: Tensor, classes: Tensor, labels: Tensor) -> dict[str, Any]:
    """Classifies each image as the class whose mean over the templates is nearest.

    image [n, dim]; classes [classes, templates, dim]; labels int64 [n]; features of unit length.

    Returns top1 and top5, the fractions of images whose class is among the first 1 and 5, where a class that ties goes
    before the right one; mean_per_class, top1 averaged over the classes that occur in labels; classes, templates and n,
    the counts; chance; majority, the top1 of always answering the most frequent class; and first_template, top1 and
    top5 with the first template alone, None where there is no other.
    """
    right = _ranks(image, classes.double().mean(dim=1), labels)
    counts = torch.bincount(labels, minlength=len(classes))
    hits = torch.bincount(labels[right < 1], minlength=len(classes))
    seen = counts > 0
    several = classes.shape[1] > 1
    return _top(right) | {
        "mean_per_class": (hits[seen] / counts[seen]).mean().item(),
        "classes": len(classes),
        "templates": classes.shape[1],
        "n": len(image),
        "chance": 1 / len(classes),
        "majority": (counts.max() / counts.sum()).item(),
        "first_template": _top(_ranks(image, classes[:, 0], labels)) if several else None,
    }


def _ranks(image: Tensor, weights: Tensor, labels: Tensor) -> Tensor:
    """How many wrong classes are as near to each image as its own, or nearer: int64 [n].

    Products in float64, rounded to float32: equal weights tie wherever they stand in the product.
    """
    weights = F.normalize(weights.double(), dim=1)
    ranks = []
    for some, own in zip(image.split(_CHUNK), labels.split(_CHUNK), strict=True):
        scores = (some.double() @ weights.T).float()
        ranks.append((scores >= scores.gather(1, own.unsqueeze(1))).sum(dim=1) - 1)
    return torch.cat(ranks)


def _top(ranks: Tensor) -> dict[str, float]:
    return {f"top{k}": (ranks < k).double().mean().item() for k in (1, 5)}
