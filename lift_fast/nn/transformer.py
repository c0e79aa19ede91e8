"""The pre-norm transformer that the ViT and CLIP's text tower share."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


class Block(nn.Module):
    """x + Attention(LN(x)), then x + MLP(LN(x)); x is [batch, tokens, width]."""

    def __init__(self, width: int, heads: int, causal: bool):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.ln_1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.ln_2 = nn.LayerNorm(width)
        self.fc_1 = nn.Linear(width, 4 * width)
        self.fc_2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(self.ln_1(x)).view(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [batch, heads, tokens, head_dim]
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.proj(attended.transpose(1, 2).reshape(batch, tokens, width))
        return x + self.fc_2(F.gelu(self.fc_1(self.ln_2(x))))


class Transformer(nn.Module):
    """`layers` blocks. With `checkpointing`, a block's activations are recomputed in backward."""

    def __init__(self, width: int, layers: int, heads: int, *, causal: bool = False):
        super().__init__()
        self.checkpointing = False
        blocks = [Block(width, heads, causal) for _ in range(layers)]
        # open_clip's initialisation: residual branches shrink with depth.
        for block in blocks:
            nn.init.normal_(block.qkv.weight, std=width**-0.5)
            nn.init.normal_(block.fc_1.weight, std=(2 * width) ** -0.5)
            for linear in (block.proj, block.fc_2):
                nn.init.normal_(linear.weight, std=(2 * layers * width) ** -0.5)
            for linear in (block.qkv, block.proj, block.fc_1, block.fc_2):
                nn.init.zeros_(linear.bias)
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x
