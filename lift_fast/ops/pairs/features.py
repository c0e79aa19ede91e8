"""Features of the pair losses: validation, normalization by row scales, and the way of their gradients back.

x̂ = a x with a = 1 / max(|x|, TINY): no normalized copy is stored, the scores are multiplied by a instead.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from . import policy

TINY = 1e-12  # norms below this are not divided by, as in F.normalize


class ScaledRows(Protocol):
    """Text rows stored as codes and a scale per row: QuantizedRows of a cache."""

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Rows [n, dim] and their scales [n]: int8 codes with float32 scales, or rows in dtype with None."""


def factors(text: Tensor | ScaledRows, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Text features or codes [rows, dim], and their scales [rows] or None. dtype: of features that are decoded."""
    return (text, None) if isinstance(text, Tensor) else text.factors(dtype)


def validated(
    image: Tensor, text: Tensor | ScaledRows, grouped: bool = False
) -> tuple[Tensor, Tensor, Tensor | None, torch.dtype]:
    """Validates image [rows, dim] and text [cols, dim]; returns image, text or codes, scales or None, the loss's dtype.

    Features are cast to the wider of their dtypes, or to autocast's; codes stay codes. grouped: the row counts are
    compared later, over all ranks of a process group. Raises ValueError for shapes, devices or dtypes that do not
    match.
    """
    t, scales = factors(text, image.dtype)
    fits = image.dim() == 2 == t.dim() and 0 < image.shape[1] == t.shape[1] and (grouped or len(image))
    if not fits:
        raise ValueError(f"image {tuple(image.shape)} and text {tuple(t.shape)} must both be [rows > 0, dim > 0]")
    if not grouped and len(image) != len(t):
        raise ValueError(f"image has {len(image)} rows and text {len(t)}; row i of one belongs to row i of the other")
    if image.device != t.device:
        raise ValueError(f"image is on {image.device} and text on {t.device}")
    if not image.is_floating_point() or not (scales is not None or t.is_floating_point()):
        raise ValueError(f"features must be floating point, not {image.dtype} and {t.dtype}")
    kind = image.device.type
    dtype = image.dtype if scales is not None else torch.promote_types(image.dtype, t.dtype)
    if dtype != torch.float64 and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    if scales is None:
        return image.to(dtype), t.to(dtype), None, wide
    return image.to(dtype), t, scales.to(wide), wide


class Operands(NamedTuple):
    """Features as the backends multiply them, and their row scales."""

    x: Tensor  # images [rows, dim]
    t: Tensor  # texts or codes [cols, dim]
    a: Tensor | None  # [rows]
    q: Tensor | None  # [cols]
    wide: torch.dtype  # of scores and sums


def operands(image: Tensor, text: Tensor, text_scales: Tensor | None, normalize: bool) -> Operands:
    """Casts 16-bit features to float32 where that takes no longer, and computes the row scales."""
    x, t = rows_apart(image), rows_apart(text)
    if x.dtype in (torch.bfloat16, torch.float16) and policy.multiplies_in_float32(len(x), len(t), x.shape[1]):
        x, t = x.float(), t if t.dtype == torch.int8 else t.float()
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return Operands(
        x, t, row_scales(x, None, normalize, wide), row_scales(t, text_scales, normalize, wide), wide
    )  # fmt: skip


def rows_apart(x: Tensor) -> Tensor:
    """x with a contiguous last dimension and rows that do not overlap; a copy only if needed."""
    return x if (x.stride(1) == 1 or x.shape[1] == 1) and x.stride(0) >= x.shape[1] else x.contiguous()


def row_scales(x: Tensor, scales: Tensor | None, normalize: bool, dtype: torch.dtype) -> Tensor | None:
    """The factor [rows] of each row of x, in dtype: its scale, divided by the row's norm if normalize; None: one."""
    if not normalize:
        return None if scales is None else scales.contiguous()
    if x.is_floating_point():
        norm = torch.linalg.vector_norm(x, dim=1, dtype=dtype)
    else:
        norm = torch.cat([part.to(dtype).norm(dim=1) for part in x.split(_step(x))])
    if scales is None:
        return norm.clamp_(min=TINY).reciprocal_()
    return scales / norm.mul_(scales.abs()).clamp_(min=TINY)


def through_norm(d: Tensor, x: Tensor, a: Tensor, out: Tensor) -> None:
    """out = (I − x̂ x̂ᵀ) d: the last step of the gradient through x̂ = a x. d contains the factor a; out may be d."""
    inverse = torch.where(a < 1 / TINY, a, 0).square_()  # a shorter row was not divided by its norm
    for start in range(0, len(d), _step(d)):
        rows = slice(start, start + _step(d))
        wide = x[rows].to(d.dtype)
        inner = torch.linalg.vecdot(wide, d[rows]).mul_(inverse[rows])
        out[rows] = d[rows].addcmul_(wide, inner[:, None], value=-1)


def _step(x: Tensor) -> int:
    """Rows of x at a time whose float32 copy fits into a processor's cache (1 MiB)."""
    return max(1, (1 << 18) // max(1, x.shape[1]))


def kept_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a feature gradient between forward and backward.

    float32 for float16, in which 1 / rows would be lost before the backward multiplies it by the loss scale.
    """
    return torch.float32 if dtype == torch.float16 else dtype


def gradient_of(features: Tensor, needed: bool) -> Tensor:
    """Uninitialized memory for the gradient of features; an empty tensor if it is not needed."""
    return features.new_empty(features.shape if needed else (0,), dtype=kept_dtype(features.dtype))


def text_gradient(d: Tensor, t: Tensor, q: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The gradient of texts of this dtype from its sums d: through the normalization (q: 1 / norm), then rounded."""
    if q is not None:
        through_norm(d, t, q, d)
    return d.to(kept_dtype(dtype))


class ImageGradient:
    """Collects the images' gradient from the backends: chunks of rows, once per turn of the texts (see `exchange`).

    Chunks are summed over the turns in float32, taken through the normalization, and rounded once, in `out`.
    """

    def __init__(self, x: Tensor, a: Tensor | None, turns: int, wide: torch.dtype):
        """a: 1 / norm if x is normalized, else None."""
        self.x, self.a, self.turns, self.wide = x, a, turns, wide
        self.out = gradient_of(x, True)
        if turns > 1:
            self.total = self.out.zero_() if self.out.dtype == wide else torch.zeros_like(x, dtype=wide)

    def chunk(self, start: int, stop: int) -> Tensor:
        """Memory for a backend to overwrite with the gradient of rows start..stop-1."""
        out = self.out[start:stop]
        direct = self.turns == 1 and (self.a is None or out.dtype == self.wide)
        return out if direct else torch.empty_like(out, dtype=self.wide)

    def add(self, start: int, stop: int, d: Tensor) -> None:
        """Adds a chunk that a backend has overwritten."""
        if self.turns > 1:
            self.total[start:stop] += d
        elif self.a is not None:
            through_norm(d, self.x[start:stop], self.a[start:stop], self.out[start:stop])

    def finish(self) -> Tensor:
        """The gradient [rows, dim], once all chunks of all turns are added."""
        if self.turns > 1:
            if self.a is not None:
                through_norm(self.total, self.x, self.a, self.out)
            elif self.out is not self.total:
                self.out.copy_(self.total)
        return self.out
