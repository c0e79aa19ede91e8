"""xFormers' memory-efficient attention, with the operator that xFormers chooses. See contract.py.

It takes views of qkv and allocates the gradients, which one copy packs. Some of its operators pad the log-sum-exp.
Not run on a GPU yet.
"""

import torch
from torch import Tensor

from .contract import AttentionGrad
from .library import Library, named, no_gpu, not_taken

KEEPS_OUT = True

_library = Library(
    "xformers",
    ("xformers.ops.fmha",),
    "it needs a build for this torch: pip install 'lift-fast[xformers]'",
    (
        ("LowerTriangularMask", ""),
        ("memory_efficient_attention_forward_requires_grad", "query key value attn_bias scale"),
        ("memory_efficient_attention_backward", "grad output lse query key value attn_bias scale"),
    ),
)


def why_not() -> str | None:
    if reason := no_gpu((8, 0)) or _library.why_not():
        return reason
    if not any(operator.is_available() for operator in getattr(_library.module, "ALL_BW_OPS", ())):
        return f"xformers has no kernels for this GPU; {_library.install}"
    return None


def refuses(tokens: int, head_dim: int, dtype: torch.dtype) -> str | None:
    return not_taken(head_dim, dtype, 128)


def forward(qkv: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    out, lse = _library.module.memory_efficient_attention_forward_requires_grad(
        **named("query key value", qkv),
        attn_bias=_library.module.LowerTriangularMask() if causal else None,
        scale=scale,
    )
    return out, lse[..., : qkv.shape[1]].contiguous()


def backward(call: AttentionGrad) -> tuple[Tensor, Tensor | None]:
    gradients = _library.module.memory_efficient_attention_backward(
        grad=call.d_out,
        output=call.out,
        lse=call.lse,
        **named("query key value", call.qkv),
        attn_bias=_library.module.LowerTriangularMask() if call.causal else None,
        scale=call.scale,
    )
    return torch.stack(gradients, dim=2), call.out if call.want_out else None
