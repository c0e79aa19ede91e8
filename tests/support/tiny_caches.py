"""Small text caches for the tests."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from lift_fast.cache import CacheWriter, Rotation, encode, key_hash
from lift_fast.ops.rows.codecs import CODECS
from lift_fast.ops.rows.table import key_hashes

ENCODER = {"id": "some/encoder", "revision": "abc", "pooling": "mean", "prompt": "", "max_length": 128}


@dataclass
class Data:
    """A data set that has only what check_data uses. texts: its captions; without them caption-KEY."""

    keys: list[str]
    shard_sizes: list[int]
    folder: Path = field(default=Path("some/data"))
    texts: list[str | Exception] | None = None
    stamps: list[str] | None = None
    read: list[int] = field(default_factory=list)  # the shards whose captions were read

    def __len__(self):
        return len(self.keys)

    def shard_keys(self, number):
        start = sum(self.shard_sizes[:number])
        return self.keys[start : start + self.shard_sizes[number]]

    def shard_hashes(self, number):
        return key_hashes(self.shard_keys(number))

    def captions(self, number, field="txt"):
        self.read.append(number)
        start = sum(self.shard_sizes[:number])
        texts = self.texts or [f"caption-{key}" for key in self.keys]
        return texts[start : start + self.shard_sizes[number]]

    def shard_stamp(self, number):
        return self.stamps[number] if self.stamps else ""


def data_of(sizes):
    return Data([f"key-{i:04d}" for i in range(sum(sizes))], list(sizes))


def vectors_of(count, dim, seed=0):
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


def rotation_for(codec, dim, seed=0):
    return Rotation(dim, seed) if CODECS[codec].rotated else None


def writer_for(folder, sizes, dim, encoder=ENCODER, field="txt", codec="int8", rotation_seed=0):
    source = [{"name": f"{k:05d}.tar", "samples": size} for k, size in enumerate(sizes)]
    return CacheWriter(folder, dim, codec, encoder, source, field, rotation_for(codec, dim, rotation_seed))


def write(folder, sizes, dim, shards=None, finish=True, seed=0, codec="int8", **options):
    """Writes a cache of random vectors, or only some of its shards; returns the vectors."""
    data, vectors = data_of(sizes), vectors_of(sum(sizes), dim, seed)
    writer = writer_for(folder, sizes, dim, codec=codec, **options)
    rotation = rotation_for(codec, dim, options.get("rotation_seed", 0))
    starts = np.cumsum([0, *sizes])
    for k in writer.missing() if shards is None else shards:
        part = slice(starts[k], starts[k + 1])
        writer.write_shard(k, encode(vectors[part], codec, rotation), [key_hash(key) for key in data.keys[part]])
    if finish:
        writer.finish()
    return vectors


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def cache_of(folder, data, dim=24, seed=0):
    """Writes an int8 cache of random vectors for every sample of a data set; returns its folder."""
    source = [{"name": path.name, "samples": size} for path, size in zip(data.paths, data.shard_sizes, strict=True)]
    writer = CacheWriter(folder, dim, "int8", ENCODER, source, "txt", None)
    vectors = vectors_of(len(data), dim, seed).split(data.shard_sizes)
    for shard, part in enumerate(vectors):
        writer.write_shard(shard, encode(part, "int8", None), data.shard_hashes(shard).tolist())
    writer.finish()
    return folder
