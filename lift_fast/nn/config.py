"""Configurations of the towers, with every default, and the presets."""

from dataclasses import dataclass, replace
from typing import Literal

from ..errors import ConfigError
from ..ops.transformer.contract import ACTIVATIONS, Activation

CLIP_VOCAB_SIZE = 49_408
_LARGEST = {"layers": 1000}  # of what a description may ask for; other sizes:
_LARGEST_SIZE = 1_000_000


@dataclass(frozen=True)
class VitConfig:
    """The image tower (Dosovitskiy et al., arXiv 2010.11929). The defaults are LIFT's: open_clip's ViT-B/16 with
    average pooling. nn/weights/layouts.py has the values for other projects' models.

    Raises ConfigError for sizes that do not divide and for values that are not valid.
    """

    image_size: int = 224
    """Height and width of an image, in pixels; a multiple of `patch_size`."""
    patch_size: int = 16
    """Height and width of a patch, in pixels."""
    width: int = 768
    """Length of a token's vector."""
    layers: int = 12
    """Number of transformer blocks."""
    heads: int = 12
    """Attention heads of a block; `width` is a multiple of it."""
    mlp_dim: int | None = None
    """Width of the MLPs' hidden layers; None: four times `width`."""
    class_token: bool = True
    """Whether a learned token precedes the patches."""
    pool: Literal["avg", "cls"] = "avg"
    """"avg": the features are the mean over the patches' tokens; "cls": the class token."""
    patch_bias: bool = False
    """Whether the patch embedding has a bias."""
    pre_norm: bool = True
    """Whether there is a layernorm before the first block."""
    norm_after_pool: bool = False
    """Whether the last layernorm comes after pooling (with pool="cls" both orders are equal)."""
    activation: Activation = "gelu"
    """Of the MLPs: "gelu", "gelu_tanh" or "quick_gelu"."""
    norm_eps: float = 1e-5
    """Epsilon of the layernorms."""
    patch_dropout: float = 0.0
    """Fraction of the patches that training leaves out at random (FLIP, arXiv 2212.00794)."""

    def __post_init__(self) -> None:
        for name in ("image_size", "patch_size", "width", "layers", "heads", "mlp_dim"):
            check_size(name, getattr(self, name) if name != "mlp_dim" else self.hidden)
        if not 0 < self.norm_eps <= 1:
            raise ConfigError(f"norm_eps must be above 0 and at most 1, not {self.norm_eps}")
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
        """Width of the MLPs' hidden layers."""
        return self.mlp_dim or 4 * self.width

    @property
    def grid(self) -> int:
        """Patches along a side of an image."""
        return self.image_size // self.patch_size

    @property
    def tokens(self) -> int:
        """Tokens of an image without patch dropout, the class token included."""
        return self.grid**2 + self.class_token


@dataclass(frozen=True)
class TextConfig:
    """CLIP's text tower (Radford et al., arXiv 2103.00020): causal; the features are read at the end-of-text token.

    context: tokens of a caption. activation: of the MLPs, as the image tower's. Raises ConfigError when width is not a
    multiple of heads, and for an unknown activation.
    """

    context: int = 77
    vocab_size: int = CLIP_VOCAB_SIZE
    width: int = 512
    layers: int = 12
    heads: int = 8
    activation: Activation = "gelu"

    def __post_init__(self) -> None:
        for name in ("context", "vocab_size", "width", "layers", "heads"):
            check_size(name, getattr(self, name))
        if self.width % self.heads:
            raise ConfigError(f"text width {self.width} is not a multiple of its {self.heads} heads")
        if self.activation not in ACTIVATIONS:
            raise ConfigError(f"no activation {self.activation!r}; there are: {', '.join(ACTIVATIONS)}")


@dataclass(frozen=True)
class Preset:
    """The sizes of a Lift and a Clip with the same ViT."""

    vit: VitConfig
    text: TextConfig  # of Clip
    embed_dim: int  # of Clip's joint space
    text_dim: int  # of Lift, unless a cache's vectors have another length

    def with_context(self, context: int) -> "Preset":
        """The same preset with another `text.context`: the length of a caption, in tokens."""
        return replace(self, text=replace(self.text, context=context))


def check_size(name: str, value: int) -> None:
    """Validates a size of a model. Raises ConfigError for one below 1, and for one so large that no model has it."""
    largest = _LARGEST.get(name, _LARGEST_SIZE)
    if not 1 <= value <= largest:
        raise ConfigError(f"{name} must be at least 1 and at most {largest}")


def _sized(
    patch: int, width: int, layers: int, heads: int, text: tuple[int, int, int], mlp_dim: int | None = None
) -> Preset:
    """A preset for images of 224. text: width (also of the joint space), layers and heads of Clip's text tower; Lift's
    text_dim is NV-Embed-v2's."""
    vit = VitConfig(224, patch, width, layers, heads, mlp_dim)
    text_width, text_layers, text_heads = text
    return Preset(vit, TextConfig(width=text_width, layers=text_layers, heads=text_heads), text_width, text_dim=4096)


PRESETS = {
    # arXiv 2506.04209, section 4: ViT-B/16, text dim of NV-Embed-v2.
    "vit-b16": Preset(VitConfig(), TextConfig(), embed_dim=512, text_dim=4096),
    # The usual sizes of the ViT, with the text towers that open_clip pairs them with.
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
    """The preset of that name. Raises ConfigError, listing the names, for an unknown one."""
    if name not in PRESETS:
        raise ConfigError(f"no preset {name[:60]!r}; there are: {', '.join(PRESETS)}")
    return PRESETS[name]
