"""The "cpp" backend of dequant: csrc/rows/dequant.cpp, on the CPU."""

import torch

from ..backends import _C
from ..backends import why_no_cpp as why_not
from .contract import RowGather

__all__ = ["why_not", "widen"]


def widen(gather: RowGather) -> None:
    _C.dequant_cpu(**gather.fields(), threads=torch.get_num_threads())
