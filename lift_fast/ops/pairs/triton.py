"""The "triton" backend of the pair losses: kernels that form the scores themselves, or read cuBLAS's products.

Both kinds do the same with a score (kernels/contrastive.py, kernels/sigmoid.py). A product that passes through memory
costs 8 bytes, or L2 traffic if the block stays there; cuBLAS forms it faster than Triton's dot does, but nothing
overlaps with its epilogue. So the kernels form the scores themselves up to a dim from the table ("fused_up_to"), with
int8 texts as they are, with one program per tile or a few persistent ones ("form"). Above it cuBLAS forms them, from
texts that `operand` widens, in blocks of rows and columns that stay in the L2 cache ("block"). float32 always goes to
cuBLAS, and never through TF32.

The gradients are products of one matrix, G = alpha · scale · a · q · g, with the texts and with the images. G is in
memory for a band of rows and all columns at a time ("band"), so that each side's gradient is one product per band.
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
from .contract import FeatureGradients, ScoreTile, SigmoidSums, SoftmaxGradient, exact_float32

if TYPE_CHECKING:
    from ...kernels.pairs import TileConfig

HALF = (torch.bfloat16, torch.float16)
FLOAT16_UP = 1024.0  # 1 / rows is subnormal in float16
Span = tuple[int, int]  # a range [start, stop) of rows or columns


def why_not() -> str | None:
    if reason := why_no_triton():
        return reason
    if torch.cuda.is_available() and "dtype" not in torch.ops.aten.mm.overloads():
        return f"torch {torch.__version__} has no torch.mm(..., out_dtype=...); install torch >= 2.8"
    return None


def operand(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Texts or codes t [cols, dim] for tiles with images of this dtype.

    int8 codes are cast to dtype, exactly, if cuBLAS is to form the scores; everything else is returned unchanged. A
    tile may hold codes in either case; they are then widened in every call that needs it.
    """
    return t.to(dtype) if t.dtype == torch.int8 and not _is_fusable(t, dtype) else t


