"""The "cpp" backend of attention: csrc/attention, on the CPU. float16 is computed in float32. See contract.py."""

import torch
from torch import Tensor

from ..backends import _C, DTYPES, address
from ..backends import why_no_cpp as why_not
from .contract import AttentionGrad

__all__ = ["KEEPS_OUT", "backward", "forward", "refuses", "why_not"]

KEEPS_OUT = False


def refuses(tokens: int, head_dim: int, dtype: torch.dtype) -> str | None:
    if dtype not in DTYPES:
        return f"it takes float32, bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    return None


def _attention(qkv: Tensor, scale: float, causal: bool) -> "_C.Attention":
    batch, tokens, _, heads, dim = qkv.shape
    return _C.Attention(
        qkv=qkv.data_ptr(),
        type=DTYPES[qkv.dtype],
        batch=batch,
        tokens=tokens,
        heads=heads,
        dim=dim,
        scale=scale,
        causal=causal,
    )


def forward(qkv: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    batch, tokens, _, heads, dim = qkv.shape
    out = qkv.new_empty(batch, tokens, heads, dim)
    lse = qkv.new_empty(batch, heads, tokens, dtype=torch.float32)
    _C.attention_forward(
        _attention(qkv, scale, causal), out=out.data_ptr(), lse=lse.data_ptr(), threads=torch.get_num_threads()
    )
    return out, lse


def backward(call: AttentionGrad) -> tuple[Tensor, Tensor | None]:
    d_out, qkv, _, lse, scale, causal, want_out = call
    d_qkv, again = torch.empty_like(qkv), torch.empty_like(d_out) if want_out else None
    _C.attention_backward(
        _attention(qkv, scale, causal),
        d_out=d_out.data_ptr(),
        lse=lse.data_ptr(),
        d_qkv=d_qkv.data_ptr(),
        out=address(again),
        threads=torch.get_num_threads(),
    )
    return d_qkv, again
