"""Sizes of the towers, and the presets. One place for every default."""

from dataclasses import dataclass, replace
from typing import Literal

from ..errors import ConfigError
from ..ops.transformer.contract import ACTIVATIONS, Activation

CLIP_VOCAB_SIZE = 49_408


@dataclass(frozen=True)
class VitConfig:
    """Image tower (Dosovitskiy et al., arXiv 2010.11929). The defaults are LIFT's, that is open_clip's ViT-B/16 with
    average pooling; nn/weights/ says what other projects' models are in these terms."""

    image_size: int = 224
    patch_size: int = 16
    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp_dim: int | None = None
    """Width of the hidden layers; None: four times `width`."""
    class_token: bool = True
    pool: Literal["avg", "cls"] = "avg"
    """The mean of the patches' tokens, or the class token."""
    patch_bias: bool = False
    """Whether the patch embedding has a bias."""
    pre_norm: bool = True
    """Whether there is a layernorm before the first block."""
    norm_after_pool: bool = False
    """Whether the last layernorm comes after pooling (it makes no difference to the class token)."""
    activation: Activation = "gelu"
    norm_eps: float = 1e-5
    patch_dropout: float = 0.0
    """The part of the patches that training leaves out, at random (FLIP, arXiv 2212.00794)."""

    def __post_init__(self) -> None:
        if self.image_size % self.patch_size:
            raise ConfigError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        if self.width % self.heads:
            raise ConfigError(f"ViT width {self.width} is not a multiple of its {self.heads} heads")
        if self.pool not in ("avg", "cls") or (self.pool == "cls" and not self.class_token):
            raise ConfigError(f"pool={self.pool!r} must be avg, or cls with a class token")
        if self.activation not in ACTIVATIONS:
            raise ConfigError(f"no activation {self.activation!r}; there are: {', '.join(ACTIVATIONS)}")
        if not 0 <= self.patch_dropout < 1:
            raise ConfigError(f"patch_dropout must be at least 0 and less than 1, not {self.patch_dropout}")

    @property
    def hidden(self) -> int:
        """Width of the hidden layers."""
        return self.mlp_dim or 4 * self.width

    @property
    def grid(self) -> int:
        """Patches along a side."""
        return self.image_size // self.patch_size

    @property
    def tokens(self) -> int:
        """Of a picture, when no patch is dropped."""
        return self.grid**2 + self.class_token


@dataclass(frozen=True)
class TextConfig:
    """CLIP's text tower (Radford et al., arXiv 2103.00020): causal, read at the end-of-text token."""

    context: int = 77
    vocab_size: int = CLIP_VOCAB_SIZE
    width: int = 512
    layers: int = 12
    heads: int = 8

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ConfigError(f"text width {self.width} is not a multiple of its {self.heads} heads")


@dataclass(frozen=True)
class Preset:
    """What LIFT and CLIP share (the ViT), and what each has alone."""

    vit: VitConfig
    text: TextConfig  # CLIP's
    embed_dim: int  # CLIP's joint space
    text_dim: int  # LIFT's, where no cache says otherwise

    def with_context(self, context: int) -> "Preset":
        """The same preset with CLIP's text tower at another caption length, in tokens."""
        return replace(self, text=replace(self.text, context=context))


def _sized(
    patch: int, width: int, layers: int, heads: int, text: tuple[int, int, int], mlp_dim: int | None = None
) -> Preset:
    """text: CLIP's text width (and joint space), layers and heads; LIFT's text is NV-Embed-v2's."""
    vit = VitConfig(224, patch, width, layers, heads, mlp_dim)
    text_width, text_layers, text_heads = text
    return Preset(vit, TextConfig(width=text_width, layers=text_layers, heads=text_heads), text_width, text_dim=4096)


PRESETS = {
    # arXiv 2506.04209, section 4: ViT-B/16, text dim of NV-Embed-v2.
    "vit-b16": Preset(VitConfig(), TextConfig(), embed_dim=512, text_dim=4096),
    # The ViT's usual sizes beside the text towers that open_clip pairs them with.
    "vit-ti16": _sized(16, 192, 12, 3, (192, 12, 3)),
    "vit-s16": _sized(16, 384, 12, 6, (384, 12, 6)),
    "vit-b32": _sized(32, 768, 12, 12, (512, 12, 8)),
    "vit-l16": _sized(16, 1024, 24, 16, (768, 12, 12)),
    "vit-l14": _sized(14, 1024, 24, 16, (768, 12, 12)),
    "vit-h14": _sized(14, 1280, 32, 16, (1024, 24, 16)),
    "vit-so400m14": _sized(14, 1152, 27, 16, (1152, 27, 16), mlp_dim=4304),
    # The demo's: trains in minutes on two CPU cores.
    "tiny": Preset(
        VitConfig(image_size=72, patch_size=12, width=192, layers=6, heads=3),
        TextConfig(width=128, layers=4, heads=2),
        embed_dim=128,
        text_dim=384,
    ),
}


def preset(name: str) -> Preset:
    """The preset of that name. Raises ConfigError with the names there are."""
    if name not in PRESETS:
        raise ConfigError(f"no preset {name!r}; there are: {', '.join(PRESETS)}")
    return PRESETS[name]
