"""Sizes of the towers, and the presets. One place for every default."""

from dataclasses import dataclass, replace

from ..errors import ConfigError

CLIP_VOCAB_SIZE = 49_408


@dataclass(frozen=True)
class VitConfig:
    """Image tower (Dosovitskiy et al., arXiv 2010.11929), pre-norm, average pooling over the patches."""

    image_size: int = 224
    patch_size: int = 16
    width: int = 768
    layers: int = 12
    heads: int = 12

    def __post_init__(self) -> None:
        if self.image_size % self.patch_size:
            raise ConfigError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        if self.width % self.heads:
            raise ConfigError(f"ViT width {self.width} is not a multiple of its {self.heads} heads")


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


PRESETS = {
    # arXiv 2506.04209, section 4: ViT-B/16, text dim of NV-Embed-v2.
    "vit-b16": Preset(VitConfig(), TextConfig(), embed_dim=512, text_dim=4096),
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
