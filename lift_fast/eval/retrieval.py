"""Retrieval both ways: how often a right caption of an image, and a right image of a caption, is among the first k.

As CLIP's evaluations ask it (Radford et al., 2021, arXiv:2103.00020), but right answers are sets: equal captions are
right for the same images.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

KS = (1, 5, 10)
_TILE = 1024  # images, and texts, whose scores are held at once: 4 MiB, which stay in the caches of a CPU
_USUAL = 20  # norms from 2^-20 to 2^20 are left as they are
_RESCORED = 64  # answers whose scores are computed again at once; where features have collapsed, these suffice

Ranks = tuple[Tensor, Tensor]  # of the images, of the captions: see ranks


def retrieval(
    image: Tensor,
    text: Tensor,
    image_of: Sequence[int] | Tensor,
    text_of: Sequence[int] | Tensor | None = None,
    found: Ranks | None = None,
) -> dict[str, Any]:
    """Recall at 1, 5 and 10 from image to text and from text to image.

    image, text, image_of, text_of: as of `ranks`. found: what ranks returned for them, where it is known.

    Returns
        i2t, t2i  recall at k, {"r1": …, "r5": …, "r10": …}: the fraction of queries of which a right answer is among
                  the first k. The queries are the images that have a caption, and all captions.
        n         the number of images that have a caption
        captions  the number of captions
        repeats   how many captions are equal to an earlier one
        chance    {"i2t": …, "t2i": …}, the recalls of a random order

    Raises ValueError as ranks.
    """
    ranks_of_images, ranks_of_captions = ranks(image, text, image_of, text_of) if found is None else found
    owners, rows = _captions(image_of, text_of, image.device)
    pairs = _right_pairs(owners, rows, len(text))
    weights = torch.bincount(rows, minlength=len(text))
    own, row = pairs // len(text), pairs % len(text)
    right_captions = torch.zeros(len(image), dtype=torch.int64, device=image.device).index_add_(0, own, weights[row])
    right_images = torch.bincount(row, minlength=len(text))[rows]
    return {
        "i2t": _recalls(ranks_of_images[ranks_of_images >= 0]),
        "t2i": _recalls(ranks_of_captions),
        "n": int((right_captions > 0).sum()),
        "captions": len(rows),
        "repeats": len(rows) - int((weights > 0).sum()),
        "chance": {
            "i2t": _chance(right_captions[right_captions > 0], len(rows)),
            "t2i": _chance(right_images, len(image)),
        },
    }


@torch.no_grad()
def ranks(
    image: Tensor,
    text: Tensor,
    image_of: Sequence[int] | Tensor,
    text_of: Sequence[int] | Tensor | None = None,
) -> Ranks:
    """The rank of each query's best right answer: int64 [n] of the images, -1 for an image without caption, and int64
    [captions] of the captions; 0 is the best.

    image [n, dim], text [texts, dim]: features of any float dtype, computed with as float32, of unit length or not, on
    one device. The score of an image and a caption is the product of their features. image_of, int64 [captions]: the
    row of image that each caption belongs to. text_of, int64 [captions]: its row of text, the same for equal captions;
    default: caption i is row i.

    Right answers are sets: for an image its captions, and all that are equal to one of them; for a caption its image,
    and all that have an equal caption. A rank is the number of wrong answers that score at least as much as the best
    right one: ties go against the model, so that features that have collapsed to one point rank last. Every caption is
    a query and an answer, equal ones as often as they occur; every image is an answer.

    Ranks below 10 are exact: scores that float32 cannot tell apart are compared in float64, where only those that
    differ by less than its rounding tie. Of ranks from 10 on, answers that float32 cannot tell from the best right one
    count as wrong ones ahead. Memory: the features, and a few tiles of _TILE x _TILE scores; one product of the
    features gives the scores of both directions.

    Raises ValueError when a feature is not finite, and when there are no captions.
    """
    owners, rows = _captions(image_of, text_of, image.device)
    if not len(rows):
        raise ValueError("retrieval got no captions")
    pairs = _right_pairs(owners, rows, len(text))
    images, texts = _Side(image), _Side(text)
    _set_best(images, texts, pairs)
    # Of a tile's sums, which float32 counts exactly below 2^24 captions.
    weights = torch.bincount(rows, minlength=len(text)).float()
    ones = weights.new_ones(_TILE)
    space, spare = weights.new_empty(_TILE * _TILE), weights.new_empty(_TILE * _TILE)
    right = _by_tile(pairs, len(image), len(text))
    with _exact_float32():
        for top in range(0, len(image), _TILE):
            x = images.block(top)
            for left in range(0, len(text), _TILE):
                y = texts.block(left)
                shape = len(x), len(y)
                scores = space[: math.prod(shape)].view(shape)
                ahead = spare[: math.prod(shape)].view(shape)
                torch.mm(x, y.T, out=scores)
                scores[next(right)] = -torch.inf
                _count(images, top, texts, left, scores, weights[left : left + _TILE], ahead)
                _count(texts, left, images, top, scores.T, ones[: len(x)], ahead.T)
    return torch.where(torch.bincount(owners, minlength=len(image)) > 0, images.ranks(), -1), texts.ranks()[rows]


class _Side:
    """The features of one side, images or texts, and what is known of the rank of each as a query."""

    def __init__(self, features: Tensor):
        self.features = features.float()
        self.norms = torch.cat([part.double().norm(dim=1) for part in self.features.split(_TILE)])
        if not self.norms.isfinite().all():
            raise ValueError("retrieval got features that are not finite")
        # A power of 2 that brings an extreme norm near 1, so that no product overflows.
        _, exponent = math.frexp(self.norms.max().item())
        self.scale = 1.0 if abs(exponent) < _USUAL else 2.0 ** -max(-126, min(exponent, 126))
        n, device = len(features), features.device
        self.least = torch.empty(n, dtype=torch.float64, device=device)  # of the score of the best right answer
        self.low = torch.empty(n, device=device)  # a scaled float32 score below is certainly less than that
        self.high = torch.empty(n, device=device)  # one from here on is certainly more
        self.counted = torch.zeros(n, dtype=torch.int64, device=device)  # answers that are ahead of the best right one
        self.most = torch.zeros(n, dtype=torch.int64, device=device)  # those, and all that are not certainly behind it

    def block(self, start: int) -> Tensor:
        """The scaled features of a tile."""
        features = self.features[start : start + _TILE]
        return features if self.scale == 1 else features * self.scale

    def set_best(self, own: Tensor, scores: Tensor, errors: Tensor, other: "_Side") -> None:
        """Sets what the right answers decide. own: the query of each right pair; scores, errors: float64 [pairs]."""
        self.least = _most(own, scores - errors, self.norms)
        dim, scale = self.features.shape[1], self.scale * other.scale
        # As in _error, with the largest norm; low and high are rounded to float32, and what is too small for a float32
        # may be lost.
        error = 1.01 * (dim + 2) * 2.0**-24 * self.norms * other.norms.max() * scale + dim * 2.0**-110
        best = _most(own, scores, self.norms) * scale
        self.low, self.high = (best - error).float(), (best + error).float()

    def ranks(self) -> Tensor:
        """int64 [n]. Where fewer than KS[-1] are counted, every answer between low and high was compared."""
        return torch.where(self.counted < KS[-1], self.counted, self.most)


def _captions(
    image_of: Sequence[int] | Tensor, text_of: Sequence[int] | Tensor | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    owners = torch.as_tensor(image_of, dtype=torch.int64, device=device)
    rows = torch.arange(len(owners), device=device) if text_of is None else torch.as_tensor(text_of).to(owners)
    return owners, rows


def _right_pairs(owners: Tensor, rows: Tensor, texts: int) -> Tensor:
    """The pairs of an image and a text that are right, each once, ascending: image * texts + text, int64."""
    return torch.unique(owners * texts + rows)


def _set_best(images: _Side, texts: _Side, pairs: Tensor) -> None:
    """Scores the right pairs in float64."""
    own, row = pairs // len(texts.norms), pairs % len(texts.norms)
    both = zip(own.split(_TILE), row.split(_TILE), strict=True)
    scores = torch.cat([(images.features[i].double() * texts.features[t].double()).sum(dim=1) for i, t in both])
    errors = _error(images, own, texts, row)
    images.set_best(own, scores, errors, texts)
    texts.set_best(row, scores, errors, images)


def _error(some: _Side, own: Tensor, others: _Side, rows: Tensor) -> Tensor:
    """By how much a float64 score may be off at most, float64 as own and rows broadcast.

    A sum of dim products, in any order, is off by dim roundings of the product of the norms (Higham, Accuracy and
    Stability of Numerical Algorithms, section 3.1).
    """
    return 1.01 * (some.features.shape[1] + 2) * 2.0**-53 * some.norms[own] * others.norms[rows]


def _most(own: Tensor, values: Tensor, like: Tensor) -> Tensor:
    """The largest of the values of each query, as like; inf for a query without any, so that nothing is ahead."""
    most = torch.full_like(like, -torch.inf).scatter_reduce_(0, own, values, "amax")
    return most.masked_fill(most == -torch.inf, torch.inf)


def _by_tile(pairs: Tensor, images: int, texts: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The right pairs of each tile, as positions in it; tiles of the first images come first."""
    own, row = pairs // texts, pairs % texts
    across = -(-texts // _TILE)
    tile = own // _TILE * across + row // _TILE
    order = tile.argsort()
    sizes = torch.bincount(tile, minlength=-(-images // _TILE) * across).tolist()
    yield from zip((own[order] % _TILE).split(sizes), (row[order] % _TILE).split(sizes), strict=True)


def _count(
    queries: _Side, first: int, answers: _Side, start: int, scores: Tensor, weights: Tensor, ahead: Tensor
) -> None:
    """Counts the answers of a tile that are ahead of each query's best right one.

    scores, float32 [some queries, some answers], of the queries from `first` and the answers from `start` on; right
    ones are -inf. weights, float32: how often each answer occurs. ahead: memory as of scores.
    """
    some = slice(first, first + len(scores))
    low, high, counted = queries.low[some, None], queries.high[some, None], queries.counted[some]
    possible = torch.mv(torch.ge(scores, low, out=ahead), weights).long()
    queries.most[some] += possible
    # Few queries: of a trained model most have no answer ahead in a tile, of another one most are at 10 soon.
    asked = ((possible > 0) & (counted < KS[-1])).nonzero().flatten()
    if not len(asked):
        return
    found = scores[asked]
    certain = found >= high[asked]
    counted[asked] += torch.mv(certain.float(), weights).long()
    near = (found >= low[asked]) & ~certain
    left = (near.any(dim=1) & (counted[asked] < KS[-1])).nonzero().flatten()
    unclear, near = asked[left], near[left]
    for columns in near.any(dim=0).nonzero().flatten().split(_RESCORED):
        own, rows = unclear + first, columns + start
        exact = queries.features[own].double() @ answers.features[rows].double().T
        exact += _error(queries, own[:, None], answers, rows)
        tied = (exact >= queries.least[own, None]) & near[:, columns]
        counted[unclear] += (tied.double() @ weights[columns].double()).long()
        left = (counted[unclear] < KS[-1]).nonzero().flatten()
        unclear, near = unclear[left], near[left]
        if not len(unclear):
            return


def _recalls(found: Tensor) -> dict[str, float]:
    return {f"r{k}": int((found < k).sum()) / len(found) for k in KS}


def _chance(right: Tensor, answers: int) -> dict[str, float]:
    """The recalls of a random order of all answers, for queries of which each has so many right ones: int64 [queries].

    All of the first k are wrong with probability C(answers - right, k) / C(answers, k).
    """
    wrong, missed, found = answers - right, right.new_ones(len(right), dtype=torch.float64), {}
    for j in range(KS[-1]):
        missed = missed * (wrong - j).clamp(min=0) / max(1, answers - j)
        found[j + 1] = 1 - missed.mean().item()
    return {f"r{k}": found[k] for k in KS}


@contextmanager
def _exact_float32() -> Iterator[None]:
    """Turns settings off by which float32 products are computed with TF32 or bfloat16. They are the process's."""
    backends = (torch.backends.cuda, torch.backends.mkldnn)
    products: list[Any] = [backend.matmul for backend in backends if hasattr(backend, "matmul")]
    before = {matmul: matmul.fp32_precision for matmul in products if hasattr(matmul, "fp32_precision")}
    inexact = {matmul: precision for matmul, precision in before.items() if precision in ("tf32", "bf16")}
    legacy = None if before else torch.get_float32_matmul_precision()  # before torch 2.9
    try:
        for matmul in inexact:
            matmul.fp32_precision = "ieee"
        if legacy:
            torch.set_float32_matmul_precision("highest")
        yield
    finally:
        for matmul, precision in inexact.items():
            matmul.fp32_precision = precision
        if legacy:
            torch.set_float32_matmul_precision(legacy)
