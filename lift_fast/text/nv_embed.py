"""NV-Embed (arXiv 2405.17428) without the code of its repository, which was written for transformers 4.42.

A Mistral with bidirectional attention, then latent attention from every token's state h to a trained table of latents:
    h <- h + W_o softmax(q k^T / sqrt(head_dim)) v,   q = W_q norm(h),  [k v] = W_kv norm(latents)
    h <- h + W_2 (a * gelu(b)) + b_2,                  [a b] = W_1 norm(h) + b_1
A caption's vector is the mean of h over its tokens. Modules are named so that parameters have the checkpoint's keys.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import MistralConfig, MistralModel, PretrainedConfig, PreTrainedModel

# Defaults of the repository's code, which its config.json omits.
_LATENTS = {"num_latents_value": 512, "num_cross_heads": 8, "latent_dim": 4096, "cross_dim_head": 4096}


class NvEmbedConfig(PretrainedConfig):
    """text_config: of the Mistral. latent_attention_config: num_latents_value (rows of the table), num_cross_heads,
    latent_dim and cross_dim_head (the width of one head)."""

    model_type = "nvembed"

    def __init__(self, text_config: Any = None, latent_attention_config: Any = None, **settings: Any):
        self.text_config = MistralConfig(**{**(text_config or {}), "model_type": "mistral"})
        self.latent_attention_config = {**_LATENTS, **(latent_attention_config or {})}
        super().__init__(**settings)

    def get_text_config(self, *args: Any, **kwargs: Any) -> MistralConfig:
        return self.text_config


class _CrossAttention(nn.Module):
    def __init__(self, dim: int, heads: int, head_dim: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, heads * head_dim, bias=False)
        self.to_kv = nn.Linear(dim, 2 * heads * head_dim, bias=False)
        self.to_out = nn.Linear(heads * head_dim, dim, bias=False)

    def forward(self, hidden: Tensor, latents: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(-2, -3)  # [..., heads, tokens, head_dim]
            for part in (self.to_q(hidden), *self.to_kv(latents).chunk(2, dim=-1))
        )
        k, v = (part.expand(len(q), *part.shape) for part in (k, v))
        return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class _GatedGelu(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)
        return a * F.gelu(b)


class _FeedForward(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(dim, 8 * dim), _GatedGelu(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class _Block(nn.Module):
    def __init__(self, fn: nn.Module, dim: int, context: bool):
        super().__init__()
        self.fn, self.norm = fn, nn.LayerNorm(dim)
        if context:
            self.norm_context = nn.LayerNorm(dim)


class _LatentAttention(nn.Module):
    def __init__(self, num_latents_value: int, num_cross_heads: int, latent_dim: int, cross_dim_head: int, **_: Any):
        super().__init__()
        self.latents = nn.Parameter(torch.randn(num_latents_value, latent_dim))
        self.cross_attend_blocks = nn.ModuleList(
            [
                _Block(_CrossAttention(latent_dim, num_cross_heads, cross_dim_head), latent_dim, context=True),
                _Block(_FeedForward(latent_dim), latent_dim, context=False),
            ]
        )

    def forward(self, hidden: Tensor) -> Tensor:
        blocks: Any = self.cross_attend_blocks
        attend, mix = blocks
        hidden = hidden + attend.fn(attend.norm(hidden), attend.norm_context(self.latents))
        mixed: Tensor = mix.fn(mix.norm(hidden))
        return hidden + mixed


class NvEmbed(PreTrainedModel):
    """input_ids [batch, n], attention_mask [batch, n] -> last_hidden_state [batch, n, dim]; its mean over a caption's
    tokens is the caption's vector."""

    config_class = NvEmbedConfig
    _supports_sdpa = True

    def __init__(self, config: NvEmbedConfig):
        super().__init__(config)
        self.embedding_model = MistralModel(config.text_config)
        self.latent_attention_model = _LatentAttention(**config.latent_attention_config)
        self.post_init()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        # A mask with four dimensions is used in place of the causal mask. It is additive, as every attention of
        # transformers accepts it.
        bidirectional = torch.zeros(attention_mask.shape, dtype=self.dtype, device=attention_mask.device)
        bidirectional = bidirectional.masked_fill(attention_mask == 0, torch.finfo(self.dtype).min)[:, None, None, :]
        out = self.embedding_model(
            input_ids=input_ids, attention_mask=bidirectional.expand(-1, 1, input_ids.shape[1], -1), use_cache=False
        )
        out.last_hidden_state = self.latent_attention_model(out.last_hidden_state)
        return out
