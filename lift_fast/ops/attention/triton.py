"""Attention of short sequences on a GPU, in Triton (kernels/attention.py).

It takes what fits on the chip whole: up to 256 tokens of head_dim 64, or 128 of up to 128; others serve the rest. The
tables of `tuned` (family "attention", settings "forward" and "backward") say which, and in which tiles.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import tuned
from ..backends import why_no_triton as why_not

if TYPE_CHECKING:
    from ...kernels.attention import Tile

__all__ = ["KEEPS_OUT", "backward", "forward", "refuses", "why_not"]

KEEPS_OUT = False
HALF = (torch.bfloat16, torch.float16)


def table(device: torch.device) -> str:
    """The table for a device; where kernels are interpreted, that of the GPU that takes most."""
    return tuned.gpu("attention", device) if device.type == "cuda" else "sm_90"


def tile(which: str, tokens: int, head_dim: int, causal: bool, device: torch.device) -> "Tile | None":
    """How it is done there, which: "forward" or "backward"; None: not without spilling registers."""
    from ...kernels import attention

    value = tuned.lookup("attention", table(device), which, tokens=tokens, head_dim=head_dim, causal=causal)
    return value and attention.Tile(**value)


def refuses(tokens: int, head_dim: int, dtype: torch.dtype) -> str | None:
    """Why it does not take these on the current GPU; None if it does."""
    if dtype not in HALF:
        return f"it takes bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    here = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if head_dim > 0 and tile("backward", tokens, head_dim, False, here):
        return None
    return f"{tokens} tokens with head_dim {head_dim} do not fit on the chip, by the table of {table(here)}"


def forward(qkv: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """out [batch, tokens, heads, head_dim] and lse [batch, heads, tokens] in float32.

    qkv: [batch, tokens, 3, heads, head_dim], contiguous.
    """
    from ...kernels import attention

    batch, tokens, _, heads, head_dim = qkv.shape
    if not qkv.numel():
        empty = qkv.new_empty((batch, tokens, heads, head_dim))
        return empty, empty.new_empty((batch, heads, tokens), dtype=torch.float32)
    found = tile("forward", tokens, head_dim, causal, qkv.device)
    assert found, "ask refuses() first"
    with torch.cuda.device_of(qkv):
        return attention.forward(qkv, scale, causal, found)


def backward(
    d_out: Tensor, qkv: Tensor, out: Tensor | None, lse: Tensor, scale: float, causal: bool, want_out: bool
) -> tuple[Tensor, Tensor | None]:
    """d_qkv as qkv, and out again if it is wanted. d_out: contiguous, as out."""
    from ...kernels import attention

    if not qkv.numel():
        return torch.empty_like(qkv), torch.empty_like(d_out) if want_out else None
    found = tile("backward", qkv.shape[1], qkv.shape[4], causal, qkv.device)
    assert found, "ask refuses() first"
    with torch.cuda.device_of(qkv):
        return attention.backward(d_out, qkv, lse, scale, causal, want_out, found)
