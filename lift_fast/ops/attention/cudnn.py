"""cuDNN's attention, as torch calls it. See contract.py.

It takes [batch, heads, tokens, head_dim] of any strides. Its output is laid out in memory as q is: [batch, tokens,
heads, head_dim]. torch allocates the gradients, and one copy packs them. The first call of a shape is slow, because it
builds a plan. Not run on a GPU yet.
"""

import torch
from torch import Tensor

from .contract import AttentionGrad
from .library import by_head, no_gpu, not_taken, parts

KEEPS_OUT = True

# The log-sum-exp is [batch, heads, tokens, 1] since torch 2.9, [batch, heads, tokens] before.
_LSE_HAS_FOUR_DIMENSIONS = tuple(int(n) for n in torch.__version__.split(".")[:2]) >= (2, 9)


def why_not() -> str | None:
    if not torch.backends.cudnn.is_available():
        return f"torch {torch.__version__} finds no cuDNN"
    return no_gpu((8, 0))


def refuses(tokens: int, head_dim: int, dtype: torch.dtype) -> str | None:
    return "it takes two tokens or more" if tokens < 2 else not_taken(head_dim, dtype, 128)


def forward(qkv: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    q, k, v = map(by_head, parts(qkv))
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, True, 0.0, causal, False, scale=scale
    )
    return by_head(out), lse.view(q.shape[:3])


def backward(call: AttentionGrad) -> tuple[Tensor, Tensor | None]:
    d_out, qkv, out, lse, scale, causal, want_out = call
    assert out is not None
    q, k, v = map(by_head, parts(qkv))
    unused, tokens = lse.new_empty((), dtype=torch.int64), qkv.shape[1]  # dropout's seed and offset
    gradients = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        by_head(d_out),
        q,
        k,
        v,
        by_head(out),
        lse[..., None] if _LSE_HAS_FOUR_DIMENSIONS else lse,
        unused,
        unused,
        None,  # bias of the scores
        None,  # cumulative lengths of queries and of keys, for images of different lengths
        None,
        tokens,
        tokens,
        0.0,
        causal,
        scale=scale,
    )
    return torch.stack([by_head(g) for g in gradients], dim=2), out if want_out else None
