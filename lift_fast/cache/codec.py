"""Vectors to codes, and sample keys to hashes."""

from hashlib import blake2b

import torch
from torch import Tensor

from ..errors import CacheError
from ..ops.rows.codecs import Codec, codec_named
from ..ops.rows.quantized import QuantizedRows
from .rotation import Rotation


def encode(x: Tensor, codec: str, rotation: Rotation | None = None) -> QuantizedRows:
    """x floating [n, dim] as codes, on its device. rotation: for the rotated codecs, and only for them.

    int8, int8r    scale = max|x| / 127, code = round(x / scale): an element is off by scale / 2 at most
    fp8     scale = max|x| / 448, code = x / scale as e4m3: off by 1/16 of itself, or by scale / 1024
    int4r, int2r    y = the rotated x; codes of the levels nearest to y · unit · sqrt(dim) / |y|, and
            scale = |y|² / (levels[codes] · y), so that the row's dot product with its own vector is exact and with
            any other vector right on average over rotations (RaBitQ, arXiv 2405.12497, theorem 3.2)

    A row of zeros has scale 0. Raises CacheError for a codec that is none and for a row that is not finite.
    """
    kind = codec_named(codec)
    if kind.rotated != (rotation is not None):
        raise ValueError(f"codec {codec} takes {'a' if kind.rotated else 'no'} rotation")
    x = x.detach().float()
    largest = x.abs().amax(dim=1) if x.shape[1] else x.new_zeros(len(x))
    _refuse_infinite(largest)
    if not kind.scaled:
        _refuse_infinite(largest.to(kind.dtype))  # bfloat16 ends before float32 does
        return QuantizedRows(x.to(kind.dtype), None, codec, x.shape[1])
    if rotation is not None:
        # By its largest element first: the squares and sums of tiny or huge numbers would leave float32.
        x = rotation.apply(x / torch.where(largest > 0, largest, 1)[:, None])
    if kind.packed:
        codes, scales = _nearest_levels(x, kind)
        scales = scales * largest
        codes = pack(codes, kind)
    else:
        most = x.abs().amax(dim=1) if x.shape[1] else largest
        scales = most / (127 if kind.integer else 448)
        # Below that many times the smallest float32 the division gives 0: such a row is a row of zeros.
        codes = x / torch.where(scales > 0, scales, 1)[:, None]
        codes = torch.where(scales[:, None] > 0, codes.round().clamp(-127, 127) if kind.integer else codes, 0)
        codes = codes.to(kind.dtype)
        if rotation is not None:
            scales = scales * largest
    _refuse_infinite(scales)
    return QuantizedRows(codes, scales, codec, x.shape[1])


def _refuse_infinite(rows: Tensor) -> None:
    finite = rows.isfinite()
    if not finite.all():
        bad = int((~finite).nonzero()[0])
        raise CacheError(f"row {bad} of the embeddings is not finite: the encoder overflowed or is broken")


def _nearest_levels(y: Tensor, kind: Codec) -> tuple[Tensor, Tensor]:
    """Indices of the levels [n, dim] and scales [n] of rows whose squares are float32 numbers."""
    target = kind.unit * y.shape[1] ** 0.5  # the length of a row whose elements are `unit` on average
    length = y.norm(dim=1)
    whole = torch.where(length > 0, length, 1)
    y = y * (target / whole)[:, None]
    levels = torch.tensor(kind.levels, dtype=torch.float32, device=y.device)
    codes = torch.bucketize(y, (levels[1:] + levels[:-1]) / 2, out_int32=True)
    along = (levels[codes] * y).sum(dim=1)
    # |x|² / (levels · x) for the x that came in, of which y is target / length times.
    scales = whole * target / torch.where(along > 0, along, 1)
    return codes, torch.where(length > 0, scales, 0)


def pack(codes: Tensor, codec: Codec) -> Tensor:
    """codes [n, dim] integers -> uint8 [n, columns], the first of a byte in its lowest bits."""
    per_byte = 8 // codec.bits
    padded = torch.nn.functional.pad(codes.to(torch.uint8), (0, -codes.shape[1] % per_byte))
    parts = padded.view(len(codes), padded.shape[1] // per_byte, per_byte)
    out = torch.zeros_like(parts[:, :, 0])
    for k in range(per_byte):
        out |= parts[:, :, k] << (k * codec.bits)
    return out


def key_hash(key: str) -> int:
    """The first 64 bits of BLAKE2b of a sample key, as a signed little-endian integer."""
    return int.from_bytes(blake2b(key.encode(), digest_size=8).digest(), "little", signed=True)
