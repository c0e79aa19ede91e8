"""Zero-shot classification: the class whose name is nearest to the image, averaged over prompt templates
(Radford et al., 2021, arXiv:2103.00020, section 3.1.4)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

_CHUNK = 4096  # images that are classified at once


def zero_shot(
    image: Tensor, classes: Tensor, labels: Tensor, names: Sequence[str] | None = None, alone: Tensor | None = None
) -> dict[str, Any]:
    """Classifies each image as the class whose mean over the templates is nearest.

    image [n, dim]; classes [classes, templates, dim]; labels int64 [n]; features of unit length. names: of the classes;
    those of one name are right for each other. alone: the classes in one template, [classes, dim]; default: in the
    first.

    Returns top1 and top5, the fractions of images whose class is among the first 1 and 5, where a class that ties goes
    before the right one; mean_per_class, top1 averaged over the classes that occur in labels; classes, templates and n,
    the counts; chance; majority, the top1 of always answering the most frequent class; and one_template, top1 and top5
    with the one template, None where there is no other. Raises ValueError for features that are not finite.
    """
    if not (image.isfinite().all() and classes.isfinite().all()):
        raise ValueError("a feature is not finite")
    number = {name: i for i, name in enumerate(names or ())}
    same = torch.tensor([number[name] for name in names]) if names else torch.arange(len(classes))
    ranks = _ranks(image, classes.double().mean(dim=1), labels, same)
    counts = torch.bincount(labels, minlength=len(classes))
    hits = torch.bincount(labels[ranks < 1], minlength=len(classes))
    seen = counts > 0
    other = alone is not None or classes.shape[1] > 1
    one = _top(_ranks(image, classes[:, 0] if alone is None else alone, labels, same)) if other else None
    return _top(ranks) | {
        "mean_per_class": (hits[seen].double() / counts[seen]).mean().item(),
        "classes": len(classes),
        "templates": classes.shape[1],
        "n": len(image),
        "chance": (torch.bincount(same)[same[labels]].double().mean() / len(classes)).item(),
        "majority": torch.bincount(same[labels]).double().max().item() / len(labels),
        "one_template": one,
    }


def _ranks(image: Tensor, weights: Tensor, labels: Tensor, same: Tensor) -> Tensor:
    """How many wrong classes are as near to each image as its own, or nearer: int64 [n]. same: int64 [classes], equal
    for classes that are right for each other.

    A tie is what the rounding of float64 cannot tell apart, so that equal weights tie wherever they stand in the
    product.
    """
    weights = F.normalize(weights.double(), dim=1)
    rounding = 4 * weights.shape[1] * 2**-53
    ranks = []
    for some, own in zip(image.split(_CHUNK), labels.split(_CHUNK), strict=True):
        scores = some.double() @ weights.T
        ahead = scores >= scores.gather(1, own.unsqueeze(1)) - rounding
        ranks.append((ahead & (same != same[own].unsqueeze(1))).sum(dim=1))
    return torch.cat(ranks)


def _top(ranks: Tensor) -> dict[str, float]:
    return {f"top{k}": (ranks < k).double().mean().item() for k in (1, 5)}
