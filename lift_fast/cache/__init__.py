"""Text vectors as codes on disk: a folder of manifest.json and safetensors shards, mapped and never loaded.

Shard k, text-0000k.safetensors, holds the captions of data shard k in its order: `codes` [rows, columns], `scales`
float32 [rows] where the codec has them, and `keys` int64 [rows], the hashes of the sample keys; shard.py has the bytes,
codecs.py what a code stands for. All little-endian, as in safetensors. A cache that is still being written has
partial.json in place of manifest.json.
"""

from ..ops.rows.table import key_hashes
from .codec import encode, key_hash
from .manifest import Manifest, Shard
from .reader import Cache
from .rotation import Rotation
from .writer import CacheWriter

__all__ = ["Cache", "CacheWriter", "Manifest", "Rotation", "Shard", "encode", "key_hash", "key_hashes"]
