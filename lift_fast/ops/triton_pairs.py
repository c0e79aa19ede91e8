"""The pair losses' blocks on a GPU, in Triton: kernels that form the scores themselves, or work on cuBLAS's.

Both forms do the same to a score (kernels/contrastive.py, kernels/sigmoid.py). A score's way through memory costs 8
bytes, or L2 traffic where the block stays there; cuBLAS forms it faster than Triton's dot does, and its epilogue
runs beside nothing. So the kernels form the scores themselves below FUSED_BELOW features (dim), from int8 texts as they
are, and else cuBLAS does, from texts that `operand` widens. float32 always goes to cuBLAS, and never by way of tf32.

The gradients are products of one matrix, G = alpha · scale · a · q · g, with the texts and with the images.
"""

import functools

import torch
from torch import Tensor

from . import triton_blocks
from .pairs import Block, exact_float32
from .torch_pairs import own_pairs  # noqa: F401  part of this backend

HALF = (torch.bfloat16, torch.float16)
# By major compute capability, the last that is not above the device's. Not measured yet. 8 bytes a score at
# 3 TB/s against 2 · dim FLOP at 600 rather than 800 TFLOP/s would break even at a dim of 3 000, were the epilogue
# not exposed (as long as 500 of dim) and the scores not in the L2 cache; siglip-kernel reports on an H100 that
# cuBLAS is ahead at 768. On 10.x Triton's dot without descriptors is further behind.
FUSED_BELOW = {8: 768, 9: 768, 10: 256, 12: 768}
FLOAT16_UP = 1024.0  # 1 / rows is subnormal in float16


def why_not() -> str | None:
    if reason := triton_blocks.why_not():
        return reason
    if torch.cuda.is_available() and "dtype" not in torch.ops.aten.mm.overloads():
        return f"torch {torch.__version__} has no torch.mm(..., out_dtype=...); install torch >= 2.8"
    return None


def operand(t: Tensor, dtype: torch.dtype) -> Tensor:
    """What the blocks' t should be, for texts or codes t [cols, dim] beside images of this dtype.

    int8 codes in dtype, exactly, if cuBLAS is to form the scores; else t itself. A block may hold codes either way,
    which are then widened in every call that needs it.
    """
    return t.to(dtype) if t.dtype == torch.int8 and not _fuses(t, dtype) else t


def room(rows: int, cols: int, like: Tensor) -> Tensor:
    return _apart(rows, cols, like.dtype, like.device)


def stats(block: Block, row: Tensor, col: Tensor, own: Tensor, keep: Tensor | None) -> None:
    from ..kernels import contrastive

    if not len(block.x) or not len(block.t):
        return
    rest = block.a, block.q, block.scale, block.bias, block.offset
    with torch.cuda.device_of(block.x):
        if _fused(block):
            contrastive.scores_stats(block.x, block.t, *rest, row, col, own, keep)
        else:
            contrastive.stats(_scores(block, keep), *rest, row, col, own)


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
    from ..kernels import contrastive

    rest = block.a, block.q, block.scale, block.bias, block.offset, row, col, row_weight, col_weight, own_g
    with torch.cuda.device_of(block.x):
        if _nothing(block, d_image, d_text):
            return
        factor, undo = _factor(block, alpha)
        if kept is None and _fused(block):
            g = _scratch(block, block.x.dtype)
            contrastive.scores_grad(block.x, block.t, *rest, factor, g)
        else:
            p = _scores(block) if kept is None else kept
            g = p if kept is None and block.x.dtype == p.dtype else _scratch(block, block.x.dtype)
            contrastive.grad(p, *rest, factor, g)
            del p
        _features(block, g, undo, d_image, d_text)


def sigmoid(
    block: Block,
    alpha: float,
    loss: Tensor,
    d_scale: Tensor,
    d_bias: Tensor,
    d_image: Tensor | None,
    d_text: Tensor | None,
) -> None:
    from ..kernels import sigmoid as kernels

    if not len(block.x) or not len(block.t):
        _nothing(block, d_image, d_text)
        return
    rest = block.a, block.q, block.scale, block.bias, block.offset, alpha
    sums = loss, d_scale, d_bias
    with torch.cuda.device_of(block.x):
        wanted = d_image is not None or d_text is not None
        factor, undo = _factor(block, alpha) if wanted else (block.scale, None)
        g = None
        if _fused(block):
            g = _scratch(block, block.x.dtype) if wanted else None
            kernels.scores_sigmoid(block.x, block.t, *rest, factor, *sums, g)
        else:
            p = _scores(block)
            if wanted:
                g = p if block.x.dtype == p.dtype else _scratch(block, block.x.dtype)
            kernels.sigmoid(p, *rest, factor, *sums, g)
            del p
        if g is not None:
            _features(block, g, undo, d_image, d_text)


