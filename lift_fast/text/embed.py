"""Captions of a data set -> a text cache, shard by shard. What is already written is not computed again."""

from pathlib import Path

from tqdm import tqdm

from ..cache import Cache, CacheWriter, encode_int8, key_hash
from ..data.shards import Shards
from .encoder import Encoder


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
    missing shard. Raises DataError for a missing caption (before anything is written) and CacheError when the
    cache cannot be written.
    """
    captions = [data.caption(sample, field) for sample in range(len(data))]
    source = [{"name": path.name, "samples": size} for path, size in zip(data.paths, data.shard_sizes, strict=True)]
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
    return Cache(out)
