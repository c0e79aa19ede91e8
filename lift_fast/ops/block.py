"""A pre-norm transformer block as one autograd function, which chooses the tensors that are kept for the backward.

    s₁ = x + residual,   qkv = LN₁(s₁) W_qkvᵀ + b,   s₂ = s₁ + attention(qkv) W_oᵀ + b
    h = LN₂(s₂) W₁ᵀ,     m = act(h + b₁) W₂ᵀ + b₂;   the value is s₂ + m, which the next layernorm adds

`checkpointing` is the activation recomputation level. Kept per token, in multiples of the width (the hidden layer is
4 widths), and recomputed in the backward:

    checkpointing   kept         widths   recomputed, of the forward's matrix products
    "none"          s₁ qkv s₂ h  9        nothing
    "mlp"           s₁ qkv s₂    5        W₁: a third
    "branches"      s₁ s₂        2        W_qkv, W₁: seven twelfths; and attention
    "block"         s₁           1        W_qkv, W_o, W₁: two thirds; and attention

torch's own modules keep 16 widths: also both normalised inputs, attention's output and the activated hidden layer, all
of which this backward's kernels compute on the way. torch's checkpointing keeps 1 width and recomputes as much as
"block". The gradients are those of the plain block; nothing is approximated.
"""

from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .attention.contract import choose, keeps_out
from .transformer.contract import ACTIVATIONS, Activation
from .transformer.layernorm import wide
from .transformer.linear import input_product, multiplied_in, product, weight_product
from .transformer.mlp import down_backward, up

Checkpointing = Literal["none", "mlp", "branches", "block"]


