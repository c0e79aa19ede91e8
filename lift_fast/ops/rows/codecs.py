"""How a vector is kept: the codecs of the text cache, their bits, code books and errors.

    codec   an element                      a row's vector                       mean cosine to it (a Gaussian's)
    f32     float32                         the code                             1
    bf16    bfloat16                        the code                             1 - 1e-6
    int8    int8, symmetric                 code * scale                         1 - 3e-5
    int8r   int8, symmetric                 code * scale, rotated                1 - 3e-5
    fp8     float8 e4m3 (finite)            code * scale                         1 - 4e-4
    int4r   4-bit index into LEVELS         LEVELS[code] * scale, rotated        0.99524
    int2r   2-bit index into LEVELS         LEVELS[code] * scale, rotated        0.93942

A rotated codec keeps the vector rotated (cache/rotation.py), which spreads the few huge coordinates that language
models give over all of them: plain int8 has to take its scale from those, and is then at 1 - 3e-4 (Gemma) where int8r
is at 1 - 3e-5. Rotated coordinates are near Gaussian, for which one code book, Lloyd's and Max's, is near the best
there is (TurboQuant, arXiv 2504.19874; RaBitQ, arXiv 2405.12497). The levels are integers, the best of up to seven
bits (mean squared error 0.009506 and 0.117482 of the variance; real levels give 0.009501 and 0.117482), so that a
packed row is an int8 row after one look-up and whatever takes int8 rows takes it.
"""

from dataclasses import dataclass

import torch

from ...errors import CacheError


@dataclass(frozen=True)
class Codec:
    """number: `Codec` of ops.h. dtype: of the stored codes, uint8 for packed ones. rotated: whether they are of
    the rotated vector. levels: what the packed codes 0, 1, … stand for, () without packing. unit: levels in one
    standard deviation of what is encoded."""

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
        """Whether a byte holds several codes: the first in its lowest bits."""
        return bool(self.levels)

    @property
    def integer(self) -> bool:
        """Whether a row is int8 numbers times its scale."""
        return self.packed or self.dtype == torch.int8

    def columns(self, dim: int) -> int:
        """Elements of `dtype` in a row of codes; the bits that are left over in the last byte are 0."""
        return -(-dim * self.bits // 8) if self.packed else dim

    def row_bytes(self, dim: int) -> int:
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
    """Raises CacheError for a name that is none."""
    if name not in CODECS:
        raise CacheError(f"no codec {name!r}; there are {', '.join(CODECS)}")
    return CODECS[name]
