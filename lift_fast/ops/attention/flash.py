"""torch's own FlashAttention-2 on CUDA (Dao, arXiv 2307.08691). See contract.py.

It takes [batch, heads, tokens, head_dim] of any strides. Its output is laid out as [batch, tokens, heads, head_dim].
It allocates the gradients itself, and one copy packs them, which moves 3/4 as many bytes as the backward itself. Not
run on a GPU yet.
"""

import torch
from torch import Tensor

from .contract import AttentionGrad
from .library import by_head, no_gpu, not_taken, parts

KEEPS_OUT = True


def why_not() -> str | None:
    if not torch.backends.cuda.is_flash_attention_available():
        return f"torch {torch.__version__} was built without FlashAttention"
    return no_gpu((8, 0))


def refuses(tokens: int, head_dim: int, dtype: torch.dtype) -> str | None:
    return not_taken(head_dim, dtype, 192)  # above 192, some GPUs have too little shared memory for the backward


def forward(qkv: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    q, k, v = map(by_head, parts(qkv))
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)
    return by_head(out), lse


def backward(call: AttentionGrad) -> tuple[Tensor, Tensor | None]:
    d_out, qkv, out, lse, scale, causal, want_out = call
    assert out is not None
    q, k, v = map(by_head, parts(qkv))
    unused, tokens = lse.new_empty(2, dtype=torch.int64), qkv.shape[1]  # dropout's seed and offset
    gradients = torch.ops.aten._scaled_dot_product_flash_attention_backward(
        by_head(d_out), q, k, v, by_head(out), lse, None, None, tokens, tokens, 0.0, causal, unused, unused, scale=scale
    )
    return torch.stack([by_head(g) for g in gradients], dim=2), out if want_out else None
