"""Models of chosen sizes with random weights everywhere: biases of zero and norms of one would hide mistakes."""

from dataclasses import replace
from typing import Any

import torch

from lift_fast.inference import Model, Preprocessing
from lift_fast.inference.model import Parts
from lift_fast.nn import Clip, Lift, Preset, TextConfig, VitConfig

SMALL = {"image_size": 24, "patch_size": 8, "width": 24, "layers": 2, "heads": 3}
TEXT = TextConfig(context=13, width=20, layers=2, heads=2)


def random_model(
    kind: str, dim: int = 14, preprocessing: Preprocessing | None = None, text: TextConfig = TEXT, **vit: Any
) -> Model:
    """A Lift or Clip, "lift" or "clip", with features of length dim; vit: fields of VitConfig besides SMALL's."""
    sizes = Preset(replace(VitConfig(**SMALL), **vit), text, embed_dim=dim, text_dim=dim)
    module = Lift(sizes) if kind == "lift" else Clip(sizes)
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.normal_(std=0.2 if p.dim() < 2 else p.shape[-1] ** -0.5)
            p += ".ln_" in name and name.endswith("weight")
        module.logit_scale.fill_(3.25)
    size = sizes.vit.image_size
    # Not ImageNet's means, and a resized side that is no round multiple of the image's.
    preprocessing = preprocessing or Preprocessing(size, size + 5, (0.48, 0.46, 0.41), (0.27, 0.26, 0.28))
    description: dict[str, Any] = {"model": kind, "preset": "vit-b16", "vit": vars(sizes.vit)}
    description |= {"text_dim": dim, "context": text.context, "embed_dim": dim}
    description["text"] = {key: value for key, value in vars(text).items() if key != "context"}

    def no_text(device):
        raise AssertionError("this model has no text encoder")

    return Model(Parts(module, preprocessing, module.logit_scale.exp().item(), description, no_text), "random", "cpu")
