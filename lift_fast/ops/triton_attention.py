"""Attention of short sequences on a GPU, in Triton (kernels/attention.py).

It takes what fits on the chip whole: up to 256 tokens of head_dim 64, or 128 of up to 128; others serve the rest.
"""

import torch
from torch import Tensor

from .triton_blocks import why_not

__all__ = ["KEEPS_OUT", "backward", "forward", "refuses", "why_not"]

KEEPS_OUT = False
HALF = (torch.bfloat16, torch.float16)


def refuses(tokens: int, head_dim: int, dtype: torch.dtype) -> str | None:
    """Why it does not take these on the current GPU; None if it does."""
    from ..kernels import attention

    if dtype not in HALF:
        return f"it takes bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    here = attention.capability()
    if head_dim > 0 and attention.plan(tokens, head_dim, here):
        return None
    on = "" if here >= (9, 0) else f" on compute capability {here[0]}.{here[1]}"
    return f"{tokens} tokens with head_dim {head_dim} do not fit on the chip{on}"


def forward(qkv: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """out [batch, tokens, heads, head_dim] and lse [batch, heads, tokens] in float32.

    qkv: [batch, tokens, 3, heads, head_dim], contiguous.
    """
    from ..kernels import attention

    if not qkv.numel():
        batch, tokens, _, heads, head_dim = qkv.shape
        empty = qkv.new_empty((batch, tokens, heads, head_dim))
        return empty, empty.new_empty((batch, heads, tokens), dtype=torch.float32)
    with torch.cuda.device_of(qkv):
        return attention.forward(qkv, scale, causal)


def backward(
    d_out: Tensor, qkv: Tensor, out: Tensor | None, lse: Tensor, scale: float, causal: bool, want_out: bool
) -> tuple[Tensor, Tensor | None]:
    """d_qkv as qkv, and out again if it is wanted. d_out: contiguous, as out."""
    from ..kernels import attention

    if not qkv.numel():
        return torch.empty_like(qkv), torch.empty_like(d_out) if want_out else None
    with torch.cuda.device_of(qkv):
        return attention.backward(d_out, qkv, lse, scale, causal, want_out)
