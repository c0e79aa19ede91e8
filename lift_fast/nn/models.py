"""The two models: Lift (ViT and head, for texts from a cache) and Clip (the same ViT, and a trained text tower)."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..ops.block import Checkpointing
from ..ops.transformer import float8
from .config import Preset
from .head import Head
from .tensors import FLOATS, unusable
from .text import TextTransformer
from .transformer import Transformer
from .vit import Vit

INITIAL_LOGIT_SCALE = math.log(1 / 0.07)
MAX_LOGIT_SCALE = math.log(100)


class _Scaled(nn.Module):
    """The parts that Lift and Clip share: a trained logit scale, and settings that apply to every transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor(INITIAL_LOGIT_SCALE))  # the logarithm of the scale

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        """Clamps the scale to [1, 100] (arXiv 2103.00020, section 2.5); to be called after every optimizer step."""
        self.logit_scale.clamp_(0, MAX_LOGIT_SCALE)

    def set_checkpointing(self, level: Checkpointing) -> None:
        """Sets the activation recomputation level of all blocks: none, mlp, branches or block (see ops/block.py)."""
        for module in self.modules():
            if isinstance(module, Transformer):
                module.checkpointing = level

    def set_fp8(self, enabled: bool) -> None:
        """Sets whether the blocks' linear layers multiply in float8. Raises ConfigError on a device without float8."""
        if enabled and (reason := float8.why_not(self.logit_scale.device)):
            raise ConfigError(f"fp8: {reason}; leave it out")
        for module in self.modules():
            if isinstance(module, Transformer):
                module.fp8 = enabled


class Lift(_Scaled):
    """LIFT's image tower and MLP head (arXiv 2506.04209). Its texts come from a cache.

    text_dim: length of the text vectors; None: the preset's.
    """

    def __init__(self, preset: Preset, text_dim: int | None = None):
        super().__init__()
        self.visual = Vit(preset.vit)
        self.head = Head(preset.vit.width, text_dim or preset.text_dim)

    def encode_image(self, pixels: Tensor, kept: Tensor | None = None) -> Tensor:
        """Normalised pixels [batch, 3, H, W] -> features [batch, text_dim], not normalised. kept: see `Vit.tokens`."""
        return self.head(self.visual(pixels, kept))


class Clip(_Scaled):
    """CLIP (arXiv 2103.00020): the same image tower, a trained text tower, and projections into a joint space."""

    def __init__(self, preset: Preset):
        super().__init__()
        self.visual = Vit(preset.vit)
        self.visual_projection = nn.Linear(preset.vit.width, preset.embed_dim, bias=False)
        self.text = TextTransformer(preset.text)
        self.text_projection = nn.Linear(preset.text.width, preset.embed_dim, bias=False)
        nn.init.normal_(self.visual_projection.weight, std=preset.vit.width**-0.5)
        nn.init.normal_(self.text_projection.weight, std=preset.text.width**-0.5)

    def encode_image(self, pixels: Tensor, kept: Tensor | None = None) -> Tensor:
        """Normalised pixels [batch, 3, H, W] -> features [batch, embed_dim], not normalised. kept: see `Vit.tokens`."""
        return self.visual_projection(self.visual(pixels, kept))

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Token ids int64 [batch, context] -> features [batch, embed_dim], not normalised."""
        return self.text_projection(self.text(tokens))


def fill(model: Lift | Clip, state: Mapping[str, Tensor]) -> None:
    """Gives a model the weights of a state dict, as float32 copies, whatever it had before.

    Raises RuntimeError for keys or shapes other than the model's, and for weights that are not finite, in float32, or
    not plain floating-point numbers.
    """
    needed, given = ({name: list(t.shape) for name, t in each.items()} for each in (model.state_dict(), state))
    wrong = [name for name in needed | given if needed.get(name) != given.get(name)]
    if wrong:
        sizes = [str(each.get(wrong[0], "missing")) for each in (given, needed)]
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise RuntimeError(f"{wrong[0]} is {sizes[0]}, in the model {sizes[1]}{more}")
    copies = {
        name: tensor.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        if tensor.dtype in FLOATS
        else tensor
        for name, tensor in state.items()
    }
    if problem := unusable(copies):
        raise RuntimeError(problem)
    model.load_state_dict(copies, assign=True)
