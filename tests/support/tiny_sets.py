"""Small data sets for the tests."""

import random

import numpy as np

from lift_fast.data.shards import Shards, ShardWriter

from .hostile import encoded


def png(rng: random.Random, size=(12, 10)) -> bytes:
    """A PNG of random pixels; size: width and height."""
    pixels = np.frombuffer(rng.randbytes(size[0] * size[1] * 3), np.uint8).reshape(size[1], size[0], 3)
    return encoded(pixels, "PNG")


def keys_of(data):
    """The sample keys of all shards."""
    return [key for number in range(len(data.shard_sizes)) for key in data.shard_keys(number)]


def make_set(folder, count=10, per_shard=4, seed=0, broken=()):
    """Writes a data set of random images with captions and returns it. broken: numbers of samples without an image."""
    rng = random.Random(seed)
    with ShardWriter(folder, per_shard) as writer:
        for i in range(count):
            image = b"no picture" if i in broken else png(rng)
            writer.write(f"s{seed}-{i:03d}", image, f"caption {i}", {"long": f"long caption {i}"})
    return Shards(folder)
