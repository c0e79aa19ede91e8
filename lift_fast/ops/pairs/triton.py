"""The pair losses' blocks on a GPU, in Triton: kernels that form the scores themselves, or work on cuBLAS's.

Both do the same to a score (kernels/contrastive.py, kernels/sigmoid.py). A score's way through memory costs 8
bytes, or L2 traffic where the block stays there; cuBLAS forms it faster than Triton's dot does, and its epilogue runs
beside nothing. So the kernels form the scores themselves up to a dim that the table knows ("fused_up_to"), from int8
texts as they are, with a program a tile or a few that stay ("form"). Above it cuBLAS does, from texts that `operand`
widens, in blocks of rows and columns that stay in the L2 cache ("block"). float32 always goes to cuBLAS, and never by
way of tf32.

The gradients are products of one matrix, G = alpha · scale · a · q · g, with the texts and with the images. G is there
for a band of rows and all columns at a time ("band"), so that each side's gradient is one product a band.
"""

import contextlib
import functools
from collections.abc import Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import tuned
from ..backends import why_no_triton
from .contract import ScoreTile, exact_float32

if TYPE_CHECKING:
    from ...kernels.pairs import Tile

HALF = (torch.bfloat16, torch.float16)
FLOAT16_UP = 1024.0  # 1 / rows is subnormal in float16
Span = tuple[int, int]  # rows or columns, from and to


