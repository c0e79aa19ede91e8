"""LIFT's text side in training: row numbers -> a frozen encoder's vectors, as codes, from the caches."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..cache import Cache
from ..data.samples import Collection
from ..errors import CacheMismatch
from ..ops.rows.quantized import QuantizedRows


class CachedText:
    """One cache for each set of a Collection, read by the collection's row numbers.

    len, dim: as of one cache. encoder, field, rotation: what the caches' manifests say.

    Raises CacheMismatch when a cache belongs to other data, when the caches differ in encoder, caption field, codec
    or rotation, or when their dim is not `text_dim`.
    """

    def __init__(self, caches: Sequence[Cache], data: Collection, text_dim: int | None = None):
        self.caches, self.starts, self._len = list(caches), data.starts, len(data)
        for cache, shards in zip(self.caches, data.sets, strict=True):
            cache.check_keys(shards)
        first = self.caches[0]
        self.dim, self.rotation = first.dim, first.rotation
        self.encoder, self.field = first.manifest.encoder, first.manifest.field
        for cache in self.caches[1:]:
            if cache.manifest.identity != first.manifest.identity:
                kinds = [(m.encoder, m.field, m.codec, m.rotation) for m in (cache.manifest, first.manifest)]
                raise CacheMismatch(
                    f"{cache.folder} and {first.folder} differ in encoder, caption field, codec or rotation "
                    f"({kinds[0]} and {kinds[1]}); embed both with the same settings"
                )
        if text_dim is not None:
            first.check_dim(text_dim, "the head (--text-dim)")

    def __len__(self) -> int:
        return self._len

    def rows(self, rows: Tensor) -> QuantizedRows:
        """rows int64 [batch] on the CPU, any order -> their text in that order, on the CPU."""
        if len(self.caches) == 1:
            return self.caches[0].rows(rows)
        numbers = rows.numpy()
        owners = np.searchsorted(self.starts, numbers, side="right") - 1
        order = np.argsort(owners, kind="stable")
        present, firsts = np.unique(owners[order], return_index=True)
        parts = [
            self.caches[owner].rows(numbers[places] - self.starts[owner])
            for owner, places in zip(present.tolist(), np.split(order, firsts[1:]), strict=True)
        ]
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        return QuantizedRows.cat(parts)[torch.from_numpy(back)]
