"""Retrieval both ways: how often the positive caption of an image (or image of a caption) is among the first k."""

from typing import Any

import torch
from torch import Tensor

KS = (1, 5, 10)


def ranks(similarity: Tensor) -> Tensor:
    """The rank of each query's positive, int64 [queries]; 0 is the best.

    similarity [queries, items], where item i is the positive of query i. Every item that ties with the positive ranks
    before it, so that features that have collapsed to one point score nothing.
    """
    positive = similarity.diagonal().unsqueeze(1)
    return (similarity >= positive).sum(dim=1) - 1


def recalls(similarity: Tensor) -> dict[str, float]:
    """Recall at k, {"r1": …, "r5": …, "r10": …}: the fraction of queries (rows) whose positive is among the first k."""
    rank = ranks(similarity)
    return {f"r{k}": (rank < k).float().mean().item() for k in KS}


def retrieval(image: Tensor, text: Tensor) -> dict[str, Any]:
    """Recall from image to text and from text to image: {"i2t": recalls, "t2i": recalls, "n": n}.

    image, text [n, dim], of unit length; text i is the caption of image i. Chance of r1 is 1/n.

    Raises ValueError when a similarity is not finite.
    """
    similarity = image.float() @ text.float().T
    if not torch.isfinite(similarity).all():
        raise ValueError("retrieval got features that are not finite")
    return {"i2t": recalls(similarity), "t2i": recalls(similarity.T), "n": len(image)}