def why_not() -> str | None:
    if reason := why_no_triton():
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
    """The rows apart by a multiple of 16 elements, for wide loads and stores."""
    return like.new_empty((rows, -(-cols // 16) * 16))[:, :cols]


def stats(block: ScoreTile, row: Tensor, col: Tensor, own: Tensor, keep: Tensor | None) -> None:
    from ...kernels import contrastive, pairs

    x, rows, cols = block.x, len(block.x), len(block.t)
    if not rows or not cols:
        return
    with _on(x):
        facts = pairs.facts(rows, cols, block.a, block.q, block.scale, block.bias)
        scores, kind = None if _fused(block) else _Scores(block, keep), "stats" if keep is None else "keep"
        tile, form = (_tile(block, kind), _form(block, kind)) if scores is None else (_stored(x), contrastive)
        merge = _setting(x, "merge")
        most = _setting(x, "parts")["bytes"] // (12 * (-(-cols // tile.rows) - (-cols // tile.cols)))
        for start, stop in _spans(rows, most, pairs.PAD) if scores is None else _spans(rows, scores.high):
            parts = pairs.partials(stop - start, cols, tile, True, x)
            if scores is None:
                form.scores_stats(x, block.t, facts, own, keep, *parts, (start, stop), block.offset, tile)
            else:
                for across, p in scores.of(start, stop):
                    contrastive.stats(p, facts, own, *parts, (start, stop), across, block.offset, tile)
            pairs.merge_softmax(*parts, row[:, start:stop], col, block.scale, block.bias, merge)


def own_pairs(row: Tensor, col: Tensor, own: Tensor, scale: Tensor, bias: Tensor, weight: float) -> Tensor:
    from ...kernels import contrastive

    out = own.new_empty((9, len(own)))
    with _on(own):
        contrastive.own_pairs(row, col, own, scale, bias, weight, out)
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
    from ...kernels import contrastive, pairs

    x, rows, cols = block.x, len(block.x), len(block.t)
    if _nothing(block, d_image, d_text):
        return
    with _on(x):
        factor, undo = _factor(block, alpha)
        facts = pairs.facts(
            rows, cols, block.a, block.q, block.scale, block.bias, factor, row, col, row_weight, col_weight,
            undo is not None,
        )  # fmt: skip
        fused = kept is None and _fused(block)
        scores = None if fused or kept is not None else _Scores(block)
        tile, form = (_tile(block, "grad"), _form(block, "grad")) if fused else (_stored(x), contrastive)
        bands = _Bands(block, d_text is not None)
        for start, stop in bands.spans:
            if kept is not None:
                contrastive.grad(kept[start:stop], facts, own_g, bands.g, (start, stop), (0, cols), block.offset, tile)
            elif scores is None:
                form.scores_grad(x, block.t, facts, own_g, bands.g, (start, stop), block.offset, tile)
            else:
                for down in _spans(stop, scores.high, first=start):
                    for across, p, g in scores.beside(bands.g[down[0] - start :], *down):
                        contrastive.grad(p, facts, own_g, g, down, across, block.offset, tile)
            _features(block, bands.texts, bands.g[: stop - start, :cols], (start, stop), undo, d_image, d_text)


def sigmoid(
    block: ScoreTile,
    alpha: float,
    loss: Tensor,
    d_scale: Tensor,
    d_bias: Tensor,
    d_image: Tensor | None,
    d_text: Tensor | None,
) -> None:
    from ...kernels import pairs
    from ...kernels import sigmoid as kernels

    x, rows, cols, bias, offset = block.x, len(block.x), len(block.t), block.bias, block.offset
    wanted = not _nothing(block, d_image, d_text)
    if not rows or not cols:
        return
    with _on(x):
        factor, undo = _factor(block, alpha) if wanted else (None, None)
        facts = pairs.facts(rows, cols, block.a, block.q, block.scale, bias, factor, narrow=undo is not None)
        scores = None if _fused(block) else _Scores(block)
        tile = _tile(block, "sigmoid") if scores is None else _stored(x)
        bands = _Bands(block, d_text is not None) if wanted else None
        merge, sums = _setting(x, "merge"), (loss, d_scale, d_bias)
        most = _setting(x, "parts")["bytes"] // (12 * -(-cols // tile.cols))
        for start, stop in bands.spans if bands else _spans(rows, most, pairs.PAD):
            parts, _ = pairs.partials(stop - start, cols, tile, False, x)
            if scores is None:
                g = bands.g if bands else None
                kernels.scores_sigmoid(x, block.t, facts, bias, alpha, parts, g, (start, stop), offset, tile)
            else:
                for down in _spans(stop, scores.high, first=start):
                    some = parts[:, :, down[0] - start :]
                    for across, p, g in scores.beside(bands.g[down[0] - start :] if bands else None, *down):
                        kernels.sigmoid(p, facts, bias, alpha, some, g, down, across, offset, tile)
            pairs.merge_sums(parts, *(out[start:stop] for out in sums), merge)
            if bands:
                _features(block, bands.texts, bands.g[: stop - start, :cols], (start, stop), undo, d_image, d_text)


class _Scores:
    """cuBLAS's products of a block's rows with blocks of its columns, one at a time."""

    def __init__(self, block: ScoreTile, keep: Tensor | None = None):
        """keep: where all of them are to stay."""
        tile = _stored(block.x)
        high, wide = (
            max(side, n // side * side)
            for n, side in zip(_setting(block.x, "block", dim=block.x.shape[1]), tile[:2], strict=True)
        )
        t, self.x, self.keep, self.high = _widened(block), block.x, keep, high
        self.columns = [(span, t[span[0] : span[1]].T) for span in _spans(len(t), wide)]
        self.p: Tensor | None = None
        self.size = min(high, len(block.x)), min(wide, len(t))

    def of(self, start: int, stop: int) -> Iterator[tuple[Span, Tensor]]:
        """The columns, from and to, and their products."""
        x = self.x[start:stop]
        for (first, last), right in self.columns:
            out = self._room(stop - start, last - first) if self.keep is None else self.keep[start:stop, first:last]
            yield (first, last), _product(x, right, out)

    def beside(self, band: Tensor | None, start: int, stop: int) -> Iterator[tuple[Span, Tensor, Tensor | None]]:
        """The same, and where their gradients go in the rows from start on of G: products of float32 lie there too."""
        x = self.x[start:stop]
        for (first, last), right in self.columns:
            g = None if band is None else band[:, first:]
            if g is not None and g.dtype == torch.float32:
                out = g[: stop - start, : last - first]
            else:
                out = self._room(stop - start, last - first)
            yield (first, last), _product(x, right, out), g

    def _room(self, rows: int, cols: int) -> Tensor:
        if self.p is None:
            self.p = room(*self.size, self.x.new_empty(0, dtype=torch.float32))
        return self.p[:rows, :cols]


class _Bands:
    """G for some rows and all columns of a block, with room for whole tiles; each band's rows; the texts beside it."""

    def __init__(self, block: ScoreTile, trained: bool):
        from ...kernels import pairs

        x, rows, wide = block.x, len(block.x), pairs.padded(len(block.t))
        most = _setting(x, "band", trained=trained)["bytes"] // (wide * x.element_size())
        self.spans = list(_spans(rows, most, pairs.PAD))
        self.texts = _widened(block)
        self.g = x.new_empty((pairs.padded(self.spans[0][1]), wide))


def _spans(n: int, most: int, multiple: int = 1, first: int = 0) -> Iterator[Span]:
    """first..n-1 in spans of at most `most`, a multiple, but at least one."""
    step = max(multiple, most // multiple * multiple)
    for start in range(first, n, step):
        yield start, min(n, start + step)


def _on(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """x's GPU is the current one inside, and float32 products are exact."""
    here = x.is_cuda and x.device.index != torch.cuda.current_device()
    if x.dtype != torch.float32:
        return torch.cuda.device(x.device) if here else contextlib.nullcontext()
    stack = contextlib.ExitStack()
    if here:
        stack.enter_context(torch.cuda.device(x.device))
    stack.enter_context(exact_float32())
    return stack


def _setting(x: Tensor, name: str, **facts: int | str | bool) -> Any:
    return tuned.lookup("pairs", tuned.gpu("pairs", x.device), name, **facts)


def _tile(block: ScoreTile, kind: str) -> "Tile":
    """The tile of the kernels that form the scores; kind: "stats", "keep" (stats that also stores them), ..."""
    from ...kernels.pairs import Tile, aligned

    return Tile(*_setting(block.x, "tile", kind=kind, aligned=aligned(block.x) and aligned(block.t)))


def _form(block: ScoreTile, kind: str) -> ModuleType:
    """Whose kernels form the scores: a program a tile, or programs that stay if those can load the features."""
    from ...kernels import contrastive

    if kind == "keep" or _setting(block.x, "form", kind=kind) == "plain":
        return contrastive
    from ...kernels import persistent

    able = block.x.dtype == block.t.dtype and persistent.describes(block.x) and persistent.describes(block.t)
    return persistent if able else contrastive


def _stored(x: Tensor) -> "Tile":
    """The tile of the kernels over products in memory."""
    from ...kernels.pairs import Tile

    return Tile(*_setting(x, "stored"))


def _nothing(block: ScoreTile, d_image: Tensor | None, d_text: Tensor | None) -> bool:
    """Whether there is nothing to multiply; an empty sum is zero."""
    if len(block.x) and len(block.t):
        return d_image is None and d_text is None
    if d_image is not None:
        d_image.zero_()
    return True


def _fused(block: ScoreTile) -> bool:
    """Whether the kernels form the scores."""
    return _fuses(block.t, block.x.dtype) and _fuses(block.x, block.x.dtype)


def _fuses(features: Tensor, dtype: torch.dtype) -> bool:
    """Whether the kernels form the scores of these features, x or t, beside others that they can load; dtype: x's."""
    from ...kernels.pairs import aligned

    if dtype not in HALF or (features.is_cuda and not aligned(features)):
        return False
    return features.shape[1] <= _setting(features, "fused_up_to")


def _widened(block: ScoreTile) -> Tensor:
    """The texts in x's dtype; int8 codes are exact in all of them."""
    return block.t.to(block.x.dtype)


def _factor(block: ScoreTile, alpha: float) -> tuple[Tensor, Tensor | None]:
    """What g is multiplied by before it is rounded, and for float16 what its products are, afterwards."""
    wanted = block.scale if alpha == 1 else block.scale * alpha
    if block.x.dtype != torch.float16:
        return wanted, None
    return torch.full_like(wanted, FLOAT16_UP), wanted / FLOAT16_UP


def _features(
    block: ScoreTile,
    texts: Tensor,
    g: Tensor,
    rows: Span,
    undo: Tensor | None,
    d_image: Tensor | None,
    d_text: Tensor | None,
) -> None:
    """The features' gradients from those of the products of these rows."""
    start, stop = rows
    x = block.x[start:stop]
    out = None if d_image is None else d_image[start:stop]
    if undo is not None:
        a = None if block.a is None else block.a[start:stop, None]
        _float16_features(x, a, texts, block.q, g, undo, out, d_text)
        return
    if out is not None:
        _product(g, texts, out)
    if d_text is not None:
        if g.dtype == torch.float32:
            d_text.addmm_(g.T, x)
        elif g.is_cuda and _addmm_widens():
            torch.addmm(d_text, g.T, x, out_dtype=torch.float32, out=d_text)
        else:
            d_text += _product(g.T, x, torch.empty_like(d_text))


def _float16_features(
    x: Tensor,
    a: Tensor | None,
    texts: Tensor,
    q: Tensor | None,
    g: Tensor,
    undo: Tensor,
    d_image: Tensor | None,
    d_text: Tensor | None,
) -> None:
    """The same from g without a and q: the features take one of them before the product, the result the other."""
    q = q if q is None else q[:, None]
    if d_image is not None:
        t = texts if q is None else (texts * q).to(g.dtype)
        d = _product(g, t, torch.empty_like(d_image, dtype=torch.float32))
        torch.mul(d, undo if a is None else undo * a, out=d_image)
    if d_text is not None:
        d = _product(g.T, x if a is None else (x * a).to(g.dtype), torch.empty_like(d_text))
        d_text.addcmul_(d, undo if q is None else undo * q)


def _product(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """out = left @ right, summed in float32 and rounded to out's dtype."""
    if left.dtype == torch.float32:
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