def _nothing(block: Block, d_image: Tensor | None, d_text: Tensor | None) -> bool:
    """Whether there is nothing to multiply; an empty sum is zero."""
    if len(block.x) and len(block.t):
        return d_image is None and d_text is None
    if d_image is not None:
        d_image.zero_()
    return True


def _fused(block: Block) -> bool:
    """Whether the kernels form the scores."""
    return _fuses(block.t, block.x.dtype) and _fuses(block.x, block.x.dtype)


def _fuses(features: Tensor, dtype: torch.dtype) -> bool:
    """Whether the kernels form the scores of these features, x or t, beside others that they can load; dtype: x's."""
    from ..kernels.pairs import aligned

    if dtype not in HALF or (features.is_cuda and not aligned(features)):
        return False
    major = torch.cuda.get_device_capability(features.device)[0] if features.is_cuda else 8
    return features.shape[1] < FUSED_BELOW[max(known for known in FUSED_BELOW if known <= major)]


def _widened(block: Block) -> Tensor:
    """The texts in x's dtype; int8 codes are exact in all of them."""
    return block.t.to(block.x.dtype)


def _scratch(block: Block, dtype: torch.dtype) -> Tensor:
    return _apart(len(block.x), len(block.t), dtype, block.x.device)


def _apart(rows: int, cols: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[rows, cols], the rows apart by a multiple of 16 elements, for wide loads and stores."""
    return torch.empty((rows, -(-cols // 16) * 16), dtype=dtype, device=device)[:, :cols]


def _scores(block: Block, keep: Tensor | None = None) -> Tensor:
    """x @ tᵀ in float32, into keep if that is given."""
    return _product(block.x, _widened(block).T, _scratch(block, torch.float32) if keep is None else keep)


def _factor(block: Block, alpha: float) -> tuple[Tensor, Tensor | None]:
    """What g is multiplied by before it is rounded, and for float16 what its products are, afterwards."""
    wanted = block.scale if alpha == 1 else block.scale * alpha
    if block.x.dtype != torch.float16:
        return wanted, None
    return torch.full_like(wanted, FLOAT16_UP), wanted / FLOAT16_UP


def _features(block: Block, g: Tensor, undo: Tensor | None, d_image: Tensor | None, d_text: Tensor | None) -> None:
    """The features' gradients from those of their products."""
    if undo is not None:
        return _float16_features(block, g, undo, d_image, d_text)
    if d_image is not None:
        _product(g, _widened(block), d_image)
    if d_text is not None:
        if g.dtype == torch.float32:
            with exact_float32():
                d_text.addmm_(g.T, block.x)
        elif g.is_cuda and _addmm_widens():
            torch.addmm(d_text, g.T, block.x, out_dtype=torch.float32, out=d_text)
        else:
            d_text += _product(g.T, block.x, torch.empty_like(d_text))


def _float16_features(block: Block, g: Tensor, undo: Tensor, d_image: Tensor | None, d_text: Tensor | None) -> None:
    """The same from g without a and q: the features take one of them before the product, the result the other."""
    a, q = (scales if scales is None else scales[:, None] for scales in (block.a, block.q))
    if d_image is not None:
        t = block.t if q is None else block.t * q
        d = _product(g, t.to(g.dtype), torch.empty_like(d_image, dtype=torch.float32))
        torch.mul(d, undo if a is None else undo * a, out=d_image)
    if d_text is not None:
        x = block.x if a is None else block.x * a
        d_text.addcmul_(_product(g.T, x.to(g.dtype), torch.empty_like(d_text)), undo if q is None else undo * q)


def _product(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """out = left @ right, summed in float32 and rounded to out's dtype."""
    if left.dtype == torch.float32:
        with exact_float32():
            return torch.mm(left, right, out=out)
    if left.is_cuda and left.dtype == out.dtype:
        return torch.mm(left, right, out=out)
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32, out=out)
    return out.copy_(left.float() @ right.float())  # torch's mm on the CPU has no out_dtype


@functools.cache
def _addmm_widens() -> bool:
    """Whether this torch adds a product of bfloat16 to float32 in place; the first to have out_dtype do not."""
    one, total = (torch.zeros((16, 16), dtype=dtype, device="cuda") for dtype in (torch.bfloat16, torch.float32))
    try:
        torch.addmm(total, one, one, out_dtype=torch.float32, out=total)
    except RuntimeError:
        return False
    return True
