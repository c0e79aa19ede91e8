"""Attention within each image, from packed queries, keys and values (Vaswani et al., arXiv 1706.03762).

    S = scale · q kᵀ,   P = softmax(S) row by row,   out = P v                 for each image and head

qkv is the output of one linear layer, [batch, tokens, 3, heads, head_dim], and its gradient has the same layout:
nothing is transposed or copied around the kernels. This project's own backends do not keep `out` for the backward,
which has P and computes `out` again where the next layer needs it. Libraries' backends keep `out`.

One backend computes both directions. lse means the same in all of them, so they could be mixed. But a library's
backward needs `out`, a tenth more memory for a block to keep, and no measurement shows yet that another backend's
backward is faster than the forward's own. The tables of `tuned`, family "attention", have the order of the backends.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from ..backends import spares_dynamo
from .contract import AttentionGrad, choose, keeps_out


def reference(qkv: Tensor, *, scale: float | None = None, causal: bool = False) -> Tensor:
    """The definition, dense, in the dtype of its input (float64 for tests).

    qkv: [batch, tokens, 3, heads, head_dim]. Returns [batch, tokens, heads, head_dim].
    """
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [batch, heads, tokens, head_dim]
    scores = (qkv.shape[-1] ** -0.5 if scale is None else scale) * q @ k.mT
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores[0, 0]).triu(1).bool(), -torch.inf)
    return (scores.softmax(dim=-1) @ v).transpose(1, 2)


def attention(qkv: Tensor, *, scale: float | None = None, causal: bool = False, backend: str | None = None) -> Tensor:
    """out [batch, tokens, heads, head_dim] of qkv [batch, tokens, 3, heads, head_dim], in its dtype.

    scale: of the scores; default head_dim^-1/2. causal: token i attends to tokens 0..i. Sums are float32. Autocast has
    no effect. Raises ValueError for another shape, BackendError if the requested backend is not available or does not
    take these sizes.
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


@spares_dynamo
@torch.library.custom_op(
    "lift_fast::attention",
    mutates_args=(),
    schema="(Tensor qkv, float scale, bool causal, str backend) -> (Tensor out, Tensor lse)",
)
def _forward(qkv: Tensor, scale: float, causal: bool, backend: str) -> tuple[Tensor, Tensor]:
    _, module = choose(qkv.device.type, qkv.shape[1], qkv.shape[4], qkv.dtype, backend)
    with torch.autocast(qkv.device.type, enabled=False):
        return module.forward(qkv, scale, causal)


@_forward.register_fake
def _(qkv, scale, causal, backend):
    batch, tokens, _, heads, head_dim = qkv.shape
    kind = torch.float64 if qkv.dtype == torch.float64 else torch.float32
    return qkv.new_empty(batch, tokens, heads, head_dim), qkv.new_empty(batch, heads, tokens, dtype=kind)


@spares_dynamo
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
    """again: out, computed again if it is wanted and was not kept; else empty."""
    _, module = choose(qkv.device.type, qkv.shape[1], qkv.shape[4], qkv.dtype, backend)
    with torch.autocast(qkv.device.type, enabled=False):
        call = AttentionGrad(d_out, qkv, out, lse, scale, causal, want_out and out is None)
        d_qkv, again = module.backward(call)
    return d_qkv, qkv.new_empty(0) if again is None else again


@_backward.register_fake
def _(d_out, qkv, out, lse, scale, causal, want_out, backend):
    return torch.empty_like(qkv), torch.empty_like(d_out) if want_out and out is None else qkv.new_empty(0)


# As torch counts attention on GPUs: dense even if causal, and with the backward's recomputation of the scores. The
# recomputation of `out` is not counted, as torch's figure does not count what it keeps instead.
@register_flop_formula(torch.ops.lift_fast.attention)
def _flops(qkv, *args, **kwargs) -> int:
    batch, tokens, _, heads, head_dim = qkv
    return 4 * batch * heads * tokens * tokens * head_dim


@register_flop_formula(torch.ops.lift_fast.attention_backward)
def _backward_flops(d_out, qkv, *args, **kwargs) -> int:
    return _flops(qkv) * 5 // 2
