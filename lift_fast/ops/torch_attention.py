"""Attention in plain torch, dense: any device, any floating dtype, any shape. See attention.py for the contract."""

import torch
from torch import Tensor

KEEPS_OUT = False


def why_not() -> str | None:
    return None


def refuses(tokens: int, head_dim: int, dtype: torch.dtype) -> str | None:
    return None


def forward(qkv: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    _, _, v, scores = _scores(qkv, scale, causal)
    lse = scores.logsumexp(dim=-1)
    return _tokens(scores.sub_(lse[..., None]).exp_() @ v, qkv), lse


def backward(
    d_out: Tensor, qkv: Tensor, out: Tensor | None, lse: Tensor, scale: float, causal: bool, want_out: bool
) -> tuple[Tensor, Tensor | None]:
    q, k, v, scores = _scores(qkv, scale, causal)
    p = scores.sub_(lse[..., None]).exp_()
    g = d_out.transpose(1, 2).to(p.dtype)
    dp = g @ v.mT
    ds = p * (dp - (p * dp).sum(dim=-1, keepdim=True)) * scale
    d_qkv = torch.empty_like(qkv)
    for part, d in zip(d_qkv.permute(2, 0, 3, 1, 4), (ds @ k, ds.mT @ q, p.mT @ g), strict=True):
        part.copy_(d)
    return d_qkv, _tokens(p @ v, qkv) if want_out else None


def _scores(qkv: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and S, [batch, heads, tokens, ...], in float32 or float64."""
    kind = torch.float64 if qkv.dtype == torch.float64 else torch.float32
    q, k, v = qkv.permute(2, 0, 3, 1, 4).to(kind)
    scores = scale * (q @ k.mT)
    if causal:
        scores.masked_fill_(torch.ones_like(scores[0, 0]).triu(1).bool(), -torch.inf)
    return q, k, v, scores


def _tokens(x: Tensor, qkv: Tensor) -> Tensor:
    return x.transpose(1, 2).to(qkv.dtype).contiguous()
