"""torch's own tiled attention on CPUs. See contract.py.

As flash.py, in every floating dtype. Its log-sum-exp lies in memory as [batch, tokens, heads] and is copied.
"""

import torch
from torch import Tensor

from .contract import AttentionGrad
from .library import by_head, parts

KEEPS_OUT = True


def why_not() -> str | None:
    return None


def refuses(tokens: int, head_dim: int, dtype: torch.dtype) -> str | None:
    return None


def forward(qkv: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    q, k, v = map(by_head, parts(qkv))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    return by_head(out), lse.contiguous()


def backward(call: AttentionGrad) -> tuple[Tensor, Tensor | None]:
    d_out, qkv, out, lse, scale, causal, want_out = call
    assert out is not None
    q, k, v = map(by_head, parts(qkv))
    gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        by_head(d_out), q, k, v, by_head(out), lse, 0.0, causal, scale=scale
    )
    return torch.stack([by_head(g) for g in gradients], dim=2), out if want_out else None
