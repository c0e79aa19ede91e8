"""What the losses over pairs share: a block of the score matrix, what a backend does with it, and which one does.

    c_ij = a_i · q_j · (x_i · t_j)          z_ij = logit_scale · c_ij + logit_bias

x: image features, t: text features or their int8 codes, a and q: row scales (1 / norm, int8 scales, or both).
Row i's own text is column offset + i. x · t is accumulated in float32 and z is float32 whatever the features'
dtype; with float64 features everything is float64.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from ...errors import BackendError
from .. import tuned
from ..backends import Backends
from ..rows.quantized import QuantizedRows
from . import policy

TINY = 1e-12  # the least norm that is divided by, as in F.normalize


@dataclass(frozen=True)
class ScoreTile:
    """Some rows of the score matrix, over some of its columns.

    x: [rows, dim] float32, bfloat16, float16 or float64 ("torch" only); t: [cols, dim] of x's dtype, or int8;
    the last dimension of both contiguous. a: float32 [rows], q: float32 [cols], both contiguous; None: all one.
    scale, bias: float32 0-d on the device (bias 0 where there is none). In float64, float32 reads float64.
    """

    x: Tensor
    t: Tensor
    a: Tensor | None
    q: Tensor | None
    scale: Tensor
    bias: Tensor
    offset: int  # row i's own column is offset + i; outside 0..cols-1: row i's own text is not in this block

    def rows(self, start: int, stop: int) -> "ScoreTile":
        """Its rows start..stop-1, over the same columns."""
        if start == 0 and stop == self.x.shape[0]:
            return self
        a = None if self.a is None else self.a[start:stop]
        return replace(self, x=self.x[start:stop], a=a, offset=self.offset + start)


class Backend(Protocol):
    """What a module must have to compute blocks. Outputs are the caller's; nothing makes the host wait for a GPU."""

    def why_not(self) -> str | None:
        """Why it cannot be used here; None if it can."""

    def operand(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """What blocks' t is to be: t, or int8 codes as dtype, exactly, where each block would widen them again."""

    def room(self, rows: int, cols: int, like: Tensor) -> Tensor:
        """Where the products of a block are kept: [rows, cols] of like's dtype and device, not initialised."""

    def stats(self, block: ScoreTile, row: Tensor, col: Tensor, own: Tensor, keep: Tensor | None) -> None:
        """Merges the block, without its own pairs, into the running (m, l, w) of its rows and columns.

        row [3, rows] and col [3, cols]: m = max z, l = Σ exp(z − m), w = Σ exp(z − m) · c, from m = −inf, l = w = 0.
        m may be any reference near the maximum. own [rows]: c of the own pairs that lie in the block is written.
        keep: None, or [rows, cols] with any row stride, where the raw products x_i · t_j are stored, own ones too.
        NaN in a feature gives NaN in l.
        """

    def own_pairs(self, row: Tensor, col: Tensor, own: Tensor, scale: Tensor, bias: Tensor, weight: float) -> Tensor:
        """What the own pairs make of the statistics of all others: [9, n].

        row, col [3, n]: (m, l, w) of each own pair's row and column without it; own [n]: its c; last dimensions
        contiguous. Rows of the result: the pair's loss, half of its row's and half of its column's; its derivative by
        scale; g by the row, g by the column and their sum, weight · (p − 1), which is exact where p rounds to 1;
        (m, l) of the row over all pairs, l ≥ 1; the same of the column.
        """

    def grads(
        self,
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
        """The features' gradients under g_ij = row_weight · exp(z − m_i) / l_i + col_weight · exp(z − m_j) / l_j,
        and own_g_i for own pairs.

        row [2, rows] and col [2, cols]: (m, l) over all pairs, m finite and l ≥ 1; not looked at where their weight
        is 0. own_g: [rows]. kept: what `stats` kept, or None to compute it again.
        d_image: [rows, dim] in float32 or x's dtype, overwritten with alpha · scale · a_i Σ_j g_ij q_j t_j.
        d_text: float32 [cols, dim], alpha · scale · q_j Σ_i g_ij a_i x_i is added. Either may be None.
        """

    def sigmoid(
        self,
        block: ScoreTile,
        alpha: float,
        loss: Tensor,
        d_scale: Tensor,
        d_bias: Tensor,
        d_image: Tensor | None,
        d_text: Tensor | None,
    ) -> None:
        """The sigmoid loss of a block and its gradients; y = 1 for own pairs and −1 for others, g = −y σ(−y z).

        Added to, [rows] each: loss: Σ_j softplus(−y z); d_scale: alpha Σ_j g c; d_bias: alpha Σ_j g.
        d_image and d_text as for `grads`.
        """


BACKENDS: Backends[Backend] = Backends("pairs", {"cpu": ("cpp", "torch"), "cuda": ("cuda", "triton", "torch")})
backends_here = BACKENDS.here


def choose(x: Tensor, backend: str | None = None) -> tuple[str, Backend, str]:
    """The named backend, or the table's first that is here, for features as x; and the device whose table is used.

    Raises BackendError.
    """
    device = x.device.type
    offered = BACKENDS.offered(device) if x.dtype != torch.float64 else ("torch",)
    if backend and backend not in offered:
        kind = f"{str(x.dtype).removeprefix('torch.')} on {device}"
        raise BackendError(f"the pair losses have no backend {backend!r} for {kind}; they have {', '.join(offered)}")
    facts = {"dim": x.shape[1], "itemsize": x.element_size()}
    order = [backend] if backend else BACKENDS.order(device, "pairs", **facts)
    names = [name for name in order if name in offered]
    for name in names:
        found = BACKENDS.load(name)
        if not isinstance(found, str):
            # An interpreted kernel is cut as on a GPU.
            return name, found, (tuned.gpu if name in ("cuda", "triton") else tuned.on)("pairs", x.device)
    raise BackendError(f"the pair losses' backend {backend!r} is not here: {found}")


def free_memory(device: torch.device) -> int:
    """Bytes of a GPU that torch's tensors do not fill. Asks neither the GPU nor its driver, so may be captured.

    Kernels that are interpreted, or emulated, on the CPU have little.
    """
    if device.type != "cuda":
        return 1 << 30
    total = torch.cuda.get_device_properties(device).total_memory
    return max(0, total - torch.cuda.memory_allocated(device))


def checked(
    image: Tensor, text: Tensor | QuantizedRows, gathered: bool = False
) -> tuple[Tensor, Tensor, Tensor | None, torch.dtype]:
    """image [rows, dim], text features or codes [cols, dim], scales [cols] or None, and the dtype of the loss.

    Both become the wider of their dtypes (codes stay codes), or what autocast would multiply them in. cols is
    rows; with `gathered` it is checked where all ranks see it. Raises ValueError for what does not fit.
    """
    t, scales = text.factors(image.dtype) if isinstance(text, QuantizedRows) else (text, None)
    fits = image.dim() == 2 == t.dim() and 0 < image.shape[1] == t.shape[1] and (gathered or len(image))
    if not fits:
        raise ValueError(f"image {tuple(image.shape)} and text {tuple(t.shape)} must both be [rows > 0, dim > 0]")
    if not gathered and len(image) != len(t):
        raise ValueError(f"image has {len(image)} rows and text {len(t)}; row i of one belongs to row i of the other")
    if image.device != t.device:
        raise ValueError(f"image is on {image.device} and text on {t.device}")
    if not image.is_floating_point() or not (scales is not None or t.is_floating_point()):
        raise ValueError(f"features must be floating point, not {image.dtype} and {t.dtype}")
    kind = image.device.type
    dtype = image.dtype if scales is not None else torch.promote_types(image.dtype, t.dtype)
    if dtype != torch.float64 and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    if scales is None:
        return image.to(dtype), t.to(dtype), None, wide
    return image.to(dtype), t, scales.to(wide), wide


def scalar(value: Tensor | float, image: Tensor, dtype: torch.dtype) -> Tensor:
    """A scale or bias (0-d, [1] or a number) as a 0-d tensor beside image; nothing is read back by the host."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"logit_scale and logit_bias must be numbers or hold one, not {tuple(value.shape)}")
        return value.reshape(()).to(image.device, dtype)
    return torch.full((), value, dtype=dtype, device=image.device)


def operands(image: Tensor, text: Tensor) -> tuple[Tensor, Tensor, torch.dtype]:
    """Both as blocks take them, in float32 where that is no work, and the dtype of scores and sums."""
    x, t = rows_of(image), rows_of(text)
    if x.dtype in (torch.bfloat16, torch.float16) and policy.widens(len(x), len(t), x.shape[1]):
        x, t = x.float(), t if t.dtype == torch.int8 else t.float()
    return x, t, torch.float64 if x.dtype == torch.float64 else torch.float32


def rows_of(x: Tensor) -> Tensor:
    """x with its last dimension contiguous and its rows apart."""
    return x if (x.stride(1) == 1 or x.shape[1] == 1) and x.stride(0) >= x.shape[1] else x.contiguous()


def row_scales(x: Tensor, scales: Tensor | None, normalize: bool, dtype: torch.dtype) -> Tensor | None:
    """What row i of x is multiplied by, in dtype: its scale, over its norm where that is asked for."""
    if not normalize:
        return None if scales is None else scales.contiguous()
    if x.is_floating_point():
        norm = torch.linalg.vector_norm(x, dim=1, dtype=dtype)
    else:
        norm = torch.cat([part.to(dtype).norm(dim=1) for part in x.split(_step(x))])
    if scales is None:
        return norm.clamp_(min=TINY).reciprocal_()
    return scales / norm.mul_(scales.abs()).clamp_(min=TINY)


def through_norm(d: Tensor, x: Tensor, a: Tensor, out: Tensor) -> None:
    """out = (I − x̂ x̂ᵀ) d, the last step of the gradient through x̂ = a x; d holds the factor a already. May be d."""
    inverse = torch.where(a < 1 / TINY, a, 0).square_()  # a shorter row was not divided by its norm
    for start in range(0, len(d), _step(d)):
        rows = slice(start, start + _step(d))
        wide = x[rows].to(d.dtype)
        inner = torch.linalg.vecdot(wide, d[rows]).mul_(inverse[rows])
        out[rows] = d[rows].addcmul_(wide, inner[:, None], value=-1)


def text_grad(d: Tensor, t: Tensor, q: Tensor | None) -> Tensor:
    """The texts' gradient, summed up in d, through their normalisation (q: 1 / norm) and rounded once."""
    if q is not None:
        through_norm(d, t, q, d)
    return d.to(kept_dtype(t.dtype))


def times(g: Tensor, d: Tensor) -> Tensor:
    """g · d in the backward; to differentiate it again is an error, since d is known as a number only."""
    return _Once.apply(g, d.detach().requires_grad_()) if torch.is_grad_enabled() else g * d


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, g, d):
        return g * d

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError("the losses over pairs can be differentiated once only")


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Inside, nothing is cast; entering autocast costs more than asking whether it is on."""
    kind = device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else contextlib.nullcontext()


def exact(dtype: torch.dtype) -> contextlib.AbstractContextManager[None]:
    """exact_float32 where features of this dtype need it."""
    return exact_float32() if dtype == torch.float32 else contextlib.nullcontext()


@contextlib.contextmanager
def exact_float32() -> Iterator[None]:
    """float32 products on a GPU at float32's precision inside, whatever the process has chosen: TF32 has 10 bits.

    The setting is the process's: float32 products that another thread starts meanwhile are exact too.
    """
    matmul = torch.backends.cuda.matmul
    # Since torch 2.9 either of two settings may have been used, and reading the older raises after the newer.
    name, exact = ("fp32_precision", "ieee") if hasattr(matmul, "fp32_precision") else ("allow_tf32", False)
    before = getattr(matmul, name)
    if before not in ("tf32", True):
        yield
        return
    setattr(matmul, name, exact)
    try:
        yield
    finally:
        setattr(matmul, name, before)


def _step(x: Tensor) -> int:
    """Rows whose widened copy stays in a processor's cache."""
    return max(1, (1 << 18) // max(1, x.shape[1]))


def kept_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of a feature gradient between forward and backward: float16 would lose 1 / rows before it is scaled up."""
    return torch.float32 if dtype == torch.float16 else dtype


def gradient_of(features: Tensor, wanted: bool) -> Tensor:
    """Memory for their gradient; an empty tensor where none is wanted."""
    return features.new_empty(features.shape if wanted else (0,), dtype=kept_dtype(features.dtype))


class ImageGrad:
    """The images' gradient as the backends deliver it: chunk by chunk, and turn by turn of the texts.

    Chunks are summed over the turns in float32, taken through the normalisation, and rounded once, in `out`.
    """

    def __init__(self, x: Tensor, a: Tensor | None, turns: int, wide: torch.dtype):
        """a: 1 / norm, where x is normalised."""
        self.x, self.a, self.turns, self.wide = x, a, turns, wide
        self.out = gradient_of(x, True)
        if turns > 1:
            self.total = self.out.zero_() if self.out.dtype == wide else torch.zeros_like(x, dtype=wide)

    def chunk(self, start: int, stop: int) -> Tensor:
        """What a backend overwrites."""
        out = self.out[start:stop]
        direct = self.turns == 1 and (self.a is None or out.dtype == self.wide)
        return out if direct else torch.empty_like(out, dtype=self.wide)

    def take(self, start: int, stop: int, d: Tensor) -> None:
        """A chunk that a backend has overwritten."""
        if self.turns > 1:
            self.total[start:stop] += d
        elif self.a is not None:
            through_norm(d, self.x[start:stop], self.a[start:stop], self.out[start:stop])

    def done(self) -> Tensor:
        if self.turns > 1:
            if self.a is not None:
                through_norm(self.total, self.x, self.a, self.out)
            elif self.out is not self.total:
                self.out.copy_(self.total)
        return self.out
