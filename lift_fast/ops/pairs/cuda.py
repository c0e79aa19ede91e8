"""The "cuda" backend of the pair losses: cuBLAS for the matrix products, csrc/pairs/*.cu for everything between them.

score_tiles.cu loops over blocks of rows and columns whose products x · tᵀ, float32, stay in the GPU's L2 cache. One
call makes a whole pass over a ScoreTile; no Python runs inside the loop. The gradients' matrix products read one more
matrix of the features' dtype, G, for all columns and a band of rows at a time:

    G_ij = alpha · scale · a_i g_ij q_j          d_image = G t,   d_text += Gᵀ x

a_i is common to row i and q_j to column j, so the same G serves both sides and nothing is scaled afterwards. In
float16, whose range ends at 6e-8, G is 1024 g_ij q_j for the images and 1024 a_i g_ij for the texts, in two passes
if both are needed, and the remaining factors are multiplied onto the float32 results.
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
from .contract import FeatureGradients, ScoreTile, SigmoidSums, SoftmaxGradient, exact

UP = 1024.0  # 1 / rows is subnormal in float16


def why_not() -> str | None:
    if reason := why_no_cuda():
        return reason
    try:
        _gemm_ex()
    except OSError as error:
        return f"torch's cuBLAS cannot be found: {error}"
    return None


def operand(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Texts as the products read them: features unchanged, int8 codes widened, once for all tiles of the same text."""
    return widen(t, dtype) if t.dtype == torch.int8 else t


def allocate(rows: int, cols: int, like: Tensor) -> Tensor:
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


def stats(scores: ScoreTile, row: Tensor, col: Tensor, positive: Tensor, keep: Tensor | None) -> None:
    text, (high, wide) = operand(scores.t, scores.x.dtype), _block(scores)
    products = _allocate_products(scores, high, wide) if keep is None else keep
    scratch = _floats(_C.contrastive_stats_scratch(len(scores.x), len(text), high, wide), scores.x)
    with exact(scores.x.dtype):
        _C.contrastive_stats_cuda(
            **_pass(scores, text, high, wide, products, keep is not None), row=row.data_ptr(), row_stride=row.stride(0),
            col=col.data_ptr(), col_stride=col.stride(0), own=positive.data_ptr(), scratch=scratch.data_ptr(),
            **launch_on(scores.x),
        )  # fmt: skip


def positives(row: Tensor, col: Tensor, positive: Tensor, scale: Tensor, bias: Tensor, weight: float) -> Tensor:
    out = _floats(9 * len(positive), positive).view(9, len(positive))
    _C.own_pairs_cuda(
        row=row.data_ptr(), row_stride=row.stride(0), col=col.data_ptr(), col_stride=col.stride(0),
        own=positive.data_ptr(), n=len(positive), scale=scale.data_ptr(), bias=bias.data_ptr(), weight=weight,
        out=out.data_ptr(), **launch_on(positive),
    )  # fmt: skip
    return out


def grads(scores: ScoreTile, g: SoftmaxGradient, alpha: float, kept: Tensor | None, out: FeatureGradients) -> None:
    def fill(start: int, stop: int, matrix: dict[str, Any], gradient: dict[str, Any]) -> None:
        row = g.row[:, start:stop]
        _C.contrastive_gradient_cuda(
            **matrix, row=row.data_ptr(), row_stride=row.stride(0), col=g.col.data_ptr(), col_stride=g.col.stride(0),
            row_weight=g.row_weight, col_weight=g.col_weight, own_g=g.positive[start:stop].data_ptr(), **gradient,
        )  # fmt: skip

    if out.image is not None or out.text is not None:
        _features(scores, alpha, kept, out, fill)


def sigmoid(scores: ScoreTile, alpha: float, sums: SigmoidSums, out: FeatureGradients) -> None:
    scratch = _floats(_C.sigmoid_scratch(len(scores.x), len(scores.t), *_block(scores)), scores.x)
    summed = 0  # rows whose sums are complete: float16's second pass over a band must not add them again

    def fill(start: int, stop: int, matrix: dict[str, Any], gradient: dict[str, Any]) -> None:
        nonlocal summed
        first_pass = start >= summed
        loss, d_scale, d_bias = (one[start:stop].data_ptr() if first_pass else 0 for one in sums)
        _C.sigmoid_cuda(
            **matrix, alpha=alpha, loss=loss, d_scale=d_scale, d_bias=d_bias, scratch=scratch.data_ptr(), **gradient
        )
        summed = max(summed, stop)

    if out.image is None and out.text is None:
        text, (high, wide) = operand(scores.t, scores.x.dtype), _block(scores)
        products = _allocate_products(scores, high, wide)
        with exact(scores.x.dtype):
            fill(0, len(scores.x), _pass(scores, text, high, wide, products, False), _gradient(scores, None))
    else:
        _features(scores, alpha, None, out, fill)


