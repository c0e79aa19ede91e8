"""LIFT's text side in training: reads a frozen encoder's vectors from text caches, as codes, by row number."""

import shlex
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..cache import Cache
from ..data.samples import BadText, Collection
from ..errors import CacheMismatch
from ..ops.rows.quantized import QuantizedRows
from ..ops.rows.table import row_numbers
from .skipped import reasons


class CachedText:
    """The text caches of a Collection, one for each of its data sets, read as one by the collection's row numbers.

    len(text): rows of all caches. dim: length of a vector. encoder, field, rotation, conditioning: those of the caches.
    left_out: row number -> error, for the samples that the caches have no vector of. not_compared: shards whose
    captions could not be compared, because their cache has no digest of them.

    Raises CacheMismatch when a cache was made from other keys or captions, when the caches differ in encoder, caption
    field, codec, rotation or conditioning, or when their dim is not `text_dim`; CacheError when the file of the
    conditioning is missing or damaged.
    """

    def __init__(self, caches: Sequence[Cache], data: Collection, text_dim: int | None = None):
        self.caches, self.starts, self._len = list(caches), data.starts, len(data)
        self.not_compared = 0
        for cache, samples in zip(self.caches, data.sets, strict=True):
            self.not_compared += cache.check_data(samples, progress=True).unknown
        first = self.caches[0]
        self.dim, self.rotation = first.dim, first.rotation
        self.encoder, self.field = first.manifest.encoder, first.manifest.field
        for cache in self.caches[1:]:
            settings = [(m.encoder, m.field, m.codec, m.rotation) for m in (cache.manifest, first.manifest)]
            if settings[0] != settings[1]:
                raise CacheMismatch(
                    f"{cache.folder} and {first.folder} differ in encoder, caption field, codec or rotation "
                    f"({settings[0]} and {settings[1]}); embed both with the same settings"
                )
            if cache.manifest.conditioning != first.manifest.conditioning:
                raise CacheMismatch(_other_conditioning(first, cache))
        self.conditioning = first.conditioning
        if text_dim is not None:
            first.check_dim(text_dim, "the head (--text-dim)")
        self.left_out = _left_out(self.caches, data)

    def __len__(self) -> int:
        return self._len

    def rows(self, rows: Tensor) -> QuantizedRows:
        """The text of rows (int64 [batch] on the CPU, in any order), in that order, on the CPU.

        Raises IndexError and CacheError as `Cache.rows`.
        """
        if len(self.caches) == 1:
            return self.caches[0].rows(rows)
        numbers = row_numbers(rows).numpy()
        cache_of = np.searchsorted(self.starts, numbers, side="right") - 1
        order = np.argsort(cache_of, kind="stable")  # positions in `rows`, sorted by cache
        used, firsts = np.unique(cache_of[order], return_index=True)
        parts = [
            self.caches[number].rows(numbers[positions] - self.starts[number])
            for number, positions in zip(used.tolist(), np.split(order, firsts[1:]), strict=True)
        ]
        inverse = np.empty_like(order)
        inverse[order] = np.arange(len(order))
        return QuantizedRows.cat(parts)[torch.from_numpy(inverse)]

    def check_unchanged(self) -> None:
        """Raises CacheError when rows may have been wrong, as `Cache.check_unchanged`."""
        for cache in self.caches:
            cache.check_unchanged()


def _other_conditioning(first: Cache, other: Cache) -> str:
    """What to say of two caches whose conditioning differs, and how to make it one."""
    kept, changed = (other, first) if first.manifest.conditioning is None else (first, other)
    like, source = (shlex.quote(str(cache.folder)) for cache in (kept, changed))
    if changed.manifest.conditioning is None:
        how = f"make them alike: lift-fast cache condition {source} OUT --like {like}"
    else:
        how = (
            f"condition the cache that {source} was made from: lift-fast cache condition CACHE OUT --like {like}; or "
            f"embed again: lift-fast embed --data DATA --out OUT --condition {like}"
        )
    one, two = (
        "none" if entry is None else f"power {entry['power']:g}, {cache.dim} axes"
        for cache, entry in ((cache, cache.manifest.conditioning) for cache in (other, first))
    )
    found = f"{one}; {two}" if one != two else f"both {one}, fitted to other captions"
    return f"{other.folder} and {first.folder} differ in conditioning ({found}); {how}"


def _left_out(caches: Sequence[Cache], data: Collection) -> dict[int, BadText]:
    """Row number -> error, for the rows without a vector. Raises DataError, CacheError."""
    found: dict[int, BadText] = {}
    for cache, samples, start in zip(caches, data.sets, data.starts.tolist(), strict=False):
        first, encoder = 0, str(cache.manifest.encoder.get("name", "the encoder"))
        for number, shard in enumerate(cache.manifest.shards):
            rows = cache.skipped(number).tolist()
            for row, error in reasons(samples, cache.manifest.field, encoder, number, first, rows).items():
                found[start + first + row] = error
            first += shard.rows
    return found
