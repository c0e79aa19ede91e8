"""Text vectors as codes on disk: a folder with manifest.json and safetensors shards, which are memory-mapped.

Shard k, text-0000k.safetensors, holds the captions of data shard k in the same order: `codes` [rows, columns], `scales`
float32 [rows] where the codec has them, and `keys` int64 [rows], the hashes of the sample keys. Numbers are
little-endian, as in every safetensors file. shard.py describes the bytes of a shard, ops/rows/codecs.py what the codes
mean. A cache that is not finished has partial.json in place of manifest.json. docs/cache.md is the whole format.
"""

from ..ops.rows.table import key_hashes
from .codec import encode
from .conditioning import Conditioning
from .manifest import Manifest, Shard
from .reader import Cache
from .rotation import Rotation
from .writer import CacheWriter

__all__ = ["Cache", "CacheWriter", "Conditioning", "Manifest", "Rotation", "Shard", "encode", "key_hash", "key_hashes"]


def key_hash(key: str) -> int:
    """The hash of one sample key: key_hashes([key]) as an int. Kept until 0.2; use `key_hashes`."""
    return int(key_hashes([key]))
