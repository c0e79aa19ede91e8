"""Zero-shot classification: the nearest class name, averaged over prompt templates (arXiv 2103.00020, 3.1.4)."""

import torch
from torch import Tensor
from torch.nn import functional as F

TEMPLATES = ("{}", "a drawing of {}", "an emoji of {}", "a picture that belongs to {}")


def prompts(name: str) -> list[str]:
    """A class name in every template."""
    return [template.format(name.lower().replace("&", "and")) for template in TEMPLATES]


def zero_shot(image: Tensor, classes: Tensor, labels: Tensor) -> dict:
    """image [n, dim]; classes [classes, templates, dim]; labels int64 [n]; features of unit length.

    Returns top1, mean_per_class (recall averaged over the classes that occur), classes, n, chance, and
    majority: what always naming the commonest class would score.
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
