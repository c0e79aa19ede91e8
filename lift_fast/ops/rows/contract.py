"""What a backend of `dequant` is given and does, and the registry of these backends."""

from typing import Any, NamedTuple, Protocol

from torch import Tensor

from ..backends import DTYPES, Backends, address
from .codecs import Codec


class RowGather(NamedTuple):
    """out[i] = round(value(codes[rows[i]]) · scales[rows[i]]), or each row divided by its length if normalize.

    codes: [n, columns], each row contiguous; scales: float32 [n], None for ones; rows: int64 [m], contiguous, None for
    all (then m = n); out: [m, dim], contiguous and not empty.
    """

    codes: Tensor
    scales: Tensor | None
    rows: Tensor | None
    out: Tensor
    codec: Codec
    normalize: bool = False

    def fields(self) -> dict[str, Any]:
        """The fields of `Dequant` in csrc/rows/dequant.h, in their order: addresses, sizes, strides and kinds."""
        m, dim = self.out.shape
        return {
            "codes": self.codes.data_ptr(),
            "scales": address(self.scales),
            "rows": address(self.rows),
            "out": self.out.data_ptr(),
            "n": len(self.codes),
            "m": m,
            "dim": dim,
            "codes_stride": self.codes.stride(0) * self.codes.element_size(),
            "scales_stride": 0 if self.scales is None else self.scales.stride(0),
            "codec": self.codec.number,
            "type": DTYPES[self.out.dtype],
            "normalize": self.normalize,
        }


class Backend(Protocol):
    """What a backend's module must have. The host does not wait for a GPU, except in "torch"."""

    def why_not(self) -> str | None:
        """Why it is not available; None if it is."""

    def widen(self, gather: RowGather) -> None:
        """Fills gather.out. A row outside the table raises IndexError on the CPU; a GPU writes NaN, or 0 as int8."""


BACKENDS: Backends[Backend] = Backends("rows", {"cpu": ("cpp", "torch"), "cuda": ("cuda", "triton", "torch")})
