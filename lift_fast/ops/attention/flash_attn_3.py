"""FlashAttention-3, for Hopper (Shah et al., arXiv 2407.08608). See contract.py.

Not run on a GPU yet.
"""

import torch
from torch import Tensor

from .contract import AttentionGrad
from .library import Library, flash_backward, flash_forward, no_gpu, not_taken

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
    return flash_forward(_library.module._flash_attn_forward, qkv, scale, causal)


def backward(call: AttentionGrad) -> tuple[Tensor, Tensor | None]:
    return flash_backward(_library.module._flash_attn_backward, call, softmax_lse=call.lse, is_causal=call.causal)
