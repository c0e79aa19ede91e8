"""The "cpp" backend of the pair losses, on the CPU: csrc/pairs/pairs.cpp, matrix products included."""

import torch
from torch import Tensor

from ..backends import _C, DTYPES, address
from ..backends import why_no_cpp as why_not
from .contract import FeatureGradients, ScoreTile, SigmoidSums, SoftmaxGradient
from .eager import positives

__all__ = ["allocate", "grads", "operand", "positives", "sigmoid", "stats", "why_not"]

# Bytes of sigmoid scores that are kept for the texts' gradient, which would otherwise recompute them. Chunks of at
# least KEEP_ROWS rows, since each chunk packs all texts again.
KEEP_BYTES, KEEP_ROWS = 64 << 20, 1024


def _pairs(scores: ScoreTile) -> "_C.Pairs":
    x, t = (
        _C.Rows(
            data=rows.data_ptr(),
            type=DTYPES[rows.dtype],
            count=len(rows),
            stride=rows.stride(0),
            scales=address(scales),
        )
        for rows, scales in ((scores.x, scores.a), (scores.t, scores.q))
    )
    return _C.Pairs(
        x=x, t=t, dim=scores.x.shape[1], scale=float(scores.scale), bias=float(scores.bias), offset=scores.offset
    )


def _gradient(
    scores: ScoreTile, out: Tensor | None, alpha: float, kept: Tensor | None, of_text: bool = False
) -> "_C.Gradient":
    return _C.Gradient(
        of_text=of_text,
        factor=alpha * float(scores.scale),
        out=address(out),
        out_type=0 if out is None else DTYPES[out.dtype],
        kept=address(kept),
        kept_stride=0 if kept is None else kept.stride(0),
    )


def operand(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t


def allocate(rows: int, cols: int, like: Tensor) -> Tensor:
    """From a pool: page faults of fresh memory cost as much as computing the scores at dim 512."""
    if not rows * cols:
        return like.new_empty(rows, cols)
    return torch.frombuffer(_C.Scratch(bytes=4 * rows * cols), dtype=torch.float32, count=rows * cols).view(rows, cols)


def stats(scores: ScoreTile, row: Tensor, col: Tensor, positive: Tensor, keep: Tensor | None) -> None:
    _C.pairs_stats(
        _pairs(scores),
        row=row.data_ptr(),
        row_stride=row.stride(0),
        col=col.data_ptr(),
        col_stride=col.stride(0),
        own=positive.data_ptr(),
        keep=address(keep),
        keep_stride=0 if keep is None else keep.stride(0),
        threads=torch.get_num_threads(),
    )


def grads(scores: ScoreTile, g: SoftmaxGradient, alpha: float, kept: Tensor | None, out: FeatureGradients) -> None:
    for gradient, of_text in ((out.image, False), (out.text, True)):
        if gradient is not None:
            _C.pairs_softmax_gradient(
                _pairs(scores),
                _gradient(scores, gradient, alpha, kept, of_text),
                row_max=g.row[0].data_ptr(),
                row_sum=g.row[1].data_ptr(),
                col_max=g.col[0].data_ptr(),
                col_sum=g.col[1].data_ptr(),
                row_weight=g.row_weight,
                col_weight=g.col_weight,
                own=g.positive.data_ptr(),
                threads=torch.get_num_threads(),
            )


def sigmoid(scores: ScoreTile, alpha: float, sums: SigmoidSums, out: FeatureGradients) -> None:
    rows, cols = len(scores.x), len(scores.t)
    step = rows if out.text is None else min(rows, max(KEEP_ROWS, KEEP_BYTES // (4 * cols)))
    kept = None if out.text is None else allocate(step, cols, scores.scale)
    for start in range(0, rows, step):
        stop = min(rows, start + step)
        part, image = scores.rows(start, stop), None if out.image is None else out.image[start:stop]
        part_sums = SigmoidSums(*(one[start:stop] for one in sums))
        _sigmoid(part, _gradient(part, image, alpha, None), alpha, part_sums, kept)
        if out.text is not None:
            _sigmoid(part, _gradient(part, out.text, alpha, kept, of_text=True), alpha, None, None)


def _sigmoid(
    scores: ScoreTile, gradient: "_C.Gradient", alpha: float, sums: SigmoidSums | None, keep: Tensor | None
) -> None:
    _C.pairs_sigmoid(
        _pairs(scores),
        gradient,
        alpha=alpha,
        loss=address(sums and sums.loss),
        d_scale=address(sums and sums.d_scale),
        d_bias=address(sums and sums.d_bias),
        keep=address(keep),
        keep_stride=0 if keep is None else keep.stride(0),
        threads=torch.get_num_threads(),
    )
