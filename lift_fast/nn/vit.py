"""The image tower: ViT with average pooling, as LIFT's authors run it (arXiv 2506.04209, section 4)."""

import torch
from torch import Tensor, nn

from .config import VitConfig
from .transformer import Transformer


class Vit(nn.Module):
    """pixels [batch, 3, image_size, image_size], normalised -> features [batch, width].

    The class token is kept (as open_clip keeps it) and the patch tokens are averaged.
    """

    def __init__(self, config: VitConfig):
        super().__init__()
        self.config = config
        patches = (config.image_size // config.patch_size) ** 2
        scale = config.width**-0.5
        self.patch_embed = nn.Conv2d(3, config.width, config.patch_size, config.patch_size, bias=False)
        self.class_embedding = nn.Parameter(scale * torch.randn(config.width))
        self.positional_embedding = nn.Parameter(scale * torch.randn(patches + 1, config.width))
        self.ln_pre = nn.LayerNorm(config.width)
        self.transformer = Transformer(config.width, config.layers, config.heads)
        self.ln_post = nn.LayerNorm(config.width)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patch_embed(pixels).flatten(2).transpose(1, 2)  # [batch, patches, width]
        cls = self.class_embedding.to(x.dtype).expand(x.shape[0], 1, -1)
        x = torch.cat([cls, x], dim=1) + self.positional_embedding.to(x.dtype)
        x = self.transformer(self.ln_pre(x))
        return self.ln_post(x[:, 1:].mean(dim=1))
