"""The codecs of the text cache: how a vector is stored, in how many bits, with which code book and error.

    codec   stored element                  decoded row                          mean cosine to a Gaussian original
    f32     float32                         the code                             1
    bf16    bfloat16                        the code                             1 - 1e-6
    int8    int8, symmetric                 code * scale                         1 - 3e-5
    int8r   int8, symmetric                 code * scale, rotated                1 - 3e-5
    fp8     float8 e4m3 (finite)            code * scale                         1 - 4e-4
    int4r   4-bit index into LEVELS         LEVELS[code] * scale, rotated        0.99524
    int2r   2-bit index into LEVELS         LEVELS[code] * scale, rotated        0.93942

A rotated codec stores the vector rotated (cache/rotation.py). Language models give a few huge coordinates, and the
rotation spreads them over all coordinates. Plain int8 has to take its scale from the huge ones and reaches a cosine of
1 - 3e-4 (Gemma) where int8r reaches 1 - 3e-5. Rotated coordinates are nearly Gaussian, for which the Lloyd-Max code
book is close to optimal (TurboQuant, arXiv 2504.19874; RaBitQ, arXiv 2405.12497). The levels are the best integers of
up to seven bits (mean squared error 0.009506 and 0.117482 of the variance; real levels give 0.009501 and 0.117482), so
a look-up turns a packed row into an int8 row, which everything that accepts int8 rows accepts.
"""

from dataclasses import dataclass

import torch

from ...errors import CacheError


@dataclass(frozen=True)
class Codec:
    """A codec.

    number: its value in `Codec` of csrc/rows/dequant.h. dtype: of the stored codes, uint8 for packed ones. rotated:
    whether the codes are of the rotated vector. levels: the values of the packed codes 0, 1, …; () without packing.
    unit: the level of one standard deviation of the encoded coordinates.
    """

    name: str
    number: int
    bits: int
    dtype: torch.dtype
    scaled: bool = True
    rotated: bool = False
    levels: tuple[int, ...] = ()
    unit: float = 1.0

    @property
    def packed(self) -> bool:
        """Whether a byte holds several codes, the first in its lowest bits."""
        return bool(self.levels)

    @property
    def integer(self) -> bool:
        """Whether a decoded row is int8 values times its scale."""
        return self.packed or self.dtype == torch.int8

    def columns(self, dim: int) -> int:
        """Elements of `dtype` in a row of codes; unused bits of the last byte are 0."""
        return -(-dim * self.bits // 8) if self.packed else dim

    def row_bytes(self, dim: int) -> int:
        """Bytes of a row of codes, without its scale."""
        """Bytes of a row of codes, without its scale."""
        return self.columns(dim) * self.dtype.itemsize


def _both(*positive: int) -> tuple[int, ...]:
    return (*(-level for level in reversed(positive)), *positive)


CODECS = {
    codec.name: codec
    for codec in (
        Codec("f32", 0, 32, torch.float32, scaled=False),
        Codec("bf16", 1, 16, torch.bfloat16, scaled=False),
        Codec("int8", 2, 8, torch.int8),
        Codec("int8r", 2, 8, torch.int8, rotated=True),
        Codec("fp8", 3, 8, torch.float8_e4m3fn),
        Codec("int4r", 4, 4, torch.uint8, rotated=True, levels=_both(5, 15, 25, 36, 48, 62, 79, 104), unit=38.1474),
        Codec("int2r", 5, 2, torch.uint8, rotated=True, levels=_both(33, 110), unit=72.833),
    )
}


def codec_named(name: str) -> Codec:
    """The codec of this name. Raises CacheError for an unknown name."""
    if name not in CODECS:
        raise CacheError(f"no codec {name[:60]!r}; there are {', '.join(CODECS)}")
    return CODECS[name]
