"""What a backend of the pair losses computes: the scores of a tile, their statistics and gradients; and which one runs.

    c_ij = a_i · q_j · (x_i · t_j)          z_ij = logit_scale · c_ij + logit_bias

x: image features, t: text features or their int8 codes, a and q: row scales (1 / norm, int8 scales, or both).
The positive of row i, its matching text, is column offset + i. x · t is accumulated in float32 and z is float32
whatever the features' dtype; with float64 features everything is float64.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .. import tuned
from ..backends import Backends


@dataclass(frozen=True)
class ScoreTile:
    """Some rows of the score matrix, over some of its columns, as the factors that the scores are computed from.

    x: [rows, dim] float32, bfloat16, float16 or float64 ("torch" only); t: [cols, dim] of x's dtype, or int8;
    the last dimension of both contiguous. a: float32 [rows], q: float32 [cols], both contiguous; None: all one.
    scale, bias: float32 0-d on the device (0 if the loss has no bias). With float64 features, read float64 for float32.
    """

    x: Tensor
    t: Tensor
    a: Tensor | None
    q: Tensor | None
    scale: Tensor
    bias: Tensor
    offset: int  # the positive of row i is column offset + i; outside 0..cols-1 it is not in this tile

    def rows(self, start: int, stop: int) -> "ScoreTile":
        """Rows start..stop-1 of the tile, over the same columns."""
        if start == 0 and stop == self.x.shape[0]:
            return self
        a = None if self.a is None else self.a[start:stop]
        return replace(self, x=self.x[start:stop], a=a, offset=self.offset + start)


class SoftmaxGradient(NamedTuple):
    """g, the derivative of the contrastive loss by the scores z of a tile, in the statistics it is computed from.

    g_ij = row_weight · exp(z_ij − m_i) / l_i + col_weight · exp(z_ij − m_j) / l_j, and positive_i for positives.
    row [2, rows] and col [2, cols]: (m, l) over all pairs, m finite and l ≥ 1; not read where their weight is 0.
    positive: [rows].
    """

    row: Tensor
    col: Tensor
    row_weight: float
    col_weight: float
    positive: Tensor


class SigmoidSums(NamedTuple):
    """Sums over each row of a tile, [rows] each, which the backend adds to: the sigmoid loss and its derivatives."""

    loss: Tensor
    d_scale: Tensor
    d_bias: Tensor


class FeatureGradients(NamedTuple):
    """Where a backend writes the features' gradients; None: not wanted.

    image: [rows, dim] in float32 or x's dtype, overwritten with alpha · scale · a_i Σ_j g_ij q_j t_j.
    text: float32 [cols, dim], alpha · scale · q_j Σ_i g_ij a_i x_i is added.
    """

    image: Tensor | None
    text: Tensor | None


class Backend(Protocol):
    """The functions of a backend's module. The caller allocates outputs; no function synchronizes host and GPU."""

    def why_not(self) -> str | None:
        """Why the backend is not available; None if it is."""

    def operand(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """t as the tiles should have it: unchanged, or int8 codes cast to dtype (exactly) once for several tiles."""

    def allocate(self, rows: int, cols: int, like: Tensor) -> Tensor:
        """Uninitialized memory for products to keep: [rows, cols] of like's dtype and device."""

    def stats(self, scores: ScoreTile, row: Tensor, col: Tensor, positive: Tensor, keep: Tensor | None) -> None:
        """Merges the tile, without its positives, into the running statistics (m, l, w) of its rows and columns.

        row [3, rows] and col [3, cols]: m = max z, l = Σ exp(z − m), w = Σ exp(z − m) · c, from m = −inf, l = w = 0.
        m may be any reference near the maximum. positive [rows]: c of the positives in the tile is written.
        keep: None, or [rows, cols] with any row stride, where all raw products x_i · t_j are stored.
        NaN in a feature gives NaN in l.
        """

    def positives(
        self, row: Tensor, col: Tensor, positive: Tensor, scale: Tensor, bias: Tensor, weight: float
    ) -> Tensor:
        """Combines each positive with the statistics of its row's and its column's negatives: [9, n].

        row, col [3, n]: (m, l, w) of the row and the column without the positive; positive [n]: its c; last dimensions
        contiguous. Rows of the result: the pair's loss, half of its row's and half of its column's; its derivative by
        scale; g by the row, g by the column and their sum, weight · (p − 1), which is exact where p rounds to 1;
        (m, l) of the row over all pairs, l ≥ 1; the same of the column.
        """

    def grads(
        self, scores: ScoreTile, g: SoftmaxGradient, alpha: float, kept: Tensor | None, out: FeatureGradients
    ) -> None:
        """The features' gradients from g. kept: the products that `stats` stored, or None to recompute them."""

    def sigmoid(self, scores: ScoreTile, alpha: float, sums: SigmoidSums, out: FeatureGradients) -> None:
        """The sigmoid loss of a tile and its gradients; y = 1 for positives and −1 otherwise, g = −y σ(−y z).

        Added to sums: loss: Σ_j softplus(−y z); d_scale: alpha Σ_j g c; d_bias: alpha Σ_j g.
        """


BACKENDS: Backends[Backend] = Backends("pairs", {"cpu": ("cpp", "torch"), "cuda": ("cuda", "triton", "torch")})
backends_here = BACKENDS.here


def choose(x: Tensor, backend: str | None = None) -> tuple[str, Backend, str]:
    """The name and module of a backend for features like x, and the device whose table of settings applies.

    backend: its name; None: the table's first that is available. Raises BackendError.
    """
    device = x.device.type
    names = BACKENDS.offered(device) if x.dtype != torch.float64 else ("torch",)

    def order() -> list[str]:
        known = BACKENDS.order(device, "pairs", dim=x.shape[1], itemsize=x.element_size())
        return [name for name in known if name in names]

    name, module = BACKENDS.choose("pair loss", device, x.dtype, backend, names, order)
    # Interpreted kernels have a GPU's settings.
    return name, module, (tuned.gpu if name in ("cuda", "triton") else tuned.on)("pairs", x.device)


def free_memory(device: torch.device) -> int:
    """Bytes of a GPU's memory that torch's tensors do not occupy, without a call to the GPU or its driver.

    It may therefore be called under graph capture. Kernels interpreted or emulated on the CPU get 1 GiB.
    """
    if device.type != "cuda":
        return 1 << 30
    total = torch.cuda.get_device_properties(device).total_memory
    return max(0, total - torch.cuda.memory_allocated(device))


def exact(dtype: torch.dtype) -> contextlib.AbstractContextManager[None]:
    """exact_float32 for float32 features; nothing for other dtypes."""
    return exact_float32() if dtype == torch.float32 else contextlib.nullcontext()


@contextlib.contextmanager
def exact_float32() -> Iterator[None]:
    """Turns TF32, which has a significand of 10 bits, off for float32 products on a GPU.

    The setting is the process's: float32 products that another thread starts meanwhile are exact too.
    """
    matmul = torch.backends.cuda.matmul
    # Since torch 2.9 there are two settings, and reading the older one raises once the newer one was set.
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
