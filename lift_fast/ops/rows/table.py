"""A table of codes in many pieces of memory, the mapped shards of a cache: rows gathered, and widened, in one pass.

On the CPU only, by csrc/rows/dequant.cpp; a table in one piece, on any device, is `dequant`'s.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ...errors import BackendError
from ..backends import _C, DTYPES, NOT_BUILT
from .codecs import CODECS

_CODES = 4  # Out::codes of csrc/common/ops.h


class Table:
    """starts: int64 [pieces + 1], ascending from 0; piece k holds the rows from starts[k] on, before starts[k + 1].

    Raises BackendError without lift_fast._C.
    """

    def __init__(self, codec: str, dim: int, starts: np.ndarray):
        if _C is None:
            raise BackendError(NOT_BUILT)
        self.codec, self.dim = CODECS[codec], dim
        self._table = _C.Table(self.codec.number, dim, np.ascontiguousarray(starts, dtype=np.int64))

    def map(self, piece: int, codes: Tensor, scales: Tensor | None) -> None:
        """Tells where a piece is: contiguous tensors that the caller keeps alive until `forget`."""
        self._table.map(piece, codes.data_ptr(), 0 if scales is None else scales.data_ptr())

    def forget(self, piece: int) -> None:
        self._table.map(piece, 0, 0)

    def unmapped(self, rows: Tensor) -> list[int]:
        """The pieces that must still be told of before these rows (int64, contiguous) can be gathered.

        Raises IndexError for a row that is not in the table.
        """
        return self._table.unmapped(rows.data_ptr(), len(rows))

    def codes(self, rows: Tensor, pin: bool) -> tuple[Tensor, Tensor | None]:
        """codes[rows] and scales[rows], the caller's own, in pinned memory if asked."""
        codes = self.room(len(rows), self.codec.columns(self.dim), self.codec.dtype, pin)
        scales = torch.empty(len(rows), pin_memory=pin) if self.codec.scaled else None
        self._gather(rows, codes, scales, _CODES, False)
        return codes, scales

    @staticmethod
    def room(rows: int, columns: int, dtype: torch.dtype, pin: bool) -> Tensor:
        """An uninitialised [rows, columns], in pinned memory if asked, else in memory that is kept for the next batch
        when it is freed: pages of the kernel's own would cost more than filling them."""
        if pin or not rows * columns:
            return torch.empty((rows, columns), dtype=dtype, pin_memory=pin)
        size = rows * columns * dtype.itemsize
        return torch.frombuffer(_C.Scratch(bytes=size), dtype=torch.uint8, count=size).view(dtype).view(rows, columns)

    def widen(self, rows: Tensor, out: Tensor, normalize: bool) -> None:
        """Fills out [m, dim] (contiguous; float32, bfloat16 or float16) as dequant would."""
        self._gather(rows, out, None, DTYPES[out.dtype], normalize)

    def advise(self, rows: Tensor) -> None:
        """Has the kernel begin to read these rows' pages; returns before it is done."""
        self._table.advise(rows.data_ptr(), len(rows))

    def _gather(self, rows: Tensor, out: Tensor, scales: Tensor | None, kind: int, normalize: bool) -> None:
        to = 0 if scales is None else scales.data_ptr()
        threads = torch.get_num_threads()
        self._table.gather(rows.data_ptr(), len(rows), out.data_ptr(), to, kind, normalize, threads)


class KeyTable:
    """Where each 64-bit key hash is: a hash table over pieces of int64 [rows] that the caller keeps alive."""

    def __init__(self, pieces: Sequence[Tensor]):
        self._pieces = list(pieces)
        starts = np.cumsum([0, *map(len, self._pieces)])
        self._table = _C.KeyTable(starts)
        for number, piece in enumerate(self._pieces):
            self._table.map(number, piece.data_ptr())

    def find(self, hashes: Tensor) -> Tensor:
        """The first row of each hash (int64 [m], contiguous), -1 for one that is not there."""
        out = torch.empty_like(hashes)
        self._table.find(hashes.data_ptr(), len(hashes), out.data_ptr())
        return out


def key_hashes(keys: Sequence[str]) -> Tensor:
    """The first 64 bits of BLAKE2b of each key's UTF-8, as signed little-endian integers, int64 [len(keys)]."""
    out = torch.empty(len(keys), dtype=torch.int64)
    _C.key_hashes(list(keys), out.data_ptr())
    return out
