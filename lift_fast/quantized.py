"""QuantizedRows: the value that travels from the cache into the loss."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .ops.dequant import dequant


@dataclass(frozen=True, eq=False)
class QuantizedRows:
    """Rows of text vectors as codes and scales; vector i is codes[i] · scales[i].

    codes: int8 [rows, dim]; scales: float32 [rows], on the same device; codec: "int8".

    Raises ValueError when they do not fit together.
    """

    codes: Tensor
    scales: Tensor
    codec: str
    dim: int

    def __post_init__(self) -> None:
        if self.codec != "int8":
            raise ValueError(f"codec {self.codec!r} is unknown; this version knows int8")
        codes, scales = self.codes, self.scales
        if codes.dtype != torch.int8 or codes.dim() != 2 or codes.shape[1] != self.dim:
            raise ValueError(f"codes must be int8 [rows, {self.dim}], not {codes.dtype} {list(codes.shape)}")
        if scales.dtype != torch.float32 or scales.shape != codes.shape[:1]:
            raise ValueError(f"scales must be float32 [{len(codes)}], not {scales.dtype} {list(scales.shape)}")

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, rows: slice | Tensor) -> "QuantizedRows":
        """A slice (a view), or the rows of an int64 or bool tensor (a copy)."""
        return QuantizedRows(self.codes[rows], self.scales[rows], self.codec, self.dim)

    @staticmethod
    def cat(parts: Sequence["QuantizedRows"]) -> "QuantizedRows":
        """One after the other; same codec and dim. Raises ValueError otherwise, or for no part at all."""
        if not parts:
            raise ValueError("nothing to concatenate")
        kinds = {(part.codec, part.dim) for part in parts}
        if len(kinds) > 1:
            raise ValueError(f"parts differ in codec or dim: {sorted(kinds)}")
        first = parts[0]
        return QuantizedRows(
            torch.cat([part.codes for part in parts]),
            torch.cat([part.scales for part in parts]),
            first.codec,
            first.dim,
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "QuantizedRows":
        return QuantizedRows(
            self.codes.to(device, non_blocking=non_blocking),
            self.scales.to(device, non_blocking=non_blocking),
            self.codec,
            self.dim,
        )

    def widen(self, dtype: torch.dtype = torch.float32, rows: Tensor | None = None) -> Tensor:
        """The vectors as [rows, dim] of float32, bfloat16, float16 or float64 (a float32 product, widened).

        rows: int64, the rows to take, in their order; all without it.
        """
        if dtype == torch.float64:
            return dequant(self.codes, self.scales, rows).double()
        return dequant(self.codes, self.scales, rows, dtype)
