"""FlashAttention-4, written in the CuTe DSL, for Hopper and Blackwell. See attention.py for the contract.

It takes views of qkv and writes the gradients into views of d_qkv. It compiles a kernel at the first call of each
head_dim and mask. Not run on a GPU yet.
"""

import torch
from torch import Tensor

from .library import Library, named, no_gpu, not_taken

KEEPS_OUT = True

_library = Library(
    "flash-attn-4",
    ("flash_attn.cute.interface",),
    "pip install 'lift-fast[flash-attn-4]'",
    (
        ("_flash_attn_fwd", "q k v softmax_scale causal return_lse"),
        ("_flash_attn_bwd", "q k v out dout lse softmax_scale causal deterministic dq dk dv"),
    ),
)


def why_not() -> str | None:
    return no_gpu((9, 0)) or _library.why_not()


def refuses(tokens: int, head_dim: int, dtype: torch.dtype) -> str | None:
    return not_taken(head_dim, dtype, 128)


def forward(qkv: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    out, lse, *_ = _library.module._flash_attn_fwd(
        **named("q k v", qkv), softmax_scale=scale, causal=causal, return_lse=True
    )
    return out, lse


def backward(
    d_out: Tensor, qkv: Tensor, out: Tensor | None, lse: Tensor, scale: float, causal: bool, want_out: bool
) -> tuple[Tensor, Tensor | None]:
    d_qkv = torch.empty_like(qkv)
    _library.module._flash_attn_bwd(
        **named("q k v", qkv),
        out=out,
        dout=d_out,
        lse=lse,
        softmax_scale=scale,
        causal=causal,
        deterministic=torch.are_deterministic_algorithms_enabled(),
        **named("dq dk dv", d_qkv),
    )
    return d_qkv, out if want_out else None
