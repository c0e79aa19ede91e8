"""Retrieval both ways: how often the positive caption of an image (or image of a caption) is among the first k."""

from collections import Counter
from collections.abc import Sequence
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


def retrieval(image: Tensor, text: Tensor, caption_of: Sequence[int] | None = None) -> dict[str, Any]:
    """Recall from image to text and from text to image: {"i2t": recalls, "t2i": recalls, "n": n, "repeats", "ceiling"}.

    image [n, dim], text [distinct, dim], of unit length. caption_of [n]: which row of text is the caption of each
    image; by default text i of image i. Chance of r1 is 1/n.

    An image whose caption another one has, too, competes with it: repeats is the number of captions that an earlier
    image has, and ceiling the recalls of a perfect model, which cannot be 1 then (`ceilings`).

    Raises ValueError when a similarity is not finite.
    """
    similarity = image.float() @ text.float().T
    if not torch.isfinite(similarity).all():
        raise ValueError("retrieval got features that are not finite")
    if caption_of is not None:
        similarity = similarity[:, list(caption_of)]  # equal captions tie to the bit
    numbers = range(len(image)) if caption_of is None else caption_of
    return {
        "i2t": recalls(similarity),
        "t2i": recalls(similarity.T),
        "n": len(image),
        "repeats": len(numbers) - len(set(numbers)),
        "ceiling": ceilings(numbers),
    }


def ceilings(caption_of: Sequence[int]) -> dict[str, dict[str, float]]:
    """The largest recalls that a model can have, {"i2t": recalls, "t2i": recalls}, where captions repeat.

    caption_of [n]: a number for the caption of each image, the same for equal captions. Of the g images of one caption:
    from image to text the positive ties with g - 1 others, which rank before it, so it is among the first k for all g
    images if g <= k and for none otherwise; from text to image g equal queries have one ranking, in which the positives
    of at most k of them are among the first k.
    """
    sizes = Counter(caption_of).values()
    n = len(caption_of)
    return {
        "i2t": {f"r{k}": sum(g for g in sizes if g <= k) / n for k in KS},
        "t2i": {f"r{k}": sum(min(g, k) for g in sizes) / n for k in KS},
    }
