"""The pair losses' blocks on a GPU: cuBLAS for the matrix products, csrc/*.cu for all between them.

score_tiles.cu goes through the score matrix in blocks of rows and columns whose products x · tᵀ, float32, stay in
the GPU's L2 cache. One call does a whole pass: Python is not in the loop. The gradients' matrix products take in one
more matrix of the features' dtype, G, whole over the columns and for a band of rows at a time:

    G_ij = alpha · scale · a_i g_ij q_j          d_image = G t,   d_text += Gᵀ x

a_i is common to row i and q_j to column j, so the same G serves both sides and nothing is scaled afterwards. In
float16, whose range ends at 6e-8, G is 1024 g_ij q_j for the images and 1024 a_i g_ij for the texts, two passes
where both are wanted, and the rest is multiplied onto the float32 results.
"""

import ctypes
import functools
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import tuned
from ..backends import _C, DTYPES, address, launch_on, why_no_cuda
from .contract import ScoreTile, exact

UP = 1024.0  # 1 / rows is subnormal in float16


def why_not() -> str | None:
    if reason := why_no_cuda():
        return reason
    try:
        _gemm_ex()
    except OSError as error:
        return f"torch's cuBLAS is not to be found: {error}"
    return None


def operand(t: Tensor, dtype: torch.dtype) -> Tensor:
    """What the products read: text features as they are, int8 codes widened. Done once for blocks of the same text."""
    return widen(t, dtype) if t.dtype == torch.int8 else t


def room(rows: int, cols: int, like: Tensor) -> Tensor:
    return _matrix(rows, cols, like)


