"""FlashAttention-3, for Hopper (Shah et al., arXiv 2407.08608). See attention.py for the contract.

It takes views of qkv and writes the gradients into views of d_qkv. Not run on a GPU yet.
"""

import torch
from torch import Tensor

from .library import Library, named, no_gpu, not_taken

KEEPS_OUT = True

_library = Library(
    "flash_attn_3",
    ("flash_attn_3.flash_attn_interface", "flash_attn_interface"),
    "it is built from the folder hopper of github.com/Dao-AILab/flash-attention (2026 or later)",
    (
        ("_flash_attn_forward", "q k v softmax_scale causal"),
        ("_flash_attn_backward", "dout q k v out softmax_lse dq dk dv softmax_scale is_causal deterministic"),
    ),
)


def why_not() -> str | None:
    return no_gpu((9, 0), most=9) or _library.why_not()


def refuses(tokens: int, head_dim: int, dtype: torch.dtype) -> str | None:
    return not_taken(head_dim, dtype, 192)  # at 256 its backward is not deterministic on request


def forward(qkv: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    out, lse, *_ = _library.module._flash_attn_forward(**named("q k v", qkv), softmax_scale=scale, causal=causal)
    return out, lse


def backward(
    d_out: Tensor, qkv: Tensor, out: Tensor | None, lse: Tensor, scale: float, causal: bool, want_out: bool
) -> tuple[Tensor, Tensor | None]:
    d_qkv = torch.empty_like(qkv)
    _library.module._flash_attn_backward(
        dout=d_out,
        **named("q k v", qkv),
        out=out,
        softmax_lse=lse,
        **named("dq dk dv", d_qkv),
        softmax_scale=scale,
        is_causal=causal,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return d_qkv, out if want_out else None
