"""The two models side by side: LIFT (ViT + head, fixed text) and CLIP (the same ViT, trained text)."""

import math

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..ops.block import Checkpointing
from ..ops.transformer import float8
from .config import Preset
from .head import Head
from .text import TextTransformer
from .transformer import Transformer
from .vit import Vit

INITIAL_LOGIT_SCALE = math.log(1 / 0.07)
MAX_LOGIT_SCALE = math.log(100)


class _Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor(INITIAL_LOGIT_SCALE))  # log of the scale

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        """Keeps the scale within [1, 100] (arXiv 2103.00020, section 2.5); call it after every step."""
        self.logit_scale.clamp_(0, MAX_LOGIT_SCALE)

    def set_checkpointing(self, level: Checkpointing) -> None:
        """What the backward computes again rather than keeps: none, mlp, branches or block (ops/block.py)."""
        for module in self.modules():
            if isinstance(module, Transformer):
                module.checkpointing = level

    def set_fp8(self, enabled: bool) -> None:
        """Whether the blocks' linear layers multiply in float8. Raises ConfigError where none can."""
        if enabled and (reason := float8.why_not(self.logit_scale.device)):
            raise ConfigError(f"fp8: {reason}; leave it out")
        for module in self.modules():
            if isinstance(module, Transformer):
                module.fp8 = enabled


class Lift(_Scaled):
    """Image tower and MLP head; the text side is a cache (arXiv 2506.04209)."""

    def __init__(self, preset: Preset, text_dim: int | None = None):
        super().__init__()
        self.visual = Vit(preset.vit)
        self.head = Head(preset.vit.width, text_dim or preset.text_dim)

    def encode_image(self, pixels: Tensor) -> Tensor:
        """pixels [batch, 3, H, W] -> [batch, text_dim], not normalised."""
        return self.head(self.visual(pixels))


class Clip(_Scaled):
    """The same image tower beside a trained text tower (arXiv 2103.00020)."""

    def __init__(self, preset: Preset):
        super().__init__()
        self.visual = Vit(preset.vit)
        self.visual_projection = nn.Linear(preset.vit.width, preset.embed_dim, bias=False)
        self.text = TextTransformer(preset.text)
        self.text_projection = nn.Linear(preset.text.width, preset.embed_dim, bias=False)
        nn.init.normal_(self.visual_projection.weight, std=preset.vit.width**-0.5)
        nn.init.normal_(self.text_projection.weight, std=preset.text.width**-0.5)

    def encode_image(self, pixels: Tensor) -> Tensor:
        """pixels [batch, 3, H, W] -> [batch, embed_dim], not normalised."""
        return self.visual_projection(self.visual(pixels))

    def encode_text(self, tokens: Tensor) -> Tensor:
        """tokens int64 [batch, context] -> [batch, embed_dim], not normalised."""
        return self.text_projection(self.text(tokens))
