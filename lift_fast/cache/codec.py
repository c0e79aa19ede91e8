"""Vectors to codes, and sample keys to hashes."""

from hashlib import blake2b

import torch
from torch import Tensor

from ..errors import CacheError
from ..quantized import QuantizedRows


def encode_int8(x: Tensor) -> QuantizedRows:
    """Symmetric codes with one scale a row: scale = max|x| / 127, code = round(x / scale).

    x: floating [n, dim] on any device. An element is off by scale / 2 at most. A row of zeros has scale 0.

    Raises CacheError for a row that is not finite.
    """
    x = x.detach().float()
    largest = x.abs().amax(dim=1) if x.shape[1] else x.new_zeros(len(x))
    finite = largest.isfinite()
    if not finite.all():
        bad = int((~finite).nonzero()[0])
        raise CacheError(f"row {bad} of the embeddings is not finite: the encoder overflowed or is broken")
    scales = largest / 127
    # Below 127 times the smallest float32 the division gives 0: such a row is a row of zeros.
    codes = (x / torch.where(scales > 0, scales, 1)[:, None]).round().clamp(-127, 127)
    codes = torch.where(scales[:, None] > 0, codes, 0)
    return QuantizedRows(codes.to(torch.int8), scales, "int8", x.shape[1])


def key_hash(key: str) -> int:
    """The first 64 bits of BLAKE2b of a sample key, as a signed little-endian integer."""
    return int.from_bytes(blake2b(key.encode(), digest_size=8).digest(), "little", signed=True)
