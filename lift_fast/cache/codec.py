"""Encodes vectors as codes and scales."""

import torch
from torch import Tensor

from ..errors import CacheError
from ..ops.rows.codecs import Codec, codec_named
from ..ops.rows.quantized import QuantizedRows
from .rotation import Rotation


def encode(x: Tensor, codec: str, rotation: Rotation | None = None) -> QuantizedRows:
    """Encodes vectors as codes and scales, on their device.

    x: floating [n, dim]; the computation is in float32. rotation: required for rotated codecs, None for the others.

    int8, int8r    scale = max|x| / 127, code = round(x / scale); an element's error is at most scale / 2
    fp8            scale = max|x| / 448, code = x / scale as e4m3; an element's error is at most 1/16 of it, or
                   scale / 1024 where that is larger
    int4r, int2r   y = rotated x; the codes are the indices of the levels nearest to y · unit · sqrt(dim) / |y|, and
                   scale = |y|² / (levels[codes] · y), so that the row's dot product with its own vector is exact, and
                   with any other vector unbiased over rotations (RaBitQ, arXiv 2405.12497, theorem 3.2)

    A row of zeros has scale 0. Raises CacheError for an unknown codec, and for a row that is not finite or is too large
    for the codec; ValueError for a rotation that is missing or superfluous.
    """
    kind = codec_named(codec)
    if kind.rotated != (rotation is not None):
        raise ValueError(f"codec {codec} takes {'a' if kind.rotated else 'no'} rotation")
    x = x.detach().float()
    largest = x.abs().amax(dim=1) if x.shape[1] else x.new_zeros(len(x))
    _refuse_infinite(largest)
    if not kind.scaled:
        _refuse_infinite(largest.to(kind.dtype))  # the largest float32 numbers overflow in bfloat16
        return QuantizedRows(x.to(kind.dtype), None, codec, x.shape[1])
    if rotation is not None:
        # Divided by its largest element first: sums of squares of tiny or huge numbers leave float32's range.
        x = rotation.apply(x / torch.where(largest > 0, largest, 1)[:, None])
    if kind.packed:
        codes, scales = _nearest_levels(x, kind)
        scales = scales * largest
        codes = pack(codes, kind)
    else:
        most = largest if rotation is None or not x.shape[1] else x.abs().amax(dim=1)
        scales = most / (127 if kind.integer else 448)
        # The scale of a row of denormal numbers may round to 0: such a row is encoded as a row of zeros.
        codes = x / torch.where(scales > 0, scales, 1)[:, None]
        codes = torch.where(scales[:, None] > 0, codes.round().clamp(-127, 127) if kind.integer else codes, 0)
        codes = codes.to(kind.dtype)
        if rotation is not None:
            scales = scales * largest
    _refuse_infinite(scales)
    return QuantizedRows(codes, scales, codec, x.shape[1])


def _refuse_infinite(rows: Tensor) -> None:
    """Raises CacheError, naming the first row whose number in `rows` [n] is not finite."""
    finite = rows.isfinite()
    if not finite.all():
        bad = int((~finite).nonzero()[0])
        raise CacheError(
            f"row {bad} of the embeddings is not finite: the encoder overflowed; run it with another dtype (float32)"
        )


def _nearest_levels(y: Tensor, kind: Codec) -> tuple[Tensor, Tensor]:
    """Indices of the nearest levels [n, dim] and scales [n]; the squares of y's elements must fit float32."""
    target = kind.unit * y.shape[1] ** 0.5  # the norm of a row whose elements have the standard deviation `unit`
    norm = y.norm(dim=1)
    divisor = torch.where(norm > 0, norm, 1)
    y = y * (target / divisor)[:, None]
    levels = torch.tensor(kind.levels, dtype=torch.float32, device=y.device)
    codes = torch.bucketize(y, (levels[1:] + levels[:-1]) / 2, out_int32=True)
    dot = (levels[codes] * y).sum(dim=1)
    # |x|² / (levels · x), where x is the argument y and y is now x · target / |x|.
    scales = divisor * target / torch.where(dot > 0, dot, 1)
    return codes, torch.where(norm > 0, scales, 0)


def pack(codes: Tensor, codec: Codec) -> Tensor:
    """Packs integer codes [n, dim] into uint8 [n, columns]; the first code of a byte is in its lowest bits."""
    per_byte = 8 // codec.bits
    padded = torch.nn.functional.pad(codes.to(torch.uint8), (0, -codes.shape[1] % per_byte))
    parts = padded.view(len(codes), padded.shape[1] // per_byte, per_byte)
    out = torch.zeros_like(parts[:, :, 0])
    for k in range(per_byte):
        out |= parts[:, :, k] << (k * codec.bits)
    return out
