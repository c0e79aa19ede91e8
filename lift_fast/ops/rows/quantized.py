"""QuantizedRows: rows of text vectors in quantized form, as the cache returns them and the losses accept them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .codecs import CODECS
from .dequant import dequant


@dataclass(frozen=True, eq=False)
class QuantizedRows:
    """Rows of text vectors as codes and scales, in one of the codecs of codecs.py.

    codes: [rows, dim], packed codecs [rows, bytes]; scales: float32 [rows] on the same device, None for codecs without
    scales ("f32", "bf16"). Rows of a rotated codec are vectors in the rotated space and stay there when widened.

    Raises ValueError if codes, scales, codec and dim are inconsistent.
    """

    codes: Tensor
    scales: Tensor | None
    codec: str
    dim: int

    def __post_init__(self) -> None:
        codec = CODECS.get(self.codec)
        if codec is None:
            raise ValueError(f"codec {self.codec!r} is unknown; this version knows {', '.join(CODECS)}")
        codes, scales = self.codes, self.scales
        if codes.dtype != codec.dtype or codes.dim() != 2 or codes.shape[1] != codec.columns(self.dim):
            wanted = f"{str(codec.dtype).removeprefix('torch.')} [rows, {codec.columns(self.dim)}]"
            raise ValueError(f"codes must be {wanted}, not {codes.dtype} {list(codes.shape)}")
        if not codec.scaled:
            if scales is not None:
                raise ValueError(f"codec {self.codec} has no scales")
        elif scales is None or scales.dtype != torch.float32 or scales.shape != codes.shape[:1]:
            found = "none" if scales is None else f"{scales.dtype} {list(scales.shape)}"
            raise ValueError(f"scales must be float32 [{len(codes)}], not {found}")

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, rows: slice | Tensor) -> "QuantizedRows":
        """A slice (a view), or the rows of an int64 or bool tensor (a copy)."""
        return self._each(lambda part: part[rows])

    @staticmethod
    def cat(parts: Sequence["QuantizedRows"]) -> "QuantizedRows":
        """Concatenates parts of one codec and dim. Raises ValueError for different ones or for no parts."""
        if not parts:
            raise ValueError("nothing to concatenate")
        kinds = {(part.codec, part.dim) for part in parts}
        if len(kinds) > 1:
            raise ValueError(f"parts differ in codec or dim: {sorted(kinds)}")
        first = parts[0]
        scales = [part.scales for part in parts if part.scales is not None]
        codes = torch.cat([part.codes for part in parts])
        return QuantizedRows(codes, torch.cat(scales) if scales else None, first.codec, first.dim)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "QuantizedRows":
        """A copy on another device, as Tensor.to."""
        """The same rows on a device, as Tensor.to copies them."""
        return self._each(lambda part: part.to(device, non_blocking=non_blocking))

    def widen(self, dtype: torch.dtype = torch.float32, rows: Tensor | None = None, normalize: bool = False) -> Tensor:
        """The vectors as [rows, dim] of float32, bfloat16, float16 or float64 (float32 values, converted).

        rows: int64, the rows to take, in this order; None for all. normalize: divides each row by its length.
        """
        narrow = torch.float32 if dtype == torch.float64 else dtype
        codec, dim = self.codec, self.dim
        return dequant(self.codes, self.scales, rows, narrow, codec=codec, dim=dim, normalize=normalize).to(dtype)

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Operands for a matrix product: (int8 [rows, dim], scales [rows]), or ([rows, dim], None).

        Integer codecs give the former, packed ones after a look-up of their levels. "f32" and "bf16" rows are returned
        as they are, "fp8" rows widened to dtype.
        """
        codec = CODECS[self.codec]
        if codec.packed:
            return dequant(self.codes, None, dtype=torch.int8, codec=self.codec, dim=self.dim), self.scales
        if codec.integer or self.scales is None:
            return self.codes, self.scales
        return self.widen(dtype), None

    def _each(self, change: Callable[[Tensor], Tensor]) -> "QuantizedRows":
        scales = None if self.scales is None else change(self.scales)
        return QuantizedRows(change(self.codes), scales, self.codec, self.dim)
