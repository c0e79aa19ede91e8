"""The "triton" backend of attention: short sequences on a GPU, by kernels/attention.py. See contract.py.

It takes sequences that fit on the chip whole: up to 256 tokens with head_dim 64, or 128 tokens with head_dim up to 128.
The tables of `tuned` (family "attention", settings "forward" and "backward") list these sizes with their tiles.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import tuned
from ..backends import HALF
from ..backends import why_no_triton as why_not
from .contract import AttentionGrad

if TYPE_CHECKING:
    from ...kernels.attention import Tile

__all__ = ["KEEPS_OUT", "backward", "forward", "refuses", "why_not"]

KEEPS_OUT = False


def table(device: torch.device) -> str:
    """The name of the table for a device; for Triton's interpreter that of sm_90, which takes the most sizes."""
    return tuned.gpu("attention", device) if device.type == "cuda" else "sm_90"


def tile(which: str, tokens: int, head_dim: int, causal: bool, device: torch.device) -> "Tile | None":
    """The tile for a device; None if every tile would spill registers. which: "forward" or "backward"."""
    from ...kernels import attention

    value = tuned.lookup("attention", table(device), which, tokens=tokens, head_dim=head_dim, causal=causal)
    return value and attention.Tile(**value)


def refuses(tokens: int, head_dim: int, dtype: torch.dtype) -> str | None:
    if dtype not in HALF:
        return f"it takes bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if head_dim > 0 and tile("backward", tokens, head_dim, False, device):
        return None
    return f"{tokens} tokens with head_dim {head_dim} do not fit on the chip, by the table of {table(device)}"


def forward(qkv: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    from ...kernels import attention

    batch, tokens, _, heads, head_dim = qkv.shape
    if not qkv.numel():
        empty = qkv.new_empty((batch, tokens, heads, head_dim))
        return empty, empty.new_empty((batch, heads, tokens), dtype=torch.float32)
    found = tile("forward", tokens, head_dim, causal, qkv.device)
    assert found, "refuses() does not take these"
    with torch.cuda.device_of(qkv):
        return attention.forward(qkv, scale, causal, found)


def backward(call: AttentionGrad) -> tuple[Tensor, Tensor | None]:
    from ...kernels import attention

    d_out, qkv, _, lse, scale, causal, want_out = call
    if not qkv.numel():
        return torch.empty_like(qkv), torch.empty_like(d_out) if want_out else None
    found = tile("backward", qkv.shape[1], qkv.shape[4], causal, qkv.device)
    assert found, "refuses() does not take these"
    with torch.cuda.device_of(qkv):
        return attention.backward(d_out, qkv, lse, scale, causal, want_out, found)
