"""Captions of a data set -> a text cache, shard by shard. What is already written is not computed again."""

import json
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path

from tqdm import tqdm

from ..cache import Cache, CacheWriter, encode_int8, key_hash
from ..data.shards import Shards
from .encoder import Encoder
from .spec import check_batch_size


def embed(
    data: Shards,
    out: Path,
    encoder: Encoder,
    *,
    field: str = "txt",
    batch_size: int = 64,
    progress: bool = True,
) -> Cache:
    """Embeds every caption of `data` once and writes the cache at `out`; returns it opened.

    Cache shard k holds the captions of data shard k in its order. A run that was killed goes on at the first
    missing shard. Raises ConfigError for a batch_size below 1 and DataError for a missing caption (both before
    anything is written), CacheMismatch when `out` was made from other keys or captions, and CacheError when the
    cache cannot be written.
    """
    check_batch_size(batch_size)
    captions = [data.caption(sample, field) for sample in range(len(data))]
    source, start = [], 0
    for path, size in zip(data.paths, data.shard_sizes, strict=True):
        source.append({"name": path.name, "samples": size, "captions": _digest(captions[start : start + size])})
        start += size
    writer = CacheWriter(out, encoder.dim, "int8", encoder.spec.as_dict(), source, field)
    missing = set(writer.missing())
    start = 0
    with tqdm(total=len(data), unit="caption", desc=f"embed {field}", disable=not progress) as bar:
        for shard, size in enumerate(data.shard_sizes):
            if shard not in missing:
                bar.update(size)
            else:
                vectors = encoder.encode(captions[start : start + size], batch_size, bar.update)
                keys = [key_hash(key) for key in data.keys[start : start + size]]
                writer.write_shard(shard, encode_int8(vectors), keys)
            start += size
    writer.finish()
    cache = Cache(out)
    cache.check_keys(data)  # a cache that was there already may come from other samples
    return cache


def _digest(captions: Sequence[str]) -> str:
    """128 bits that tell a shard's captions from others, in hex."""
    return blake2b(json.dumps(captions).encode(), digest_size=16).hexdigest()
