"""The image tower: a ViT (Dosovitskiy et al., arXiv 2010.11929), by default as LIFT's authors run it."""

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ConfigError
from .config import VitConfig
from .transformer import LayerNorm, Transformer


class Vit(nn.Module):
    """pixels [batch, 3, H, W], normalised -> features [batch, width].

    H and W are multiples of patch_size. Where they are not image_size, the positions are interpolated, every time;
    `Vit.resize` does so once.
    """

    def __init__(self, config: VitConfig):
        super().__init__()
        self.config = config
        scale = config.width**-0.5
        size = config.patch_size
        self.patch_embed = nn.Conv2d(3, config.width, size, size, bias=config.patch_bias)
        if config.class_token:
            self.class_embedding = nn.Parameter(scale * torch.randn(config.width))
        self.positional_embedding = nn.Parameter(scale * torch.randn(config.tokens, config.width))
        if config.pre_norm:
            self.ln_pre = LayerNorm(config.width, config.norm_eps)
        self.transformer = Transformer(
            config.width,
            config.layers,
            config.heads,
            mlp_dim=config.hidden,
            activation=config.activation,
            norm_eps=config.norm_eps,
        )
        self.ln_post = LayerNorm(config.width, config.norm_eps)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.tokens(pixels)
        if self.config.norm_after_pool or self.config.pool == "cls":  # the norm of one token needs no other
            return self.ln_post(self.pooled(x))
        return self.pooled(self.ln_post(x))

    def tokens(self, pixels: Tensor) -> Tensor:
        """[batch, tokens, width]: what the last block leaves, the class token first where there is one."""
        config, size = self.config, self.config.patch_size
        if pixels.dim() != 4 or pixels.shape[2] % size or pixels.shape[3] % size:
            raise ValueError(
                f"pixels must be [batch, 3, H, W] with multiples of {size} for H and W, not {tuple(pixels.shape)}"
            )
        x = self.patch_embed(pixels).flatten(2).transpose(1, 2)  # [batch, patches, width]
        grid = pixels.shape[2] // size, pixels.shape[3] // size
        positions: Tensor = self.positional_embedding
        if grid != (config.grid, config.grid):
            positions = resized(positions, (config.grid, config.grid), grid)
        positions = positions.to(x.dtype)
        first = int(config.class_token)
        x = x + positions[first:]
        if self.training and config.patch_dropout:
            kept = max(1, int(x.shape[1] * (1 - config.patch_dropout)))
            chosen = torch.rand(x.shape[:2], device=x.device).topk(kept, dim=1, sorted=False).indices
            x = x.gather(1, chosen[..., None].expand(-1, -1, x.shape[2]))
        if config.class_token:
            cls = self.class_embedding.to(x.dtype) + positions[0]
            x = torch.cat([cls.expand(x.shape[0], 1, -1), x], dim=1)
        return self.transformer(self.ln_pre(x) if config.pre_norm else x)

    def pooled(self, x: Tensor) -> Tensor:
        """[batch, tokens, width] -> [batch, width]."""
        if self.config.pool == "cls":
            return x[:, 0]
        return x[:, int(self.config.class_token) :].mean(dim=1)

    def resize(self, image_size: int) -> None:
        """Makes this the tower of another image_size, its positions interpolated. Raises ConfigError."""
        config = replace(self.config, image_size=image_size)
        grids = [(c.grid, c.grid) for c in (self.config, config)]
        self.positional_embedding = nn.Parameter(resized(self.positional_embedding.detach(), *grids))
        self.config = config

    def activation_bytes(self, batch: int, dtype: torch.dtype = torch.bfloat16, device: str = "cpu") -> int:
        """Bytes that the blocks keep for the backward of a batch in training, computed in dtype; weights aside."""
        patches = self.config.grid**2
        if self.training and self.config.patch_dropout:
            patches = max(1, int(patches * (1 - self.config.patch_dropout)))
        return self.transformer.activation_bytes(batch, patches + self.config.class_token, dtype, device)


def resized(positions: Tensor, grid: tuple[int, int], to: tuple[int, int]) -> Tensor:
    """Positional embeddings [prefix + h·w, width] of a grid (h, w) for another grid, bicubically, antialiased.

    As open_clip and timm resize them when they load; the prefix (the class token) stays as it is.
    Raises ConfigError when the positions are not of that grid.
    """
    prefix = len(positions) - grid[0] * grid[1]
    if prefix not in (0, 1):
        raise ConfigError(f"{len(positions)} positions are not those of {grid[0]} x {grid[1]} patches")
    width = positions.shape[1]
    patches = positions[prefix:].float().view(1, *grid, width).permute(0, 3, 1, 2)
    patches = F.interpolate(patches, to, mode="bicubic", antialias=True, align_corners=False)
    patches = patches.permute(0, 2, 3, 1).reshape(-1, width).to(positions.dtype)
    return torch.cat([positions[:prefix], patches])
