"""Operations on whole caches: describe, sample, convert to another codec, condition, merge."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import CacheError, CacheMismatch, ConfigError
from ..ops.rows.codecs import CODECS, codec_named
from ..ops.rows.quantized import QuantizedRows
from ..progress import bar
from .codec import encode
from .conditioning import CONDITIONING, Conditioning, Statistics, mean_cosine
from .manifest import FORMATS, MANIFEST, Manifest
from .reader import Cache
from .rotation import Rotation
from .shard import read_shard
from .writer import CacheWriter

BLOCK = 1 << 20  # float32 numbers converted at a time: 4 MB, to stay in the caches of the CPU
CONDITIONED = 1 << 22  # and conditioned: a matrix product needs more rows


def info(cache: Cache) -> dict[str, Any]:
    """Describes a cache as a dict of JSON values; reads only the manifest and the sizes of the files.

    bytes_per_row counts codes, scale and key hash. bytes: total size of the files that exist. missing: file names of
    the shards that do not exist. skipped: rows without a vector. read: how the data set was read (Manifest).
    """
    manifest = cache.manifest
    codec = CODECS[manifest.codec]
    paths = [cache.folder / shard.name for shard in manifest.shards]
    present = [path for path in (*paths, cache.folder / MANIFEST, cache.folder / CONDITIONING) if path.exists()]
    return {
        "rows": len(cache),
        "skipped": manifest.skipped,
        "dim": cache.dim,
        "codec": manifest.codec,
        "bits_per_number": codec.bits,
        "bytes_per_row": codec.row_bytes(cache.dim) + (4 if codec.scaled else 0) + 8,
        "bytes": sum(path.stat().st_size for path in present),
        "shards": len(paths),
        "missing": [path.name for path in paths if not path.exists()],
        "rotation": manifest.rotation,
        "conditioning": manifest.conditioning,
        "field": manifest.field,
        "encoder": manifest.encoder,
        "read": manifest.read,
        "format": manifest.format,
        "identity": manifest.identity,
    }


def sample(cache: Cache, rows: int = 8, seed: int = 0) -> dict[str, Any]:
    """Draws rows of a cache to inspect, and the mean cosine over pairs of them, as a dict of JSON values.

    A mean cosine near 1 shows an encoder that gives all captions nearly the same vector; rows without a vector are not
    counted. rows: how many at most, drawn without repeats. Raises ConfigError for rows below 1, CacheError for a cache
    without rows and for a damaged shard.
    """
    if rows < 1:
        raise ConfigError(f"rows must be at least 1, not {rows}")
    if not len(cache):
        raise CacheError(f"{cache.folder} holds no rows to sample")
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
                "skipped": inside in cache.skipped(number),
                "length": vector.double().norm().item(),
                "first": vector[:6].tolist(),
            }
        )
    kept = torch.tensor([not entry["skipped"] for entry in listed])
    return {"rows": listed, "mean_cosine": mean_cosine(vectors[kept])}


def convert(source: Cache, out: Path, codec: str, progress: bool = True) -> None:
    """Writes the vectors of a cache with another codec; continues an interrupted run at its first missing shard.

    Rows are decoded to float32, with the rotation undone, and encoded again, so the errors of both codecs add up. A
    rotated codec uses the source's rotation, or seed 0 if it has none. Conditioned vectors stay as they are.

    Raises ConfigError when the source has that codec already; CacheError for an unknown codec, a damaged source or a
    full disk; CacheMismatch when `out` holds another cache.
    """
    if codec == source.manifest.codec:
        raise ConfigError(f"{source.folder} holds {codec} already; copy the folder instead")
    rotation = (source.rotation or Rotation(source.dim)) if codec_named(codec).rotated else None
    _rewrite(source, out, codec, rotation, source.conditioning, lambda x: x, BLOCK, f"to {codec}", progress)


def condition(
    source: Cache, out: Path, conditioning: Conditioning, codec: str | None = None, progress: bool = True
) -> None:
    """Writes the vectors of a cache conditioned; continues an interrupted run at its first missing shard.

    codec: of the new cache, a key of ops.rows.codecs.CODECS; None: the source's. Rows are decoded and encoded again, so
    the errors of both codecs add up; those of f32 are none.

    Raises ConfigError when the source is conditioned already, CacheMismatch when the conditioning is for vectors of
    another length or `out` holds another cache; CacheError for an unknown codec, a damaged source or a full disk.
    """
    check_not_conditioned(source)
    if conditioning.source_dim != source.dim:
        raise CacheMismatch(
            f"the vectors of {source.folder} have length {source.dim}, and this conditioning is for "
            f"{conditioning.source_dim}; fit one to this encoder's vectors"
        )
    codec = codec or source.manifest.codec
    rotation = Rotation(conditioning.dim) if codec_named(codec).rotated else None
    _rewrite(source, out, codec, rotation, conditioning, conditioning.apply, CONDITIONED, "condition", progress)


def statistics_of(cache: Cache, rows: int, seed: int = 0, progress: bool = True) -> Statistics:
    """The statistics of a sample of a cache's vectors, to fit a conditioning to.

    rows: how many at most, drawn without repeats by `seed`; rows without a vector are not counted.

    Raises ConfigError for rows below 2 and when the cache is conditioned already, CacheError for a damaged shard.
    """
    check_not_conditioned(cache)
    chosen = sample_of(len(cache), rows, seed)
    found = Statistics(cache.dim)
    with bar(total=len(chosen), unit="row", desc="statistics", disable=not progress) as shown:
        for part in torch.from_numpy(chosen).split(max(1, CONDITIONED // cache.dim)):
            found.add(cache.vectors(part))
            shown.update(len(part))
    return found


def sample_of(count: int, rows: int, seed: int) -> np.ndarray:
    """The numbers, ascending, of at most `rows` of `count` items, drawn without repeats. Raises ConfigError."""
    if rows < 2:
        raise ConfigError(f"a conditioning is fitted to at least 2 captions, not {rows}")
    if rows >= count:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).choice(count, rows, replace=False))


def check_not_conditioned(cache: Cache) -> None:
    """Raises ConfigError when the vectors of a cache are conditioned."""
    if cache.manifest.conditioning is not None:
        raise ConfigError(f"{cache.folder} is conditioned already; name the cache that it was made from")


def _rewrite(
    source: Cache,
    out: Path,
    codec: str,
    rotation: Rotation | None,
    conditioning: Conditioning | None,
    change: Callable[[Tensor], Tensor],
    block: int,
    title: str,
    progress: bool,
) -> None:
    """Writes a cache's vectors, changed, with another codec or conditioning. block: numbers changed at a time."""
    manifest, dim = source.manifest, conditioning.dim if conditioning else source.dim
    writer = CacheWriter(
        out, dim, codec, manifest.encoder, _sources(manifest), manifest.field, rotation, manifest.read, conditioning
    )
    writer.check_space()
    step = max(1, block // source.dim)
    for number in _with_progress(writer.missing(), [shard.rows for shard in manifest.shards], title, progress):
        rows, keys = _checked(source, number)
        parts = []
        for first in range(0, max(len(rows), 1), step):
            wide = rows[first : first + step].widen()
            vectors = wide if source.rotation is None else source.rotation.undo(wide)
            parts.append(encode(change(vectors), codec, rotation))
        writer.write_shard(number, QuantizedRows.cat(parts), keys, source.skipped(number).tolist())
    writer.finish()


def merge(sources: Sequence[Cache], out: Path, progress: bool = True) -> None:
    """Concatenates caches into one; copies the codes, and continues an interrupted run at its first missing shard. Of
    how the data sets were read, it records what all caches agree on.

    Raises ConfigError for fewer than two caches; CacheMismatch when they differ in encoder, codec, dim, rotation,
    conditioning or caption field, or when `out` holds another cache; CacheError for a damaged source or a full disk.
    """
    if len(sources) < 2:
        raise ConfigError("merge takes at least two caches and the folder of a new one")
    first = sources[0]
    kind, *others = [replace(cache.manifest, shards=(), read={}, format=FORMATS[-1]) for cache in sources]
    for cache, other in zip(sources[1:], others, strict=True):
        differences = kind.differences(other)
        if differences:
            raise CacheMismatch(
                f"{cache.folder} cannot be merged with {first.folder}: its {'; its '.join(differences)}; "
                "embed both with the same settings"
            )
    parts = [(cache, number) for cache in sources for number in range(len(cache.manifest.shards))]
    listed = [entry for cache in sources for entry in _sources(cache.manifest)]
    reads = [cache.manifest.read for cache in sources]
    read = {name: value for name, value in reads[0].items() if all(other.get(name) == value for other in reads)}
    writer = CacheWriter(
        out, first.dim, kind.codec, kind.encoder, listed, kind.field, kind.rotated_by(), read, first.conditioning
    )
    writer.check_space()
    for target in _with_progress(writer.missing(), [entry["samples"] for entry in listed], "merge", progress):
        cache, number = parts[target]
        writer.write_shard(target, *_checked(cache, number), cache.skipped(number).tolist())
    writer.finish()


def _sources(manifest: Manifest) -> list[dict[str, Any]]:
    """The data shards of a cache, in the form of CacheWriter's `source`."""
    return [
        {"name": shard.source, "samples": shard.rows, "captions": shard.captions, "stamp": shard.stamp}
        for shard in manifest.shards
    ]


def _checked(cache: Cache, number: int) -> tuple[QuantizedRows, list[int]]:
    """The rows of a shard and its key hashes, whose checksum was compared: damaged codes must not be copied under a
    new, valid checksum."""
    rows, keys = read_shard(cache.manifest, number, cache.folder / cache.manifest.shards[number].name)
    return rows, keys.tolist()


def _with_progress(numbers: Sequence[int], rows: Sequence[int], what: str, progress: bool) -> Iterator[int]:
    """Yields the shard numbers, with a progress bar that counts rows of all shards, finished ones included.

    rows: of every shard.
    """
    total = sum(rows)
    done = total - sum(rows[number] for number in numbers)
    with bar(total=total, initial=done, unit="row", desc=what, disable=not progress) as shown:
        for number in numbers:
            yield number
            shown.update(rows[number])
