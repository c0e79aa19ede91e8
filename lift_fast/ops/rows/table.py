"""A table of codes in many pieces of memory, such as a cache's mapped shards: gathers and widens rows in one pass.

On the CPU only, by csrc/rows/table.cpp. For a table in one piece of memory, on any device, see dequant.py.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ...errors import BackendError
from ..backends import _C, DTYPES, NOT_BUILT, address
from .codecs import CODECS

_INTEGERS = {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
_CODES = 4  # Element::codes of csrc/common/element.h


class Table:
    """Rows of codes in pieces that are mapped one by one.

    starts: int64 [pieces + 1], ascending from 0; piece k holds rows starts[k] to starts[k + 1] - 1. Raises BackendError
    where lift_fast._C is not built.
    """

    def __init__(self, codec: str, dim: int, starts: np.ndarray):
        if _C is None:
            raise BackendError(NOT_BUILT)
        self.codec, self.dim = CODECS[codec], dim
        self._table = _C.Table(self.codec.number, dim, np.ascontiguousarray(starts, dtype=np.int64))

    def map(self, piece: int, codes: Tensor, scales: Tensor | None) -> None:
        """Registers the memory of a piece: contiguous tensors that the caller keeps alive until `forget`."""
        self._table.map(piece, codes.data_ptr(), address(scales))

    def forget(self, piece: int) -> None:
        """Unregisters a piece's memory."""
        self._table.map(piece, 0, 0)

    def unmapped(self, rows: Tensor) -> list[int]:
        """The pieces that must be mapped before these rows (int64, contiguous) can be gathered.

        Raises IndexError for a row outside the table.
        """
        return self._table.unmapped(rows.data_ptr(), len(rows))

    def codes(self, rows: Tensor, pin: bool) -> tuple[Tensor, Tensor | None]:
        """Copies of codes[rows] and scales[rows], in pinned memory if pin."""
        codes = self.allocate(len(rows), self.codec.columns(self.dim), self.codec.dtype, pin)
        scales = torch.empty(len(rows), pin_memory=pin) if self.codec.scaled else None
        self._gather(rows, codes, scales, _CODES, False)
        return codes, scales

    @staticmethod
    def allocate(rows: int, columns: int, dtype: torch.dtype, pin: bool) -> Tensor:
        """An uninitialised [rows, columns], in pinned memory if pin, else in memory that _C reuses once it is freed.

        Fresh pages from the operating system would cost more time than filling them.
        """
        if pin or not rows * columns:
            return torch.empty((rows, columns), dtype=dtype, pin_memory=pin)
        size = rows * columns * dtype.itemsize
        return torch.frombuffer(_C.Scratch(bytes=size), dtype=torch.uint8, count=size).view(dtype).view(rows, columns)

    def widen(self, rows: Tensor, out: Tensor, normalize: bool) -> None:
        """Fills out [m, dim] (contiguous; float32, bfloat16 or float16) with what `dequant` returns."""
        self._gather(rows, out, None, DTYPES[out.dtype], normalize)

    def touched(self) -> list[int]:
        """The pieces that rows were read from since the last call, ascending."""
        return self._table.touched()

    def advise(self, rows: Tensor) -> None:
        """Asks the operating system to read these rows' pages ahead; returns at once."""
        self._table.advise(rows.data_ptr(), len(rows))

    def _gather(self, rows: Tensor, out: Tensor, scales: Tensor | None, kind: int, normalize: bool) -> None:
        threads = torch.get_num_threads()
        self._table.gather(rows.data_ptr(), len(rows), out.data_ptr(), address(scales), kind, normalize, threads)


class MappedFile:
    """The first `size` bytes of a file in memory, as uint8 [size]; writes to them do not reach the file.

    file: its descriptor, which may be closed afterwards. lost: whether a part of the file could not be read, as it was
    cut short meanwhile or its disk failed. All bytes are 0 from then on; without this class such a read would end the
    process (SIGBUS).

    Raises OSError when the operating system refuses, BackendError where lift_fast._C is not built.
    """

    def __init__(self, file: int, size: int):
        if _C is None:
            raise BackendError(NOT_BUILT)
        self._mapping = _C.Mapping(file, size)
        self.bytes = torch.frombuffer(self._mapping, dtype=torch.uint8)

    @property
    def lost(self) -> bool:
        _C.handle_bus_errors()  # another library may have installed its handler since the last read
        return self._mapping.lost


def lost_files() -> int:
    """How many files of this process were lost (MappedFile) so far."""
    return _C.lost_mappings()


class KeyTable:
    """Finds the row of a 64-bit key hash: a hash table over pieces of int64 [rows] that the caller keeps alive."""

    def __init__(self, pieces: Sequence[Tensor]):
        self._pieces = list(pieces)
        starts = np.cumsum([0, *map(len, self._pieces)])
        self._table = _C.KeyTable(starts)
        for number, piece in enumerate(self._pieces):
            self._table.map(number, piece.data_ptr())

    def find(self, hashes: Tensor) -> Tensor:
        """The first row of each hash (int64 [m], contiguous), -1 for a hash that no row has."""
        out = torch.empty_like(hashes)
        self._table.find(hashes.data_ptr(), len(hashes), out.data_ptr())
        return out


def row_numbers(rows: Tensor | np.ndarray) -> Tensor:
    """A copy of row numbers, int64 [m] on the CPU: the caller's may change afterwards.

    Raises TypeError unless they are integers, ValueError unless they are [m].
    """
    array = rows if isinstance(rows, Tensor) else np.asarray(rows)
    if not (array.dtype in _INTEGERS if isinstance(array, Tensor) else array.dtype.kind in "iu"):
        raise TypeError(
            f"rows are row numbers, integers such as int64, not {array.dtype}; for a mask pass mask.nonzero()[:, 0]"
        )
    if array.ndim != 1:
        raise ValueError(f"rows must be [m], not {list(array.shape)}")
    # By NumPy, on this thread alone: torch's threads are not there in a forked process.
    return torch.from_numpy(np.array(array.cpu().numpy() if isinstance(array, Tensor) else array, dtype=np.int64))


def key_hashes(keys: Sequence[str]) -> Tensor:
    """The first 64 bits of BLAKE2b of each key's UTF-8, as signed little-endian integers, int64 [len(keys)]."""
    out = torch.empty(len(keys), dtype=torch.int64)
    _C.key_hashes(list(keys), out.data_ptr())
    return out
