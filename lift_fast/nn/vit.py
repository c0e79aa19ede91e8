"""The image tower: a ViT (Dosovitskiy et al., arXiv 2010.11929), by default in the variant of LIFT's authors."""

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ConfigError
from .config import VitConfig
from .transformer import LayerNorm, Transformer


class Vit(nn.Module):
    """Normalised pixels [batch, 3, H, W] -> features [batch, width].

    H and W are multiples of patch_size. If they differ from image_size, the positions are interpolated in every call;
    `resize` does it once. Raises ValueError for pixels of another shape.
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

    def forward(self, pixels: Tensor, kept: Tensor | None = None) -> Tensor:
        """kept: as for `tokens`."""
        x = self.tokens(pixels, kept)
        if self.config.norm_after_pool or self.config.pool == "cls":  # only the class token needs to be normalised
            return self.ln_post(self.pooled(x))
        return self.pooled(self.ln_post(x))

    def tokens(self, pixels: Tensor, kept: Tensor | None = None) -> Tensor:
        """The output of the last block, [batch, tokens, width], with the class token first if there is one.

        kept: int64 [batch, n], the numbers of the patches that each image keeps, counted row by row; None: all, or in
        training those that patch dropout draws from torch's generator.

        Raises ValueError for pixels that are not [batch, 3, H, W] with multiples of patch_size, or kept that is not
        [batch, n].
        """
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
        if kept is None and self.training and config.patch_dropout:
            count = patches_left(x.shape[1], config.patch_dropout)
            kept = torch.rand(x.shape[:2], device=x.device).topk(count, dim=1, sorted=False).indices
        if kept is not None:
            if kept.dim() != 2 or len(kept) != len(x):
                raise ValueError(f"kept must be [{len(x)}, n], patch numbers of each image, not {tuple(kept.shape)}")
            x = x.gather(1, kept[..., None].expand(-1, -1, x.shape[2]))
        if config.class_token:
            cls = self.class_embedding.to(x.dtype) + positions[0]
            x = torch.cat([cls.expand(x.shape[0], 1, -1), x], dim=1)
        return self.transformer(self.ln_pre(x) if config.pre_norm else x)

    def pooled(self, x: Tensor) -> Tensor:
        """Pools tokens [batch, tokens, width] to [batch, width], as config.pool says."""
        if self.config.pool == "cls":
            return x[:, 0]
        return x[:, int(self.config.class_token) :].mean(dim=1)

    def resize(self, image_size: int) -> None:
        """Changes the tower's image_size and interpolates its positions. Raises ConfigError for an invalid size."""
        config = replace(self.config, image_size=image_size)
        grids = [(c.grid, c.grid) for c in (self.config, config)]
        self.positional_embedding = nn.Parameter(resized(self.positional_embedding.detach(), *grids))
        self.config = config

    def activation_bytes(self, batch: int, dtype: torch.dtype = torch.bfloat16, device: str = "cpu") -> int:
        """Bytes that the blocks keep for the backward of a batch, computed in dtype, without the weights."""
        patches = self.config.grid**2
        if self.training and self.config.patch_dropout:
            patches = patches_left(patches, self.config.patch_dropout)
        return self.transformer.activation_bytes(batch, patches + self.config.class_token, dtype, device)


def patches_left(patches: int, rate: float) -> int:
    """The number of an image's patches that patch dropout of this rate keeps: at least one."""
    return max(1, int(patches * (1 - rate)))


def resized(positions: Tensor, grid: tuple[int, int], to: tuple[int, int]) -> Tensor:
    """Interpolates positional embeddings [prefix + h·w, width] of a grid (h, w) to another grid: bicubic, antialiased.

    open_clip and timm do the same when they load weights. prefix is 0 or 1, a class token, which is unchanged.
    Raises ConfigError when the number of positions is not that of the grid.
    """
    prefix = len(positions) - grid[0] * grid[1]
    if prefix not in (0, 1):
        raise ConfigError(f"{len(positions)} positions are not those of {grid[0]} x {grid[1]} patches")
    width = positions.shape[1]
    patches = positions[prefix:].float().view(1, *grid, width).permute(0, 3, 1, 2)
    patches = F.interpolate(patches, to, mode="bicubic", antialias=True, align_corners=False)
    patches = patches.permute(0, 2, 3, 1).reshape(-1, width).to(positions.dtype)
    return torch.cat([positions[:prefix], patches])
