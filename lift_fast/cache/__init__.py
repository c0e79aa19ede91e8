"""Text vectors as codes on disk: a folder of manifest.json and safetensors shards, mapped and never loaded.

Shard k holds the captions of data shard k in its order: text-0000k.safetensors with `codes` int8 [rows, dim],
`scales` float32 [rows] and `keys` int64 [rows], the hashes of the sample keys. All little-endian, as in
safetensors. A cache that is still being written has partial.json in place of manifest.json.
"""

from .codec import encode_int8, key_hash
from .manifest import Manifest, Shard
from .reader import Cache
from .writer import CacheWriter

__all__ = ["Cache", "CacheWriter", "Manifest", "Shard", "encode_int8", "key_hash"]
