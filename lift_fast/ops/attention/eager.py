"""The "torch" backend of attention: plain and dense, for any device, floating dtype and shape. See contract.py.

It computes a few images at a time, so that a tensor of scores takes at most SCORES bytes. The backward has four such
tensors.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .contract import AttentionGrad

KEEPS_OUT = False
SCORES = 256 << 20  # bytes


def why_not() -> str | None:
    return None


def refuses(tokens: int, head_dim: int, dtype: torch.dtype) -> str | None:
    return None


def forward(qkv: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    batch, tokens, _, heads, head_dim = qkv.shape
    out = qkv.new_empty(batch, tokens, heads, head_dim)
    lse = qkv.new_empty(batch, heads, tokens, dtype=_wide(qkv))
    for some in _few(qkv):
        _, _, v, scores = _scores(qkv[some], scale, causal)
        lse[some] = scores.logsumexp(dim=-1)
        out[some] = (scores.sub_(lse[some][..., None]).exp_() @ v).transpose(1, 2)
    return out, lse


def backward(call: AttentionGrad) -> tuple[Tensor, Tensor | None]:
    d_out, qkv, _, lse, scale, causal, want_out = call
    d_qkv, again = torch.empty_like(qkv), torch.empty_like(d_out) if want_out else None
    for some in _few(qkv):
        q, k, v, scores = _scores(qkv[some], scale, causal)
        p = scores.sub_(lse[some][..., None]).exp_()
        g = d_out[some].transpose(1, 2).to(p.dtype)
        dp = g @ v.mT
        ds = dp.sub_((p * dp).sum(dim=-1, keepdim=True)).mul_(p).mul_(scale)
        for part, d in zip(d_qkv[some].permute(2, 0, 3, 1, 4), (ds @ k, ds.mT @ q, p.mT @ g), strict=True):
            part.copy_(d)
        if again is not None:
            again[some] = (p @ v).transpose(1, 2)
    return d_qkv, again


def _few(qkv: Tensor) -> Iterator[slice]:
    """Slices of the batch that are computed one after another."""
    batch, tokens, _, heads, _ = qkv.shape
    step = max(1, SCORES // max(1, heads * tokens * tokens * _wide(qkv).itemsize))
    for first in range(0, batch, step):
        yield slice(first, first + step)


def _wide(qkv: Tensor) -> torch.dtype:
    return torch.float64 if qkv.dtype == torch.float64 else torch.float32


def _scores(qkv: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and S, [batch, heads, tokens, ...], in float32 or float64."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4).to(_wide(qkv))
    scores = scale * (q @ k.mT)
    if causal:
        scores.masked_fill_(torch.ones_like(scores[0, 0]).triu(1).bool(), -torch.inf)
    return q, k, v, scores
