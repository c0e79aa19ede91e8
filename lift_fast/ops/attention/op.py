"""Attention within each picture, from packed queries, keys and values (Vaswani et al., arXiv 1706.03762).

    S = scale · q kᵀ,   P = softmax(S) row by row,   out = P v                 for each picture and head

qkv is what one linear layer leaves, [batch, tokens, 3, heads, head_dim], and its gradient is written in that form:
nothing is transposed or copied around the kernels. Backends of this project keep no `out`: their backward, which
has P, computes it again where the layer behind needs it. Those of libraries keep it.

One backend does both directions: lse means the same everywhere, but what a library's backward needs, `out`, is a tenth
more memory for a block to keep, and no figure says yet that another's backward is faster than the one beside its
forward. Which backend comes first is in the tables of `tuned`, family "attention".
"""

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from ...errors import BackendError
from ..backends import Backends


def reference(qkv: Tensor, *, scale: float | None = None, causal: bool = False) -> Tensor:
    """The definition, dense, in the dtype of its input (float64 for tests).

    qkv: [batch, tokens, 3, heads, head_dim]. Returns [batch, tokens, heads, head_dim].
    """
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [batch, heads, tokens, head_dim]
    scores = (qkv.shape[-1] ** -0.5 if scale is None else scale) * q @ k.mT
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores[0, 0]).triu(1).bool(), -torch.inf)
    return (scores.softmax(dim=-1) @ v).transpose(1, 2)


