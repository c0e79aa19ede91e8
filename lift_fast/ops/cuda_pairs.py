"""The pair losses' blocks on a GPU: cuBLAS through torch for the matrix products, csrc/*.cu for all between them.

A block's products x · tᵀ are one float32 matrix of scratch memory, or the caller's `keep`; a chunk of rows for which
they fit in the GPU's L2 (512 × 16 384: 32 MB) never goes to its HBM. The gradients' matrix products take in one
more matrix of the features' dtype, k:

    k_ij = alpha · scale · a_i g_ij q_j          d_image = k t,   d_text += kᵀ x

a_i is common to row i and q_j to column j, so the same k serves both sides and nothing is scaled afterwards. In
float16, whose range ends at 6e-8, k is 1024 g_ij q_j for the images and 1024 a_i g_ij for the texts, two passes
where both are wanted, and the rest is multiplied onto the float32 results.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .dequant import _C, DTYPES, _why_no_cuda
from .pairs import Block, exact_float32

UP = 1024.0  # 1 / rows is subnormal in float16
PANEL = 1 << 22  # elements of a text gradient that are computed before they are added: 16 MB


def why_not() -> str | None:
    return _why_no_cuda()


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
        **_where(codes),
    )  # fmt: skip
    return out


def stats(block: Block, row: Tensor, col: Tensor, own: Tensor, keep: Tensor | None) -> None:
    products = _products(block, operand(block.t, block.x.dtype), keep)
    scratch = _floats(_C.contrastive_stats_scratch(*products.shape), products)
    _C.contrastive_stats_cuda(
        **_scores(block, products), row=row.data_ptr(), row_stride=row.stride(0), col=col.data_ptr(),
        col_stride=col.stride(0), own=own.data_ptr(), scratch=scratch.data_ptr(), **_where(products),
    )  # fmt: skip


def grads(
    block: Block,
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
    if d_image is None and d_text is None:
        return
    text = operand(block.t, block.x.dtype)
    products = _products(block, text, None) if kept is None else kept

    def fill(k: dict[str, Any]) -> None:
        _C.contrastive_gradient_cuda(
            **_scores(block, products), row=row.data_ptr(), row_stride=row.stride(0), col=col.data_ptr(),
            col_stride=col.stride(0), row_weight=row_weight, col_weight=col_weight, own_g=own_g.data_ptr(), **k,
            **_where(products),
        )  # fmt: skip

    _features(block, text, alpha, products if kept is None else None, d_image, d_text, fill)


def sigmoid(
    block: Block,
    alpha: float,
    loss: Tensor,
    d_scale: Tensor,
    d_bias: Tensor,
    d_image: Tensor | None,
    d_text: Tensor | None,
) -> None:
    text = operand(block.t, block.x.dtype)
    products = _products(block, text, None)
    scratch = _floats(_C.sigmoid_scratch(*products.shape), products)
    sums: dict[str, Any] = {"loss": loss.data_ptr(), "d_scale": d_scale.data_ptr(), "d_bias": d_bias.data_ptr()}

    def fill(k: dict[str, Any]) -> None:
        _C.sigmoid_cuda(
            **_scores(block, products), alpha=alpha, **sums, scratch=scratch.data_ptr(), **k, **_where(products)
        )
        sums.update(dict.fromkeys(sums, 0))  # a second pass must not add them again

    if d_image is None and d_text is None:
        fill(_gradient(None, None, None, 0.0, False))
    else:
        _features(block, text, alpha, products, d_image, d_text, fill)


def _features(
    block: Block,
    text: Tensor,
    alpha: float,
    scratch: Tensor | None,
    d_image: Tensor | None,
    d_text: Tensor | None,
    fill: Callable[[dict[str, Any]], None],
) -> None:
    """The features' gradients. fill computes a matrix of gradients as _gradient describes it; scratch: float32
    [rows, cols] that may be overwritten with one."""
    x, a, q = block.x, block.a, block.q
    rows, cols = len(x), len(text)
    if x.dtype != torch.float16:
        k = scratch if x.dtype == torch.float32 and scratch is not None else _matrix(rows, cols, x)
        fill(_gradient(k, a, q, alpha, True))
        if d_image is not None and d_image.dtype == torch.float32:
            _mm(k, text, d_image)
        elif d_image is not None:
            d_image.copy_(_mm(k, text))
        if d_text is not None:
            _add(d_text, k, x, None)
        return

    factor = block.scale * (alpha / UP)
    k = _matrix(rows, cols, x)
    if d_image is not None:
        fill(_gradient(k, None, q, UP, False))
        d = _mm(k, text)
        torch.mul(d if a is None else d.mul_(a[:, None]), factor, out=d_image)
    if d_text is not None:
        if d_image is None or a is not None or q is not None:
            fill(_gradient(k, a, None, UP, False))
        _add(d_text, k, x, factor.expand(cols) if q is None else factor * q)


def _add(d_text: Tensor, k: Tensor, x: Tensor, factor: Tensor | None) -> None:
    """d_text += factor · kᵀ x, in panels: no second matrix of d_text's size, and what is added comes from the L2."""
    cols, dim = d_text.shape
    step = max(8, PANEL // dim // 8 * 8)
    for start in range(0, cols, step):
        part = slice(start, start + step)
        d = _mm(k[:, part].T, x)
        if factor is None:
            d_text[part].add_(d)
        else:
            d_text[part].addcmul_(d, factor[part, None])


def _products(block: Block, text: Tensor, out: Tensor | None) -> Tensor:
    """x · tᵀ in float32."""
    return _mm(block.x, text.T, _matrix(len(block.x), len(text), block.x, torch.float32) if out is None else out)


def _matrix(rows: int, cols: int, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """[rows, cols], uninitialised, each row aligned for 16-byte accesses and the tensor cores."""
    return torch.empty((rows, -(-cols // 8) * 8), dtype=dtype or like.dtype, device=like.device)[:, :cols]


def _floats(count: int, like: Tensor) -> Tensor:
    return torch.empty(count, dtype=torch.float32, device=like.device)


def _mm(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a @ b, summed and returned in float32. The out variants: autocast leaves them alone."""
    if out is None:
        out = torch.empty((a.shape[0], b.shape[1]), dtype=torch.float32, device=a.device)
    if a.dtype == torch.float32:
        with exact_float32():
            return torch.mm(a, b, out=out)
    return torch.mm(a, b, out_dtype=torch.float32, out=out)


def _scores(block: Block, products: Tensor) -> dict[str, Any]:
    """Scores of csrc/pairs_cuda.h, in addresses and counts."""
    rows, cols = products.shape
    return {
        "products": products.data_ptr(),
        "stride": products.stride(0),
        "rows": rows,
        "cols": cols,
        "a": _address(block.a),
        "q": _address(block.q),
        "scale": block.scale.data_ptr(),
        "bias": block.bias.data_ptr(),
        "offset": block.offset,
    }


def _gradient(
    out: Tensor | None, left: Tensor | None, right: Tensor | None, factor: float, scaled: bool
) -> dict[str, Any]:
    """Gradient of csrc/pairs_cuda.h: out = left_i g_ij right_j factor, times logit_scale if scaled."""
    return {
        "out": _address(out),
        "out_stride": 0 if out is None else out.stride(0),
        "type": 0 if out is None else DTYPES[out.dtype],
        "left": _address(left),
        "right": _address(right),
        "factor": factor,
        "scaled": scaled,
    }


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _where(tensor: Tensor) -> dict[str, Any]:
    stream = torch.cuda.current_stream(tensor.device).cuda_stream
    return {"device": tensor.device.index, "stream": stream}
