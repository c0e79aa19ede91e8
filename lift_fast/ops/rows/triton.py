"""The "triton" backend of dequant: kernels/dequant.py."""

import torch

from ..backends import why_no_triton as why_not
from .contract import RowGather

__all__ = ["why_not", "widen"]


def widen(gather: RowGather) -> None:
    from ...kernels.dequant import dequant

    codes, scales, rows, out, codec, normalize = gather
    with torch.cuda.device_of(out):
        dequant(codes, scales, rows, out, codec.levels, normalize)
