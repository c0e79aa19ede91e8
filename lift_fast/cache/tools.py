"""What is done with whole caches: looked at, checked, recoded, joined."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from ..errors import CacheError, CacheMismatch, ConfigError
from ..ops.rows.codecs import CODECS, codec_named
from ..ops.rows.quantized import QuantizedRows
from .codec import encode
from .manifest import MANIFEST, Manifest
from .reader import Cache
from .rotation import Rotation
from .shard import check_content
from .writer import CacheWriter

BLOCK = 1 << 20  # float32 numbers that are recoded at a time: what stays near the core


def info(cache: Cache) -> dict[str, Any]:
    """What a cache is, JSON-able; reads nothing but the manifest and the sizes of the files.

    bits_per_row: codes, scale and key hash. bytes: of the files; `missing` are the shards that are not there.
    """
    manifest = cache.manifest
    codec = CODECS[manifest.codec]
    paths = [cache.folder / shard.name for shard in manifest.shards]
    present = [path for path in (*paths, cache.folder / MANIFEST) if path.exists()]
    return {
        "rows": len(cache),
        "dim": cache.dim,
        "codec": manifest.codec,
        "bits_per_number": codec.bits,
        "bits_per_row": 8 * codec.row_bytes(cache.dim) + (32 if codec.scaled else 0) + 64,
        "bytes": sum(path.stat().st_size for path in present),
        "shards": len(paths),
        "missing": [path.name for path in paths if not path.exists()],
        "rotation": manifest.rotation,
        "field": manifest.field,
        "encoder": manifest.encoder,
        "format": manifest.format,
        "identity": manifest.identity,
    }


def sample(cache: Cache, rows: int = 8, seed: int = 0) -> dict[str, Any]:
    """Some rows of a cache for a look at them, JSON-able, and the mean cosine among their vectors.

    An encoder that gives every caption nearly the same vector shows as a mean cosine near 1. rows: at most, drawn
    without repeats. Raises ConfigError for rows below 1, CacheError for a cache without rows and a damaged shard.
    """
    if rows < 1:
        raise ConfigError(f"rows must be at least 1, not {rows}")
    if not len(cache):
        raise CacheError(f"{cache.folder} holds no rows")
    chosen = np.sort(np.random.default_rng(seed).choice(len(cache), min(rows, len(cache)), replace=False))
    vectors = cache.vectors(chosen)
    starts = np.cumsum([0, *(shard.rows for shard in cache.manifest.shards)])
    listed = []
    for row, vector in zip(chosen.tolist(), vectors, strict=True):
        number = int(np.searchsorted(starts, row, side="right")) - 1
        inside = row - int(starts[number])
        key = int(cache.shard(number).keys[inside])
        listed.append(
            {
                "row": row,
                "shard": number,
                "row_of_shard": inside,
                "source": cache.manifest.shards[number].source,
                "key_hash": f"{key & (1 << 64) - 1:016x}",
                "length": vector.double().norm().item(),
                "first": vector[:6].tolist(),
            }
        )
    return {"rows": listed, "mean_cosine": _mean_cosine(vectors)}


def convert(source: Cache, out: Path, codec: str, progress: bool = True) -> None:
    """Writes the vectors of a cache with another codec, through float32 in the encoder's space; goes on where a run
    before it stopped. A rotation is the source's, or of seed 0. What the source lost stays lost: errors add up.

    Raises ConfigError for the codec that it has already, CacheError for one that is none, a damaged source or a
    full disk, CacheMismatch when `out` is another cache.
    """
    manifest, kind = source.manifest, codec_named(codec)
    if codec == manifest.codec:
        raise ConfigError(f"{source.folder} holds {codec} already; copy the folder")
    rotation = (source.rotation or Rotation(source.dim)) if kind.rotated else None
    writer = CacheWriter(out, source.dim, codec, manifest.encoder, _sources(manifest), manifest.field, rotation)
    starts = np.cumsum([0, *(shard.rows for shard in manifest.shards)])
    step = max(1, BLOCK // source.dim)
    for number in _counted(writer.missing(), [shard.rows for shard in manifest.shards], f"to {codec}", progress):
        _, keys = _checked(source, number)
        rows = torch.arange(starts[number], starts[number + 1])
        parts = [encode(source.vectors(part), codec, rotation) for part in rows.split(step)]
        writer.write_shard(number, QuantizedRows.cat(parts), keys)
    writer.finish()


def merge(sources: Sequence[Cache], out: Path, progress: bool = True) -> None:
    """Writes caches of one kind one after the other as one; goes on where a run before it stopped. Codes are copied.

    Raises ConfigError for less than two, CacheMismatch when they differ in encoder, codec, dim, rotation or caption
    field, or when `out` is another cache, CacheError for a damaged source or a full disk.
    """
    if len(sources) < 2:
        raise ConfigError("merge takes at least two caches and the folder of a new one")
    first = sources[0]
    kind = replace(first.manifest, shards=())
    for other in sources[1:]:
        differences = kind.differences(replace(other.manifest, shards=()))
        if differences:
            raise CacheMismatch(
                f"{other.folder} (there) and {first.folder} (here) cannot be one cache: {'; '.join(differences)}"
            )
    parts = [(cache, number) for cache in sources for number in range(len(cache.manifest.shards))]
    listed = [entry for cache in sources for entry in _sources(cache.manifest)]
    writer = CacheWriter(out, first.dim, kind.codec, kind.encoder, listed, kind.field, kind.rotated_by())
    for to in _counted(writer.missing(), [entry["samples"] for entry in listed], "merge", progress):
        cache, number = parts[to]
        writer.write_shard(to, *_checked(cache, number))
    writer.finish()


def _sources(manifest: Manifest) -> list[dict[str, Any]]:
    """The data shards of a cache, as CacheWriter takes them."""
    return [{"name": shard.source, "samples": shard.rows, "captions": shard.captions} for shard in manifest.shards]


def _checked(cache: Cache, number: int) -> tuple[QuantizedRows, list[int]]:
    """A whole shard and its key hashes, its checksum compared: damage must not get a checksum of its own."""
    check_content(cache.manifest, number, cache.folder / cache.manifest.shards[number].name)
    shard = cache.shard(number)
    return QuantizedRows(shard.codes, shard.scales, cache.manifest.codec, cache.dim), shard.keys.tolist()


def _counted(numbers: Sequence[int], rows: Sequence[int], what: str, progress: bool) -> Iterator[int]:
    """These shards with a bar that counts their rows; those that are done already count from the start."""
    total = sum(rows)
    done = total - sum(rows[number] for number in numbers)
    with tqdm(total=total, initial=done, unit="row", desc=what, disable=not progress) as bar:
        for number in numbers:
            yield number
            bar.update(rows[number])


def _mean_cosine(vectors: Tensor) -> float | None:
    """The mean over all pairs, None without a pair."""
    n = len(vectors)
    if n < 2:
        return None
    unit = F.normalize(vectors.double(), dim=1)
    total = unit.sum(dim=0)
    return ((total @ total - (unit * unit).sum()) / (n * (n - 1))).item()