def _features(
    scores: ScoreTile,
    alpha: float,
    kept: Tensor | None,
    out: FeatureGradients,
    fill: Callable[[int, int, dict[str, Any], dict[str, Any]], None],
) -> None:
    """The features' gradients, one band of rows after the other.

    fill(start, stop, matrix, gradient) makes a pass over rows start..stop-1 with the arguments of `_pass` and
    `_gradient`.
    """
    text, rows = operand(scores.t, scores.x.dtype), len(scores.x)
    band = min(rows, _band(scores, out.text is not None))
    high, wide = _block(scores)
    matrix_g = _matrix(band, len(text), scores.x)
    in_place = kept is None and scores.x.dtype == torch.float32
    products = None if in_place or kept is not None else _allocate_products(scores, high, wide)
    half = scores.x.dtype == torch.float16
    factor = scores.scale * (alpha / UP) if half else None
    with exact(scores.x.dtype):
        for start in range(0, rows, band):
            stop = min(rows, start + band)
            part, g = scores.rows(start, stop), matrix_g[: stop - start]
            matrix = _pass(part, text, high, wide, kept[start:stop] if kept is not None else products, kept is not None)
            image = None if out.image is None else out.image[start:stop]
            if factor is None:
                fill(start, stop, matrix, _gradient(part, g, part.a, part.q, alpha, True, image, out.text))
                continue
            if image is not None:
                d = torch.empty(image.shape, dtype=torch.float32, device=image.device)
                fill(start, stop, matrix, _gradient(part, g, None, part.q, UP, False, d, None))
                torch.mul(d if part.a is None else d.mul_(part.a[:, None]), factor, out=image)
            if out.text is not None:
                d = torch.zeros_like(out.text)
                fill(start, stop, matrix, _gradient(part, g, part.a, None, UP, False, None, d))
                out.text.addcmul_(d, (factor.expand(len(text)) if part.q is None else factor * part.q)[:, None])


def _pass(scores: ScoreTile, text: Tensor, high: int, wide: int, products: Tensor | None, kept: bool) -> dict[str, Any]:
    """The arguments of _C that all passes share: addresses, strides, sizes and cuBLAS (see score_tiles.h).

    products None: the products lie where G will.
    """
    x = scores.x
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
        "a": address(scores.a),
        "q": address(scores.q),
        "scale": scores.scale.data_ptr(),
        "bias": scores.bias.data_ptr(),
        "offset": scores.offset,
        "block_rows": high,
        "block_cols": wide,
        "products": address(products),
        "products_stride": 0 if products is None else products.stride(0),
        "kept": kept,
        "gemm": gemm,
        "handle": handle,
    }


def _gradient(
    scores: ScoreTile,
    g: Tensor | None,
    left: Tensor | None = None,
    right: Tensor | None = None,
    factor: float = 0.0,
    scaled: bool = False,
    image: Tensor | None = None,
    d_text: Tensor | None = None,
) -> dict[str, Any]:
    """The arguments of _C for gradients: G = left_i g_ij right_j factor, times logit_scale if scaled."""
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
        **launch_on(scores.x),
    }


def _block(scores: ScoreTile) -> tuple[int, int]:
    """Rows and columns of a block, whose products fit the L2 cache; from the table."""
    return tuple(tuned.lookup("pairs", tuned.gpu("pairs", scores.x.device), "block", dim=scores.x.shape[1]))


def _band(scores: ScoreTile, trained: bool) -> int:
    """Rows of G in memory at a time."""
    size = tuned.lookup("pairs", tuned.gpu("pairs", scores.x.device), "band", trained=trained)["bytes"]
    high, row = _block(scores)[0], scores.x.element_size() * max(1, len(scores.t))
    return max(high, size // row // high * high)


def _allocate_products(scores: ScoreTile, high: int, wide: int) -> Tensor:
    """Memory for the products of one block of high × wide, or of the whole tile if that is smaller."""
    return _matrix(min(high, len(scores.x)), min(wide, len(scores.t)), scores.x, torch.float32)


def _matrix(rows: int, cols: int, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """[rows, cols], uninitialized, each row aligned for 16-byte accesses and the tensor cores."""
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
