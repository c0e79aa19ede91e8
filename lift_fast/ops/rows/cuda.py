"""The "cuda" backend of dequant: csrc/rows/dequant.cu."""

from ..backends import _C, launch_on
from ..backends import why_no_cuda as why_not
from .contract import RowGather

__all__ = ["why_not", "widen"]


def widen(gather: RowGather) -> None:
    _C.dequant_cuda(**gather.fields(), **launch_on(gather.out))