def allocate(rows: int, cols: int, like: Tensor) -> Tensor:
    """Rows start a multiple of 16 elements apart, for wide loads and stores."""
    return like.new_empty((rows, -(-cols // 16) * 16))[:, :cols]


def stats(scores: ScoreTile, row: Tensor, col: Tensor, positive: Tensor, keep: Tensor | None) -> None:
    from ...kernels import contrastive, pairs

    x, rows, cols = scores.x, len(scores.x), len(scores.t)
    if not rows or not cols:
        return
    with _current_device(x):
        terms = pairs.terms(rows, cols, scores.a, scores.q, scores.scale, scores.bias)
        kind = "stats" if keep is None else "keep"
        products = None if _is_fused(scores) else _Products(scores, keep)
        config = _tile(scores, kind) if products is None else _stored_tile(x)
        form = _form(scores, kind) if products is None else contrastive
        merge = _setting(x, "merge")
        most = _setting(x, "parts")["bytes"] // (12 * (-(-cols // config.rows) - (-cols // config.cols)))
        for start, stop in _spans(rows, most, pairs.PAD) if products is None else _spans(rows, products.high):
            parts = pairs.partials(stop - start, cols, config, True, x)
            if products is None:
                form.scores_stats(x, scores.t, terms, positive, keep, *parts, (start, stop), scores.offset, config)
            else:
                for span, p in products.blocks(start, stop):
                    contrastive.stats(p, terms, positive, *parts, (start, stop), span, scores.offset, config)
            pairs.merge_softmax(*parts, row[:, start:stop], col, scores.scale, scores.bias, merge)


def positives(row: Tensor, col: Tensor, positive: Tensor, scale: Tensor, bias: Tensor, weight: float) -> Tensor:
    from ...kernels import contrastive

    out = positive.new_empty((9, len(positive)))
    with _current_device(positive):
        contrastive.positives(row, col, positive, scale, bias, weight, out)
    return out


def grads(scores: ScoreTile, g: SoftmaxGradient, alpha: float, kept: Tensor | None, out: FeatureGradients) -> None:
    from ...kernels import contrastive, pairs

    x, rows, cols, offset = scores.x, len(scores.x), len(scores.t), scores.offset
    if _is_trivial(scores, out):
        return
    with _current_device(x):
        factor, undo = _factor(scores, alpha)
        terms = pairs.terms(
            rows, cols, scores.a, scores.q, scores.scale, scores.bias, factor, g.row, g.col, g.row_weight, g.col_weight,
            undo is not None,
        )  # fmt: skip
        fused = kept is None and _is_fused(scores)
        products = None if fused or kept is not None else _Products(scores)
        config = _tile(scores, "grad") if fused else _stored_tile(x)
        form = _form(scores, "grad") if fused else contrastive
        bands = _Bands(scores, out.text is not None)
        for start, stop in bands.spans:
            if kept is not None:
                contrastive.grad(
                    kept[start:stop], terms, g.positive, bands.g, (start, stop), (0, cols), offset, config
                )  # fmt: skip
            elif products is None:
                form.scores_grad(x, scores.t, terms, g.positive, bands.g, (start, stop), offset, config)
            else:
                for part in _spans(stop, products.high, first=start):
                    for span, p, block in products.blocks_in(bands.g[part[0] - start :], *part):
                        contrastive.grad(p, terms, g.positive, block, part, span, offset, config)
            _features(scores, bands.texts, bands.g[: stop - start, :cols], (start, stop), undo, out)


def sigmoid(scores: ScoreTile, alpha: float, sums: SigmoidSums, out: FeatureGradients) -> None:
    from ...kernels import pairs
    from ...kernels import sigmoid as kernels

    x, rows, cols, bias, offset = scores.x, len(scores.x), len(scores.t), scores.bias, scores.offset
    needs_gradient = not _is_trivial(scores, out)
    if not rows or not cols:
        return
    with _current_device(x):
        factor, undo = _factor(scores, alpha) if needs_gradient else (None, None)
        terms = pairs.terms(rows, cols, scores.a, scores.q, scores.scale, bias, factor, narrow=undo is not None)
        products = None if _is_fused(scores) else _Products(scores)
        config = _tile(scores, "sigmoid") if products is None else _stored_tile(x)
        bands = _Bands(scores, out.text is not None) if needs_gradient else None
        merge = _setting(x, "merge")
        most = _setting(x, "parts")["bytes"] // (12 * -(-cols // config.cols))
        for start, stop in bands.spans if bands else _spans(rows, most, pairs.PAD):
            parts, _ = pairs.partials(stop - start, cols, config, False, x)
            if products is None:
                g = bands.g if bands else None
                kernels.scores_sigmoid(x, scores.t, terms, bias, alpha, parts, g, (start, stop), offset, config)
            else:
                for part in _spans(stop, products.high, first=start):
                    part_parts = parts[:, :, part[0] - start :]
                    for span, p, block in products.blocks_in(bands.g[part[0] - start :] if bands else None, *part):
                        kernels.sigmoid(p, terms, bias, alpha, part_parts, block, part, span, offset, config)
            pairs.merge_sums(parts, *(one[start:stop] for one in sums), merge)
            if bands:
                _features(scores, bands.texts, bands.g[: stop - start, :cols], (start, stop), undo, out)


class _Products:
    """cuBLAS's products x · tᵀ of a tile, one block of rows and columns at a time."""

    def __init__(self, scores: ScoreTile, keep: Tensor | None = None):
        """keep: where all products are stored; None: each block overwrites the previous one."""
        config = _stored_tile(scores.x)
        high, wide = (
            max(side, n // side * side)
            for n, side in zip(_setting(scores.x, "block", dim=scores.x.shape[1]), config[:2], strict=True)
        )
        t, self.x, self.keep, self.high = _widened(scores), scores.x, keep, high
        self.columns = [(span, t[span[0] : span[1]].T) for span in _spans(len(t), wide)]
        self.p: Tensor | None = None
        self.size = min(high, len(scores.x)), min(wide, len(t))

    def blocks(self, start: int, stop: int) -> Iterator[tuple[Span, Tensor]]:
        """Yields (columns, products) of the blocks of rows start..stop-1."""
        x = self.x[start:stop]
        for (first, last), right in self.columns:
            out = self._scratch(stop - start, last - first) if self.keep is None else self.keep[start:stop, first:last]
            yield (first, last), _product(x, right, out)

    def blocks_in(self, band: Tensor | None, start: int, stop: int) -> Iterator[tuple[Span, Tensor, Tensor | None]]:
        """Yields (columns, products, their place in G) of the blocks of rows start..stop-1.

        band: the rows of G from start on, or None. float32 products are stored in G itself.
        """
        x = self.x[start:stop]
        for (first, last), right in self.columns:
            g = None if band is None else band[:, first:]
            if g is not None and g.dtype == torch.float32:
                out = g[: stop - start, : last - first]
            else:
                out = self._scratch(stop - start, last - first)
            yield (first, last), _product(x, right, out), g

    def _scratch(self, rows: int, cols: int) -> Tensor:
        if self.p is None:
            self.p = allocate(*self.size, self.x.new_empty(0, dtype=torch.float32))
        return self.p[:rows, :cols]


class _Bands:
    """The bands that G is computed in, one after the other, each for all columns of a ScoreTile.

    g: memory for one band, padded to whole tiles. spans: the rows of each band. texts: t in x's dtype.
    """

    def __init__(self, scores: ScoreTile, trained: bool):
        from ...kernels import pairs

        x, rows, wide = scores.x, len(scores.x), pairs.padded(len(scores.t))
        most = _setting(x, "band", trained=trained)["bytes"] // (wide * x.element_size())
        self.spans = list(_spans(rows, most, pairs.PAD))
        self.texts = _widened(scores)
        self.g = x.new_empty((pairs.padded(self.spans[0][1]), wide))


def _spans(n: int, most: int, multiple: int = 1, first: int = 0) -> Iterator[Span]:
    """first..n-1 in spans of at most `most` rounded down to a multiple, but of one multiple at least."""
    step = max(multiple, most // multiple * multiple)
    for start in range(first, n, step):
        yield start, min(n, start + step)


def _current_device(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Inside, x's GPU is the current one, and float32 products are exact."""
    switch = x.is_cuda and x.device.index != torch.cuda.current_device()
    if x.dtype != torch.float32:
        return torch.cuda.device(x.device) if switch else contextlib.nullcontext()
    stack = contextlib.ExitStack()
    if switch:
        stack.enter_context(torch.cuda.device(x.device))
    stack.enter_context(exact_float32())
    return stack


def _setting(x: Tensor, name: str, **facts: int | str | bool) -> Any:
    return tuned.lookup("pairs", tuned.gpu("pairs", x.device), name, **facts)


def _tile(scores: ScoreTile, kind: str) -> "TileConfig":
    """The program tile of the fused kernels; kind: "stats", "keep" (stats that also store products), ..."""
    from ...kernels.pairs import TileConfig, aligned

    return TileConfig(*_setting(scores.x, "tile", kind=kind, aligned=aligned(scores.x) and aligned(scores.t)))


def _form(scores: ScoreTile, kind: str) -> ModuleType:
    """The module of the fused kernels: one program per tile, or persistent ones if those can load the features."""
    from ...kernels import contrastive

    if kind == "keep" or _setting(scores.x, "form", kind=kind) == "plain":
        return contrastive
    from ...kernels import persistent

    able = scores.x.dtype == scores.t.dtype and persistent.describes(scores.x) and persistent.describes(scores.t)
    return persistent if able else contrastive


def _stored_tile(x: Tensor) -> "TileConfig":
    """The program tile of the kernels that read products from memory."""
    from ...kernels.pairs import TileConfig

    return TileConfig(*_setting(x, "stored"))


def _is_trivial(scores: ScoreTile, out: FeatureGradients) -> bool:
    """Whether no gradient needs a product: none is wanted, or the tile is empty and its gradient zero."""
    if len(scores.x) and len(scores.t):
        return out.image is None and out.text is None
    if out.image is not None:
        out.image.zero_()
    return True


def _is_fused(scores: ScoreTile) -> bool:
    """Whether the kernels form the scores of this tile."""
    return _is_fusable(scores.t, scores.x.dtype) and _is_fusable(scores.x, scores.x.dtype)


def _is_fusable(features: Tensor, dtype: torch.dtype) -> bool:
    """Whether the fused kernels accept this operand, x or t; dtype: x's."""
    from ...kernels.pairs import aligned

    if dtype not in HALF or (features.is_cuda and not aligned(features)):
        return False
    return features.shape[1] <= _setting(features, "fused_up_to")


def _widened(scores: ScoreTile) -> Tensor:
    """The texts in x's dtype; every dtype holds int8 codes exactly."""
    return scores.t.to(scores.x.dtype)


def _factor(scores: ScoreTile, alpha: float) -> tuple[Tensor, Tensor | None]:
    """The factor of g before it is rounded, and for float16 that of the products afterwards, else None."""
    total = scores.scale if alpha == 1 else scores.scale * alpha
    if scores.x.dtype != torch.float16:
        return total, None
    return torch.full_like(total, FLOAT16_UP), total / FLOAT16_UP


def _features(
    scores: ScoreTile, texts: Tensor, g: Tensor, rows: Span, undo: Tensor | None, out: FeatureGradients
) -> None:
    """The features' gradients from a band of G, whose rows are `rows` of the tile."""
    start, stop = rows
    x = scores.x[start:stop]
    d_image = None if out.image is None else out.image[start:stop]
    if undo is not None:
        a = None if scores.a is None else scores.a[start:stop, None]
        _float16_features(x, a, texts, scores.q, g, undo, d_image, out.text)
        return
    if d_image is not None:
        _product(g, texts, d_image)
    if out.text is not None:
        if g.dtype == torch.float32:
            out.text.addmm_(g.T, x)
        elif g.is_cuda and _addmm_widens():
            torch.addmm(out.text, g.T, x, out_dtype=torch.float32, out=out.text)
        else:
            out.text.add_(_product(g.T, x, torch.empty_like(out.text)))


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
    """The same from g without a and q: one of them scales the features before the product, the other the result."""
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
    """Whether torch.addmm can add a bfloat16 product to float32 in place; the first versions with out_dtype cannot."""
    one, total = (torch.zeros((16, 16), dtype=dtype, device="cuda") for dtype in (torch.bfloat16, torch.float32))
    try:
        torch.addmm(total, one, one, out_dtype=torch.float32, out=total)
    except RuntimeError:
        return False
    return True