class Backend(Protocol):
    """What a module must have. qkv and d_out are contiguous; nothing makes the host wait for a GPU."""

    KEEPS_OUT: bool  # whether its backward needs `out`

    def why_not(self) -> str | None:
        """Why it cannot be used here; None if it can."""

    def refuses(self, tokens: int, head_dim: int, dtype: torch.dtype) -> str | None:
        """Why it does not take these; None if it does."""

    def forward(self, qkv: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
        """out [batch, tokens, heads, head_dim] contiguous; lse float32 [batch, heads, tokens] = log Σ exp(S)."""

    def backward(
        self,
        d_out: Tensor,
        qkv: Tensor,
        out: Tensor | None,
        lse: Tensor,
        scale: float,
        causal: bool,
        want_out: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """d_qkv as qkv, and out if it is wanted: computed again, or what was kept."""


# device -> modules of this package: NAME is NAME_attention.py. A library's backend must be here and take the shape to
# be chosen; see each module for what it has been compared with.
BACKENDS: Backends[Backend] = Backends(
    "attention",
    {
        "cpu": ("cpp", "flash_cpu", "torch"),
        "cuda": ("triton", "flash_attn_3", "cudnn", "flash", "flash_attn_2", "flash_attn_4", "xformers", "torch"),
    },
)
load, backends_here = BACKENDS.load, BACKENDS.here


def preferred(device: str, tokens: int, head_dim: int, dtype: torch.dtype) -> list[str]:
    """Backends for this, the table's first one first."""
    name = str(dtype).removeprefix("torch.")
    return BACKENDS.order(device, "attention", tokens=tokens, head_dim=head_dim, dtype=name)


def choose(
    device: str, tokens: int, head_dim: int, dtype: torch.dtype, backend: str | None = None
) -> tuple[str, Backend]:
    """The named backend, or the table's first that is here and takes this. Raises BackendError."""
    names = BACKENDS.offered(device)
    if backend and backend not in names:
        raise BackendError(f"attention has no backend {backend!r} on {device}; it has {', '.join(names)}")
    reason = None
    for name in [backend] if backend else preferred(device, tokens, head_dim, dtype):
        found = load(name)
        reason = found if isinstance(found, str) else found.refuses(tokens, head_dim, dtype)
        if reason is None and not isinstance(found, str):
            return name, found
    raise BackendError(f"attention's backend {backend!r} does not serve here: {reason}")


def attention(qkv: Tensor, *, scale: float | None = None, causal: bool = False, backend: str | None = None) -> Tensor:
    """out [batch, tokens, heads, head_dim] of qkv [batch, tokens, 3, heads, head_dim], in its dtype.

    scale: of the scores; default head_dim^-1/2. causal: token i sees tokens 0..i. Sums are float32. Autocast changes
    nothing. Raises ValueError for another shape, BackendError where the named backend does not serve.
    """
    if qkv.dim() != 5 or qkv.shape[2] != 3 or not qkv.is_floating_point() or not qkv.shape[1] or not qkv.shape[4]:
        raise ValueError(
            f"qkv must be floating [batch, tokens, 3, heads, head_dim], not {tuple(qkv.shape)} {qkv.dtype}"
        )
    name, _ = choose(qkv.device.type, qkv.shape[1], qkv.shape[4], qkv.dtype, backend)
    return _Attention.apply(qkv, qkv.shape[-1] ** -0.5 if scale is None else scale, causal, name)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, scale: float, causal: bool, backend: str) -> Tensor:
        qkv = qkv.contiguous()
        out, lse = torch.ops.lift_fast.attention(qkv, scale, causal, backend)
        ctx.save_for_backward(qkv, lse, *([out] if keeps_out(backend) else []))
        ctx.options = scale, causal, backend
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple:
        qkv, lse, *out = ctx.saved_tensors
        scale, causal, backend = ctx.options
        d_qkv, _ = torch.ops.lift_fast.attention_backward(
            d_out.contiguous(), qkv, out[0] if out else None, lse, scale, causal, False, backend
        )
        return d_qkv, None, None, None


def keeps_out(backend: str) -> bool:
    found = load(backend)
    return not isinstance(found, str) and found.KEEPS_OUT


@torch.library.custom_op(
    "lift_fast::attention",
    mutates_args=(),
    schema="(Tensor qkv, float scale, bool causal, str backend) -> (Tensor out, Tensor lse)",
)
def _forward(qkv: Tensor, scale: float, causal: bool, backend: str) -> tuple[Tensor, Tensor]:
    _, launch = choose(qkv.device.type, qkv.shape[1], qkv.shape[4], qkv.dtype, backend)
    with torch.autocast(qkv.device.type, enabled=False):
        return launch.forward(qkv, scale, causal)


@_forward.register_fake
def _(qkv, scale, causal, backend):
    batch, tokens, _, heads, head_dim = qkv.shape
    kind = torch.float64 if qkv.dtype == torch.float64 else torch.float32
    return qkv.new_empty(batch, tokens, heads, head_dim), qkv.new_empty(batch, heads, tokens, dtype=kind)


@torch.library.custom_op(
    "lift_fast::attention_backward",
    mutates_args=(),
    schema="(Tensor d_out, Tensor qkv, Tensor? out, Tensor lse, float scale, bool causal, bool want_out, str backend) "
    "-> (Tensor d_qkv, Tensor again)",
)
def _backward(
    d_out: Tensor,
    qkv: Tensor,
    out: Tensor | None,
    lse: Tensor,
    scale: float,
    causal: bool,
    want_out: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """again is out, computed again if it is wanted and was not kept; else empty."""
    _, launch = choose(qkv.device.type, qkv.shape[1], qkv.shape[4], qkv.dtype, backend)
    with torch.autocast(qkv.device.type, enabled=False):
        d_qkv, again = launch.backward(d_out, qkv, out, lse, scale, causal, want_out and out is None)
    return d_qkv, qkv.new_empty(0) if again is None else again


@_backward.register_fake
def _(d_out, qkv, out, lse, scale, causal, want_out, backend):
    return torch.empty_like(qkv), torch.empty_like(d_out) if want_out and out is None else qkv.new_empty(0)


# As torch counts attention on GPUs: dense also where it is causal, the scores of the backward included. What the
# backward computes to have `out` again is not counted, nor is it in torch's figure for what it keeps instead.
@register_flop_formula(torch.ops.lift_fast.attention)
def _flops(qkv, *args, **kwargs) -> int:
    batch, tokens, _, heads, head_dim = qkv
    return 4 * batch * heads * tokens * tokens * head_dim


@register_flop_formula(torch.ops.lift_fast.attention_backward)
def _backward_flops(d_out, qkv, *args, **kwargs) -> int:
    return _flops(qkv) * 5 // 2