def block(
    x: Tensor,
    residual: Tensor | None,
    *weights: Tensor,
    heads: int,
    eps: float = 1e-5,
    activation: Activation = "gelu",
    causal: bool = False,
    checkpointing: Checkpointing = "none",
    fp8: bool = False,
    backend: str | None = None,
    attention_backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """(s₂, m) of x and residual [batch, tokens, width]; the block's value is s₂ + m.

    weights: LN₁'s weight and bias, W_qkv [3 width, width] and b, W_o [width, width] and b, LN₂'s weight and bias, W₁
    [hidden, width] and b₁, W₂ [width, hidden] and b₂. Computed in x's dtype, or autocast's, with sums and statistics in
    float32. checkpointing: see above. fp8: the linear layers multiply in float8 (transformer/float8.py). backend: for
    layernorm and mlp; attention_backend: for attention. Differentiable once. Raises ValueError for shapes that do not
    match and for unknown options, BackendError for a backend that is not available.
    """
    ln1_w, ln1_b, w_qkv, b_qkv, w_o, b_o, ln2_w, ln2_b, w1, b1, w2, b2 = weights
    if x.dim() != 3 or w_qkv.shape != (3 * x.shape[2], x.shape[2]) or x.shape[2] % heads:
        raise ValueError(
            f"x must be [batch, tokens, width] with {heads} heads and W_qkv [3 width, width], not {tuple(x.shape)} and "
            f"{tuple(w_qkv.shape)}"
        )
    for name, value, known in (
        ("checkpointing", checkpointing, get_args(Checkpointing)),
        ("activation", activation, ACTIVATIONS),
    ):
        if value not in known:
            raise ValueError(f"no {name} {value!r}; there are: {', '.join(known)}")
    dtype = multiplied_in(x)
    kind, head_dim = wide(dtype), x.shape[2] // heads
    name, _ = choose(x.device.type, x.shape[1], head_dim, dtype, attention_backend)
    norms = [ln1_w.to(kind), ln1_b.to(kind), ln2_w.to(kind), ln2_b.to(kind)]
    linears = [t.to(dtype) for t in (w_qkv, b_qkv, w_o, b_o, w1, w2, b2)]
    options = (heads, eps, activation, causal, checkpointing, fp8, backend, name)
    residual = None if residual is None else residual.to(dtype)
    return _Block.apply(x.to(dtype), residual, *norms, *linears, b1.to(kind), options)


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, residual, ln1_w, ln1_b, ln2_w, ln2_b, w_qkv, b_qkv, w_o, b_o, w1, w2, b2, b1, options):
        heads, eps, activation, causal, checkpointing, fp8, backend, attend = options
        s1 = x.contiguous().view(-1, x.shape[-1])
        r = None if residual is None else residual.contiguous().view(s1.shape)
        y, s, mean1, rstd1 = torch.ops.lift_fast.layernorm(s1, r, ln1_w, ln1_b, eps, backend)
        s1 = s1 if r is None else s
        qkv = product(y, w_qkv, b_qkv, fp8).view(*x.shape[:2], 3, heads, -1)
        out, lse = torch.ops.lift_fast.attention(qkv, qkv.shape[-1] ** -0.5, causal, attend)
        branch = product(out.view(s1.shape), w_o, b_o, fp8)
        y, s2, mean2, rstd2 = torch.ops.lift_fast.layernorm(branch, s1, ln2_w, ln2_b, eps, backend)
        del branch
        h, a = up(y, w1, b1, activation, fp8, backend)
        m = product(a, w2, b2, fp8)

        # Not views, of which FSDP2 warns: nothing else uses the tensors that they would be views of.
        out_s2, out_m = (torch.ops.aten._unsafe_view(t, x.shape) for t in (s2, m))
        kept: list[Tensor] = [s1]
        if checkpointing != "block":
            kept += [out_s2]  # the output itself, so that autograd sees whether it is overwritten
        if checkpointing in ("none", "mlp"):
            kept += [mean1, rstd1, mean2, rstd2, qkv, lse]
            if checkpointing == "none":
                kept += [h]
            if keeps_out(attend):
                kept += [out]
        ctx.save_for_backward(ln1_w, ln1_b, ln2_w, ln2_b, w_qkv, b_qkv, w_o, b_o, w1, w2, b1, *kept)
        ctx.options, ctx.shape, ctx.added = options, x.shape, residual is not None
        return out_s2, out_m

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_s2: Tensor, g: Tensor) -> tuple:
        heads, eps, activation, causal, checkpointing, fp8, backend, attend = ctx.options
        ln1_w, ln1_b, ln2_w, ln2_b, w_qkv, b_qkv, w_o, b_o, w1, w2, b1, s1, *kept = ctx.saved_tensors
        rows, need = s1.shape, ctx.needs_input_grad[6:13]
        need_qkv, need_b_qkv, need_o, need_b_o, need_1, need_2, need_b2 = need
        g, d_s2 = g.contiguous().view(rows), d_s2.contiguous().view(rows)

        # Recompute what was not kept, by the forward's own steps.
        out: Tensor | None = None
        if checkpointing in ("none", "mlp"):
            s2, mean1, rstd1, mean2, rstd2, qkv, lse, *kept = kept
            s2 = s2.view(rows)
            h, *kept = kept if checkpointing == "none" else (None, *kept)
            out = kept[0] if kept else None
        else:
            y, _, mean1, rstd1 = torch.ops.lift_fast.layernorm(s1, None, ln1_w, ln1_b, eps, backend)
            qkv = product(y, w_qkv, b_qkv, fp8).view(*ctx.shape[:2], 3, heads, -1)
            out, lse = torch.ops.lift_fast.attention(qkv, qkv.shape[-1] ** -0.5, causal, attend)
            h = None
            if checkpointing == "branches":
                s2 = kept[0].view(rows)
                y, _, mean2, rstd2 = torch.ops.lift_fast.layernorm(s2, None, ln2_w, ln2_b, eps, backend)
            else:
                branch = product(out.view(rows), w_o, b_o, fp8)
                y, s2, mean2, rstd2 = torch.ops.lift_fast.layernorm(branch, s1, ln2_w, ln2_b, eps, backend)
                del branch
        if h is None:
            if checkpointing == "mlp":
                y = torch.ops.lift_fast.layernorm(s2, None, ln2_w, ln2_b, eps, backend)[0]
            h = product(y, w1, None, fp8)

        dh, a, d_b1 = down_backward(g, w2, h, b1, activation, fp8, backend)
        d_w2, d_b2 = weight_product(g, a, fp8) if need_2 else None, g.sum(dim=0) if need_b2 else None
        del a, h
        d = input_product(dh, w1, fp8)
        d_ln2_w, d_ln2_b, y = torch.ops.lift_fast.layernorm_backward(
            d, s2, mean2, rstd2, ln2_w, ln2_b, d_s2, need_1, backend
        )
        d_w1 = weight_product(dh, y, fp8) if need_1 else None
        del dh, y, s2

        d_out = input_product(d, w_o, fp8).view(*ctx.shape[:2], heads, -1)
        d_qkv, again = torch.ops.lift_fast.attention_backward(
            d_out, qkv, out, lse, qkv.shape[-1] ** -0.5, causal, need_o, attend
        )
        out = again if out is None else out
        d_w_o, d_b_o = weight_product(d, out.view(rows), fp8) if need_o else None, d.sum(dim=0) if need_b_o else None
        del out, again, d_out, qkv
        d_qkv = d_qkv.view(len(d), -1)
        dx = input_product(d_qkv, w_qkv, fp8)
        d_ln1_w, d_ln1_b, y = torch.ops.lift_fast.layernorm_backward(
            dx, s1, mean1, rstd1, ln1_w, ln1_b, d, need_qkv, backend
        )
        d_w_qkv, d_b_qkv = weight_product(d_qkv, y, fp8) if need_qkv else None, d_qkv.sum(dim=0) if need_b_qkv else None
        dx = dx.view(ctx.shape)
        d_norms = d_ln1_w, d_ln1_b, d_ln2_w, d_ln2_b
        d_linears = d_w_qkv, d_b_qkv, d_w_o, d_b_o, d_w1, d_w2, d_b2
        return dx, dx if ctx.added else None, *d_norms, *d_linears, d_b1, None


def kept_bytes(
    tokens: int,
    width: int,
    hidden: int,
    heads: int,
    itemsize: int,
    checkpointing: Checkpointing = "none",
    keeps_out: bool = False,
) -> int:
    """Bytes that a block keeps for the backward of so many tokens (of all images together), without weights."""
    widths = {"none": 5 * width + hidden, "mlp": 5 * width, "branches": 2 * width, "block": width}[checkpointing]
    statistics = 0
    if checkpointing in ("none", "mlp"):
        statistics = 4 * 4 + 4 * heads  # two means, two rstd, lse
        widths += width * keeps_out
    return tokens * (widths * itemsize + statistics)
