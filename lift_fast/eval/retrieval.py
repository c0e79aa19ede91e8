"""Retrieval both ways: how often the right caption (or picture) is among the first k."""

import torch
from torch import Tensor

KS = (1, 5, 10)


def ranks(similarity: Tensor) -> Tensor:
    """similarity [queries, items], item i right for query i -> rank of the right one, int64 [queries], 0 the best.

    Ties count against the model, so features that have collapsed score nothing.
    """
    right = similarity.diagonal().unsqueeze(1)
    return (similarity >= right).sum(dim=1) - 1


def recalls(similarity: Tensor) -> dict[str, float]:
    """{"r1": …, "r5": …, "r10": …}: parts of the queries (rows) whose right item ranks among the first k."""
    rank = ranks(similarity)
    return {f"r{k}": (rank < k).float().mean().item() for k in KS}


def retrieval(image: Tensor, text: Tensor) -> dict:
    """image, text [n, dim], of unit length -> {"i2t": recalls, "t2i": recalls, "n": n}. Chance of r1 is 1/n.

    Raises ValueError when a feature is not finite.
    """
    similarity = image.float() @ text.float().T
    if not torch.isfinite(similarity).all():
        raise ValueError("retrieval got features that are not finite")
    return {"i2t": recalls(similarity), "t2i": recalls(similarity.T), "n": len(image)}
