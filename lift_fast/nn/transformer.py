"""The pre-norm transformer of the ViT and of CLIP's text tower."""

from typing import Any

import torch
from torch import Tensor, nn

from ..ops.attention.contract import choose, keeps_out
from ..ops.block import Checkpointing, block, kept_bytes
from ..ops.transformer.contract import Activation
from ..ops.transformer.layernorm import layernorm


class LayerNorm(nn.LayerNorm):
    """torch's LayerNorm, computed by lift-fast's op: statistics in float32; the result has the input's dtype, also
    under autocast."""

    def forward(self, x: Tensor) -> Tensor:
        y = layernorm(x, self.weight, self.bias, self.eps)
        assert isinstance(y, Tensor)
        return y


class Block(nn.Module):
    """One block, x + Attention(LN(x)) followed by x + MLP(LN(x)): its weights, and a call of ops/block.py."""

    def __init__(self, width: int, mlp_dim: int, norm_eps: float):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width, norm_eps)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.ln_2 = nn.LayerNorm(width, norm_eps)
        self.fc_1 = nn.Linear(width, mlp_dim)
        self.fc_2 = nn.Linear(mlp_dim, width)

    def forward(self, x: Tensor, residual: Tensor | None, **options: Any) -> tuple[Tensor, Tensor]:
        """`ops.block.block` of x and residual with these weights; options: its keyword arguments."""
        return block(x, residual, *self.weights(), **options)

    def weights(self) -> tuple[Tensor, ...]:
        """The weights in the order of the arguments of ops/block.py."""
        return tuple(p for layer in self.children() for p in (layer.weight, layer.bias))  # type: ignore[misc]


class Transformer(nn.Module):
    """`layers` blocks: x [batch, tokens, width] -> [batch, tokens, width], in the dtype that the blocks compute in.

    mlp_dim: width of the hidden layers; None: four times width. Attributes that may be set at any time: checkpointing,
    the activation recomputation level (ops/block.py); fp8, whether linear layers multiply in float8
    (ops/transformer/float8.py); backend (of layernorm and MLP) and attention_backend, None for the first available one.
    """

    def __init__(
        self,
        width: int,
        layers: int,
        heads: int,
        *,
        mlp_dim: int | None = None,
        causal: bool = False,
        activation: Activation = "gelu",
        norm_eps: float = 1e-5,
    ):
        super().__init__()
        self.width, self.heads, self.causal = width, heads, causal
        self.mlp_dim, self.activation, self.norm_eps = mlp_dim or 4 * width, activation, norm_eps
        self.checkpointing: Checkpointing = "none"
        self.fp8 = False
        self.backend: str | None = None
        self.attention_backend: str | None = None
        blocks = [Block(width, self.mlp_dim, norm_eps) for _ in range(layers)]
        # open_clip's initialisation: smaller weights at the ends of the residual branches of deeper models.
        for layer in blocks:
            nn.init.normal_(layer.qkv.weight, std=width**-0.5)
            nn.init.normal_(layer.fc_1.weight, std=(2 * width) ** -0.5)
            for linear in (layer.proj, layer.fc_2):
                nn.init.normal_(linear.weight, std=(2 * layers * width) ** -0.5)
            for linear in (layer.qkv, layer.proj, layer.fc_1, layer.fc_2):
                nn.init.zeros_(linear.bias)
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        branch: Tensor | None = None
        for layer in self.blocks:
            x, branch = layer(  # a module's call, so that hooks see it: FSDP2 gathers a block's weights in one
                x,
                branch,
                heads=self.heads,
                eps=self.norm_eps,
                activation=self.activation,
                causal=self.causal,
                checkpointing=self.checkpointing,
                fp8=self.fp8,
                backend=self.backend,
                attention_backend=self.attention_backend,
            )
        return x if branch is None else x + branch

    def activation_bytes(self, batch: int, tokens: int, dtype: torch.dtype, device: str = "cpu") -> int:
        """Bytes that the blocks keep for the backward of [batch, tokens] tokens in dtype, without the weights."""
        head_dim = self.width // self.heads
        name, _ = choose(device, tokens, head_dim, dtype, self.attention_backend)
        sizes = batch * tokens, self.width, self.mlp_dim, self.heads, dtype.itemsize
        return len(self.blocks) * kept_bytes(*sizes, self.checkpointing, keeps_out(name))
