"""The "cpp" backend of the losses over pairs: csrc/pairs/pairs.cpp, products included, on the CPU."""

import torch
from torch import Tensor

from ..backends import _C, DTYPES, address
from ..backends import why_no_cpp as why_not
from .contract import ScoreTile
from .eager import own_pairs

__all__ = ["grads", "operand", "own_pairs", "room", "sigmoid", "stats", "why_not"]

# Scores that a text's gradient of the sigmoid loss reads again instead of making them again; every chunk of rows
# packs the texts anew, so that it should not have few.
KEEP_BYTES, KEEP_ROWS = 64 << 20, 1024


def _pairs(block: ScoreTile) -> "_C.Pairs":
    x, t = (
        _C.Rows(
            data=rows.data_ptr(),
            type=DTYPES[rows.dtype],
            count=len(rows),
            stride=rows.stride(0),
            scales=address(scales),
        )
        for rows, scales in ((block.x, block.a), (block.t, block.q))
    )
    return _C.Pairs(
        x=x, t=t, dim=block.x.shape[1], scale=float(block.scale), bias=float(block.bias), offset=block.offset
    )


def _gradient(
    block: ScoreTile, out: Tensor | None, alpha: float, kept: Tensor | None, of_text: bool = False
) -> "_C.Gradient":
    return _C.Gradient(
        of_text=of_text,
        factor=alpha * float(block.scale),
        out=address(out),
        out_type=0 if out is None else DTYPES[out.dtype],
        kept=address(kept),
        kept_stride=0 if kept is None else kept.stride(0),
    )


def operand(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t


def room(rows: int, cols: int, like: Tensor) -> Tensor:
    """From a pool: the pages of fresh memory cost as much as the scores at dim 512."""
    if not rows * cols:
        return like.new_empty(rows, cols)
    return torch.frombuffer(_C.Scratch(bytes=4 * rows * cols), dtype=torch.float32, count=rows * cols).view(rows, cols)


def stats(block: ScoreTile, row: Tensor, col: Tensor, own: Tensor, keep: Tensor | None) -> None:
    _C.pairs_stats(
        _pairs(block),
        row=row.data_ptr(),
        row_stride=row.stride(0),
        col=col.data_ptr(),
        col_stride=col.stride(0),
        own=own.data_ptr(),
        keep=address(keep),
        keep_stride=0 if keep is None else keep.stride(0),
        threads=torch.get_num_threads(),
    )


def grads(
    block: ScoreTile,
    row: Tensor,
    col: Tensor,
    row_weight: float,
    col_weight: float,
    own_g: Tensor,
    alpha: float,
    kept: Tensor | None,
    d_image: Tensor | None,
    d_text: Tensor | None,
) -> None:
    for out, of_text in ((d_image, False), (d_text, True)):
        if out is not None:
            _C.pairs_softmax_gradient(
                _pairs(block),
                _gradient(block, out, alpha, kept, of_text),
                row_max=row[0].data_ptr(),
                row_sum=row[1].data_ptr(),
                col_max=col[0].data_ptr(),
                col_sum=col[1].data_ptr(),
                row_weight=row_weight,
                col_weight=col_weight,
                own=own_g.data_ptr(),
                threads=torch.get_num_threads(),
            )


def sigmoid(
    block: ScoreTile,
    alpha: float,
    loss: Tensor,
    d_scale: Tensor,
    d_bias: Tensor,
    d_image: Tensor | None,
    d_text: Tensor | None,
) -> None:
    rows, cols = len(block.x), len(block.t)
    step = rows if d_text is None else min(rows, max(KEEP_ROWS, KEEP_BYTES // (4 * cols)))
    kept = None if d_text is None else room(step, cols, block.scale)
    for first in range(0, rows, step):
        part = slice(first, first + step)
        here = ScoreTile(
            block.x[part],
            block.t,
            None if block.a is None else block.a[part],
            block.q,
            block.scale,
            block.bias,
            block.offset + first,
        )
        out = None if d_image is None else d_image[part]
        _sigmoid(here, _gradient(here, out, alpha, None), alpha, loss[part], d_scale[part], d_bias[part], kept)
        if d_text is not None:
            _sigmoid(here, _gradient(here, d_text, alpha, kept, of_text=True), alpha, None, None, None, None)


def _sigmoid(
    block: ScoreTile,
    gradient: "_C.Gradient",
    alpha: float,
    loss: Tensor | None,
    d_scale: Tensor | None,
    d_bias: Tensor | None,
    keep: Tensor | None,
) -> None:
    _C.pairs_sigmoid(
        _pairs(block),
        gradient,
        alpha=alpha,
        loss=address(loss),
        d_scale=address(d_scale),
        d_bias=address(d_bias),
        keep=address(keep),
        keep_stride=0 if keep is None else keep.stride(0),
        threads=torch.get_num_threads(),
    )
