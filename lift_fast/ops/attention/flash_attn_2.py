"""FlashAttention-2 of the package flash-attn (Dao, arXiv 2307.08691). See contract.py.

Not run on a GPU yet.
"""

import torch
from torch import Tensor

from .contract import AttentionGrad
from .library import Library, flash_backward, flash_forward, no_gpu, not_taken

KEEPS_OUT = True

_library = Library(
    "flash-attn",
    ("flash_attn.flash_attn_interface",),
    "it needs flash-attn 2.7 or later, built for this torch: pip install --no-build-isolation 'flash-attn>=2.7'",
    (
        (
            "_flash_attn_forward",
            "q k v dropout_p softmax_scale causal window_size_left window_size_right softcap alibi_slopes "
            "return_softmax",
        ),
        (
            "_flash_attn_backward",
            "dout q k v out softmax_lse dq dk dv dropout_p softmax_scale causal window_size_left window_size_right "
            "softcap alibi_slopes deterministic",
        ),
    ),
)
_PLAIN = {"dropout_p": 0.0, "window_size_left": -1, "window_size_right": -1, "softcap": 0.0, "alibi_slopes": None}


def why_not() -> str | None:
    return no_gpu((8, 0)) or _library.why_not()


def refuses(tokens: int, head_dim: int, dtype: torch.dtype) -> str | None:
    return not_taken(head_dim, dtype, 256)


def forward(qkv: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    return flash_forward(_library.module._flash_attn_forward, qkv, scale, causal, return_softmax=False, **_PLAIN)


def backward(call: AttentionGrad) -> tuple[Tensor, Tensor | None]:
    return flash_backward(
        _library.module._flash_attn_backward, call, softmax_lse=call.lse, causal=call.causal, **_PLAIN
    )
