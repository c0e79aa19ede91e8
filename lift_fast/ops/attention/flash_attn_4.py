"""FlashAttention-4, written in the CuTe DSL, for Hopper and Blackwell. See contract.py.

It compiles a kernel at the first call of each head_dim and mask. Not run on a GPU yet.
"""

import torch
from torch import Tensor

from .contract import AttentionGrad
from .library import Library, flash_backward, flash_forward, no_gpu, not_taken

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
    return flash_forward(_library.module._flash_attn_fwd, qkv, scale, causal, return_lse=True)


def backward(call: AttentionGrad) -> tuple[Tensor, Tensor | None]:
    return flash_backward(_library.module._flash_attn_bwd, call, lse=call.lse, causal=call.causal)
