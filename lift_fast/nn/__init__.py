"""Models: the ViT, LIFT's head, CLIP's text tower, and the models Lift and Clip that are made of them."""

from .config import PRESETS, Preset, TextConfig, VitConfig, check_size, preset
from .head import Head
from .models import Clip, Lift, fill
from .text import TextTransformer
from .vit import Vit

__all__ = [
    "PRESETS",
    "Clip",
    "Head",
    "Lift",
    "Preset",
    "TextConfig",
    "TextTransformer",
    "Vit",
    "VitConfig",
    "check_size",
    "fill",
    "preset",
]
