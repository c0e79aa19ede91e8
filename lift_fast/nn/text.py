"""CLIP's text tower, which LIFT does not need."""

import torch
from torch import Tensor, nn

from .config import TextConfig
from .transformer import LayerNorm, Transformer


class TextTransformer(nn.Module):
    """Token ids int64 [batch, context], padded with 0 after the end-of-text token -> features [batch, width]."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(config.context, config.width))
        self.transformer = Transformer(
            config.width, config.layers, config.heads, causal=True, activation=config.activation
        )
        self.ln_final = LayerNorm(config.width)
        nn.init.normal_(self.token_embedding.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token_embedding(tokens) + self.positional_embedding
        x = self.transformer(x)
        # The end-of-text token has the largest id of CLIP's vocabulary, so argmax finds it.
        ends = x[torch.arange(x.shape[0], device=x.device), tokens.argmax(dim=1)]
        return self.ln_final(ends)