def widen(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """int8 codes [cols, dim] as float32, bfloat16 or float16, exactly: no scale is applied."""
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    rows, dim = codes.shape
    _C.widen_cuda(
        codes=codes.data_ptr(), stride=codes.stride(0), rows=rows, dim=dim, out=out.data_ptr(), type=DTYPES[dtype],
        **launch_on(codes),
    )  # fmt: skip
    return out


def stats(block: ScoreTile, row: Tensor, col: Tensor, own: Tensor, keep: Tensor | None) -> None:
    text, (high, wide) = operand(block.t, block.x.dtype), _block(block)
    products = _room(block, high, wide) if keep is None else keep
    scratch = _floats(_C.contrastive_stats_scratch(len(block.x), len(text), high, wide), block.x)
    with exact(block.x.dtype):
        _C.contrastive_stats_cuda(
            **_pass(block, text, high, wide, products, keep is not None), row=row.data_ptr(), row_stride=row.stride(0),
            col=col.data_ptr(), col_stride=col.stride(0), own=own.data_ptr(), scratch=scratch.data_ptr(),
            **launch_on(block.x),
        )  # fmt: skip


def own_pairs(row: Tensor, col: Tensor, own: Tensor, scale: Tensor, bias: Tensor, weight: float) -> Tensor:
    out = _floats(9 * len(own), own).view(9, len(own))
    _C.own_pairs_cuda(
        row=row.data_ptr(), row_stride=row.stride(0), col=col.data_ptr(), col_stride=col.stride(0), own=own.data_ptr(),
        n=len(own), scale=scale.data_ptr(), bias=bias.data_ptr(), weight=weight, out=out.data_ptr(), **launch_on(own),
    )  # fmt: skip
    return out


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
    def fill(start: int, stop: int, matrix: dict[str, Any], gradient: dict[str, Any]) -> None:
        mine = row[:, start:stop]
        _C.contrastive_gradient_cuda(
            **matrix, row=mine.data_ptr(), row_stride=row.stride(0), col=col.data_ptr(), col_stride=col.stride(0),
            row_weight=row_weight, col_weight=col_weight, own_g=own_g[start:stop].data_ptr(), **gradient,
        )  # fmt: skip

    if d_image is not None or d_text is not None:
        _features(block, alpha, kept, d_image, d_text, fill)


def sigmoid(
    block: ScoreTile,
    alpha: float,
    loss: Tensor,
    d_scale: Tensor,
    d_bias: Tensor,
    d_image: Tensor | None,
    d_text: Tensor | None,
) -> None:
    scratch = _floats(_C.sigmoid_scratch(len(block.x), len(block.t), *_block(block)), block.x)
    seen = 0  # rows whose sums are there: a second pass over them must not add them again

    def fill(start: int, stop: int, matrix: dict[str, Any], gradient: dict[str, Any]) -> None:
        nonlocal seen
        new = start >= seen
        loss_, scale_, bias_ = (sums[start:stop].data_ptr() if new else 0 for sums in (loss, d_scale, d_bias))
        _C.sigmoid_cuda(
            **matrix, alpha=alpha, loss=loss_, d_scale=scale_, d_bias=bias_, scratch=scratch.data_ptr(), **gradient
        )
        seen = max(seen, stop)

    if d_image is None and d_text is None:
        text, (high, wide) = operand(block.t, block.x.dtype), _block(block)
        products = _room(block, high, wide)
        with exact(block.x.dtype):
            fill(0, len(block.x), _pass(block, text, high, wide, products, False), _gradient(block, None, text))
    else:
        _features(block, alpha, None, d_image, d_text, fill)


def _features(
    block: ScoreTile,
    alpha: float,
    kept: Tensor | None,
    d_image: Tensor | None,
    d_text: Tensor | None,
    fill: Callable[[int, int, dict[str, Any], dict[str, Any]], None],
) -> None:
    """The features' gradients, for one band of rows after the other.

    fill(start, stop, matrix, gradient) makes a pass over rows start..stop-1: `_pass` and `_gradient` say what of.
    """
    text, rows = operand(block.t, block.x.dtype), len(block.x)
    band = min(rows, _band(block, d_text is not None))
    high, wide = _block(block)
    room = _matrix(band, len(text), block.x)
    in_place = kept is None and block.x.dtype == torch.float32
    products = None if in_place or kept is not None else _room(block, high, wide)
    half = block.x.dtype == torch.float16
    factor = block.scale * (alpha / UP) if half else None
    with exact(block.x.dtype):
        for start in range(0, rows, band):
            stop = min(rows, start + band)
            part, g = block.rows(start, stop), room[: stop - start]
            matrix = _pass(part, text, high, wide, kept[start:stop] if kept is not None else products, kept is not None)
            image = None if d_image is None else d_image[start:stop]
            if factor is None:
                fill(start, stop, matrix, _gradient(part, g, text, part.a, part.q, alpha, True, image, d_text))
                continue
            if image is not None:
                d = torch.empty(image.shape, dtype=torch.float32, device=image.device)
                fill(start, stop, matrix, _gradient(part, g, text, None, part.q, UP, False, d, None))
                torch.mul(d if part.a is None else d.mul_(part.a[:, None]), factor, out=image)
            if d_text is not None:
                d = torch.zeros_like(d_text)
                fill(start, stop, matrix, _gradient(part, g, text, part.a, None, UP, False, None, d))
                d_text.addcmul_(d, (factor.expand(len(text)) if part.q is None else factor * part.q)[:, None])


def _pass(block: ScoreTile, text: Tensor, high: int, wide: int, products: Tensor | None, kept: bool) -> dict[str, Any]:
    """Features and Blocks of score_tiles.h, in addresses and counts. products None: they lie where G will."""
    x = block.x
    gemm, handle = _gemm(x)
    return {
        "x": x.data_ptr(),
        "x_stride": x.stride(0),
        "t": text.data_ptr(),
        "t_stride": text.stride(0),
        "rows": len(x),
        "cols": len(text),
        "dim": x.shape[1],
        "type": DTYPES[x.dtype],
        "a": address(block.a),
        "q": address(block.q),
        "scale": block.scale.data_ptr(),
        "bias": block.bias.data_ptr(),
        "offset": block.offset,
        "block_rows": high,
        "block_cols": wide,
        "products": address(products),
        "products_stride": 0 if products is None else products.stride(0),
        "kept": kept,
        "gemm": gemm,
        "handle": handle,
    }


def _gradient(
    block: ScoreTile,
    g: Tensor | None,
    text: Tensor,
    left: Tensor | None = None,
    right: Tensor | None = None,
    factor: float = 0.0,
    scaled: bool = False,
    image: Tensor | None = None,
    d_text: Tensor | None = None,
) -> dict[str, Any]:
    """Gradient and FeatureGradients of csrc/*.h: G = left_i g_ij right_j factor, times logit_scale if scaled."""
    return {
        "g": address(g),
        "g_stride": 0 if g is None else g.stride(0),
        "left": address(left),
        "right": address(right),
        "factor": factor,
        "scaled": scaled,
        "image": address(image),
        "image_stride": 0 if image is None else image.stride(0),
        "image_type": 0 if image is None else DTYPES[image.dtype],
        "text": address(d_text),
        "text_stride": 0 if d_text is None else d_text.stride(0),
        **launch_on(block.x),
    }


def _block(block: ScoreTile) -> tuple[int, int]:
    """Rows and columns of a block of scores; see the table."""
    return tuple(tuned.lookup("pairs", tuned.gpu("pairs", block.x.device), "block", dim=block.x.shape[1]))


def _band(block: ScoreTile, trained: bool) -> int:
    """Rows of which G is held at once."""
    size = tuned.lookup("pairs", tuned.gpu("pairs", block.x.device), "band", trained=trained)["bytes"]
    high, row = _block(block)[0], block.x.element_size() * max(1, len(block.t))
    return max(high, size // row // high * high)


def _room(block: ScoreTile, high: int, wide: int) -> Tensor:
    """For the products of a block of so many rows and columns, or of all there are."""
    return _matrix(min(high, len(block.x)), min(wide, len(block.t)), block.x, torch.float32)


def _matrix(rows: int, cols: int, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """[rows, cols], uninitialised, each row aligned for 16-byte accesses and the tensor cores."""
    return torch.empty((rows, -(-cols // 8) * 8), dtype=dtype or like.dtype, device=like.device)[:, :cols]


def _floats(count: int, like: Tensor) -> Tensor:
    return torch.empty(count, dtype=torch.float32, device=like.device)


def _gemm(x: Tensor) -> tuple[int, int]:
    """cublasGemmEx and torch's handle for it, which has the current stream and torch's workspace."""
    if x.device.index == torch.cuda.current_device():
        return _gemm_ex(), torch.cuda.current_blas_handle()
    with torch.cuda.device(x.device):
        return _gemm_ex(), torch.cuda.current_blas_handle()


@functools.cache
def _gemm_ex() -> int:
    """The address of cublasGemmEx in the cuBLAS that torch has loaded. Raises OSError."""
    major = (torch.version.cuda or "0").split(".")[0]
    library = ctypes.CDLL(f"libcublas.so.{major}", mode=os.RTLD_NOW | os.RTLD_NOLOAD)
    address = ctypes.cast(library.cublasGemmEx, ctypes.c_void_p).value
    assert address
    return address
