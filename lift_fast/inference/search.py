"""Exact search of image features: the images of a data set that fit a text or another image best."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..data.options import DataOptions
from ..data.samples import Samples
from ..errors import ConfigError
from ..ops.rows.quantized import QuantizedRows
from .features import how_read, open_images
from .model import Model
from .store import Store, build, model_identity

_CHUNK = 1 << 22  # bytes of codes at a time, to stay in the caches of the CPU
_QUERIES = 32  # at a time
_DIGIT = 64  # a query is 128 * high + low, with both from -64 to 64


class Found(NamedTuple):
    """The best features of each query, best first: scores float32 [queries, k], rows int64 [queries, k], the numbers
    of the features in the store."""

    scores: Tensor
    rows: Tensor


def search(store: Store, queries: Tensor, top: int = 10) -> Found:
    """The `top` features with the largest dot products with each query, all of them where there are less; of equal
    ones the first in the store go first.

    store: of codec int8. queries: float [queries, dim]; features of texts or images, on any device. The result is on
    the CPU.

    Exact: every feature is scored. The scores are those of the stored features, whose elements were rounded to 1/127
    of the largest one, so a cosine differs from that of the unrounded features by about 0.0005. First pass: integer
    products with the queries rounded to 14 bits, in chunks that stay in the caches of the CPU; whatever the rounding
    could have kept from the top is scored again in float64.

    For approximate search among more features than that, `lift-fast embed-images --out features.npy` writes what an
    index library takes: faiss.IndexFlatIP(dim).add(numpy.load("features.npy")).

    Raises ConfigError for queries of another shape or that are not finite, and for top below 1.
    """
    if top < 1:
        raise ConfigError(f"top is {top}; it must be at least 1 image")
    if queries.dim() != 2 or queries.shape[1] != store.dim or not queries.is_floating_point():
        raise ConfigError(
            f"queries must be features, float [queries, {store.dim}], not {queries.dtype} {list(queries.shape)}"
        )
    queries = queries.detach().cpu().double()
    if not queries.isfinite().all():
        raise ConfigError("queries must be finite")
    k = min(top, len(store))
    parts = [_search(store, some, k) for some in queries.split(_QUERIES) if len(some)]
    if not parts:
        return Found(torch.empty(0, k), torch.empty(0, k, dtype=torch.int64))
    return Found(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


class Match(NamedTuple):
    """An image that was found. key: of its sample; place: its file, or shard and key; sample: its number in the data
    set; score: the cosine."""

    score: float
    key: str
    place: str
    sample: int


@dataclass(frozen=True)
class ImageIndex:
    """A data set whose images can be searched with a model. data: its samples; store: their features."""

    model: Model
    data: Samples
    store: Store

    def matches(self, query: Tensor, top: int = 10) -> list[Match]:
        """The images that fit a feature best: a text's or an image's, float [dim] or [1, dim]. Raises as `search`."""
        found = search(self.store, query.reshape(1, -1), top)
        return [
            Match(score, self.store.key(row), self._place(sample := self.store.sample(row)), sample)
            for score, row in zip(found.scores[0].tolist(), found.rows[0].tolist(), strict=True)
        ]

    def _place(self, sample: int) -> str:
        return str(self.data.image_file(sample) or self.data.where(sample))


def open_index(
    model: Model,
    data: str | Path,
    *,
    images: str | Path | None = None,
    options: DataOptions | None = None,
    features: str | Path | None = None,
    batch_size: int = 64,
    progress: bool = False,
) -> ImageIndex:
    """The images of a data set, to be searched. Their features are computed where they are not stored yet, or where
    the data has changed since.

    data, images, options: as of data.open.open_data; plain folders of images will do, and bad samples are left out
    (`ImageIndex.store.bad`). features: the folder to keep features in, for any number of models; default: next to the
    data, DATA.features. Each model has a folder of its own in it. batch_size, progress: as of store.build.

    Raises DataError and ConfigError as open_data does; ConfigError when the folder cannot be written.
    """
    samples = open_images(data, images, options)
    identity = model_identity(model, how_read(images, options))
    path = Path(data).resolve()
    folder = Path(features) if features else path.with_name(f"{path.name}.features")
    remedy = "name another folder with --features"
    store = build(model, samples, folder / identity, identity, remedy=remedy, batch_size=batch_size, progress=progress)
    return ImageIndex(model, samples, store)


def _search(store: Store, queries: Tensor, k: int) -> Found:
    """As search, for float64 [queries, dim] on the CPU; k: at most len(store)."""
    planes, steps = _digits(queries)
    # A score's error is at most half a step for each element, times the code, 127 at most, and the row's scale; and a
    # little for float32. Two scores may be off in opposite directions.
    largest = max((float(_scales(part.features).max()) for part in store.parts if len(part)), default=0.0)
    margins = 2 * 64 * store.dim * largest * steps
    best = [torch.empty(0) for _ in queries]  # the k largest scores of each query so far
    floors = torch.full((len(queries),), -torch.inf)  # what is below them is not among the top
    kept: list[list[tuple[Tensor, Tensor]]] = [[] for _ in queries]  # scores and rows above the floor of their time
    for start, chunk in _chunks(store):
        scores = _scores(chunk, planes, steps)
        for q in (scores.amax(dim=0) > floors).nonzero().flatten().tolist():
            column = scores[:, q].contiguous()
            best[q] = torch.cat([best[q], column.topk(min(k, len(column))).values])
            best[q] = best[q].topk(min(k, len(best[q]))).values
            if len(best[q]) == k:
                floors[q] = best[q][-1] - margins[q]
            above = (column >= floors[q]).nonzero().flatten()
            kept[q].append((column[above], above + start))
    found = []
    for query, floor, pairs in zip(queries, floors, kept, strict=True):
        rows = torch.cat([rows[scores >= floor] for scores, rows in pairs] or [torch.empty(0, dtype=torch.int64)])
        exact = _exact_scores(store, rows, query)
        order = exact.sort(descending=True, stable=True).indices[:k]
        found.append(Found(exact[order], rows[order]))
    return Found(torch.stack([one.scores for one in found]), torch.stack([one.rows for one in found]))


def _chunks(store: Store) -> Iterator[tuple[int, QuantizedRows]]:
    """The number of the first feature of each chunk, and its rows."""
    size = max(1, _CHUNK // store.dim)
    for start, part in zip(store.starts, store.parts, strict=False):
        for at in range(0, len(part), size):
            yield start + at, part.features[at : at + size]


def _digits(queries: Tensor) -> tuple[Tensor, Tensor]:
    """int8 [dim, 2 * queries], the high and then the low digits of the queries, and float32 [queries], what 1 of a low
    digit stands for."""
    largest = queries.abs().amax(dim=1)
    steps = torch.where(largest > 0, largest / (128 * _DIGIT), 1.0)
    whole = (queries / steps[:, None]).round()
    high = (whole / 128).round()
    return torch.cat([high, whole - 128 * high]).T.contiguous().to(torch.int8), steps.float()


def _scores(rows: QuantizedRows, planes: Tensor, steps: Tensor) -> Tensor:
    """float32 [rows, queries]: products of codes and digits, scaled."""
    if rows.dim > 1 and _int_mm_is_exact():  # torch 2.13 leaves the result of one column as it finds it
        products = torch._int_mm(rows.codes, planes).float()
    else:
        wide = torch.float32 if rows.dim * 127 * _DIGIT <= 1 << 24 else torch.float64  # which adds integers exactly
        products = (rows.codes.to(wide) @ planes.to(wide)).float()
    high, low = products.chunk(2, dim=1)
    return torch.add(low, high, alpha=128) * steps * _scales(rows)[:, None]


def _scales(rows: QuantizedRows) -> Tensor:
    assert rows.scales is not None  # int8 has them
    return rows.scales


@cache
def _int_mm_is_exact() -> bool:
    """Whether this torch multiplies int8 exactly on this CPU: some instructions of older ones saturate at 16 bits."""
    codes = torch.full((64, 512), 127, dtype=torch.int8)
    planes = torch.full((512, 2), _DIGIT, dtype=torch.int8)
    codes[1::2], planes[:, 1] = -127, -_DIGIT
    try:
        return torch.equal(torch._int_mm(codes, planes).long(), codes.long() @ planes.long())
    except (RuntimeError, AttributeError):
        return False


def _exact_scores(store: Store, rows: Tensor, query: Tensor) -> Tensor:
    """The scores of some features, ascending rows, in float64, rounded to float32 [len(rows)]."""
    size = max(1, _CHUNK // (8 * store.dim))
    out = []
    for start, part in zip(store.starts, store.parts, strict=False):
        inside = rows[(rows >= start) & (rows < start + len(part))] - start
        for some in inside.split(size):
            scales = _scales(part.features)[some].double()
            out.append((part.features.codes[some].double() * query).sum(dim=1) * scales)
    return torch.cat(out).float() if out else torch.empty(0)
