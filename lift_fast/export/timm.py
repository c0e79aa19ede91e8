"""Target timm: the tower as a VisionTransformer of timm, for `timm.create_model("local-dir:FOLDER", pretrained=True)`.

Of a run of CLIP the projection is timm's classifier, so that the model returns the features of the joint space. Of a
run of LIFT the features are those before its head, which is in a second file.
"""

import json
import math
from pathlib import Path
from typing import Any

from safetensors.torch import save

from ..errors import ConfigError
from ..inference import Model
from ..nn import Clip, Lift
from ..nn.weights import whole_timm

# timm's functions that make a VisionTransformer of any size, by the epsilon of their layernorms.
_ARCHITECTURES = {1e-5: "vit_base_patch16_clip_224", 1e-6: "vit_base_patch16_224"}


def write(model: Model, out: Path) -> list[str]:
    """Writes model.safetensors and config.json, which timm reads, and the rest of the model as lift_head.safetensors or
    clip_text.safetensors. Raises ConfigError for a tower that timm does not compute."""
    module = model.module
    assert isinstance(module, Lift | Clip)
    about = json.dumps(config(model), indent=1)
    for name, tensors in whole_timm.save(module).items():
        (out / name).write_bytes(save(tensors, {"format": "pt"}))
    (out / "config.json").write_text(about, encoding="utf-8")
    if isinstance(module, Clip):
        return [
            "timm's model returns the image features in the joint space, not normalised; with num_classes=0 those "
            "before the projection",
            "CLIP's text tower is in clip_text.safetensors, which timm does not read",
        ]
    return [
        "timm's model returns the features of the tower; LIFT's head (Linear, GELU, Linear), which maps them to "
        f"{_space(model)}, is in lift_head.safetensors, because a head of timm is one linear layer",
        "the text encoder is not in the folder",
    ]


def config(model: Model) -> dict[str, Any]:
    """config.json as timm writes it. Raises ConfigError for a tower that timm does not compute."""
    module, preprocess = model.module, model.preprocess
    assert isinstance(module, Lift | Clip)
    vit = module.visual.config
    if vit.norm_eps not in _ARCHITECTURES:
        raise ConfigError(f"no model of timm computes this tower: norm_eps is {vit.norm_eps}, not 1e-05 or 1e-06")
    classes = module.visual_projection.out_features if isinstance(module, Clip) else 0
    pool = "avg" if vit.pool == "avg" else "token"
    crop_pct = preprocess.image_size / preprocess.resize_size
    if math.floor(preprocess.image_size / crop_pct) < preprocess.resize_size:  # timm's resize_size, but for rounding
        crop_pct = math.nextafter(crop_pct, 0)
    return {
        "architecture": _ARCHITECTURES[vit.norm_eps],
        "num_classes": classes,
        "num_features": vit.width,
        "global_pool": pool,
        "model_args": {
            "img_size": vit.image_size,
            "patch_size": vit.patch_size,
            "embed_dim": vit.width,
            "depth": vit.layers,
            "num_heads": vit.heads,
            "mlp_ratio": mlp_ratio(vit.hidden, vit.width),
            "class_token": vit.class_token,
            "pre_norm": vit.pre_norm,
            "act_layer": vit.activation,
            "global_pool": pool,
            "fc_norm": vit.norm_after_pool and vit.pool == "avg",
        },
        "pretrained_cfg": {
            "num_classes": classes,
            "input_size": [3, vit.image_size, vit.image_size],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": crop_pct,
            "crop_mode": "center",
            "mean": list(preprocess.mean),
            "std": list(preprocess.std),
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


def mlp_ratio(hidden: int, width: int) -> float:
    """The ratio of which int(width * ratio), as timm and open_clip compute it, is `hidden`."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def use(model: Model) -> str:
    """The lines that load the folder with timm."""
    text = """\
import timm, torch
from PIL import Image

model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()
preprocess = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
with torch.no_grad():
    features = model(preprocess(Image.open("image.jpg").convert("RGB"))[None])
"""
    if isinstance(model.module, Clip):
        return text
    return (
        text
        + f"""\

# LIFT's head: the features in {_space(model)}.
from safetensors.torch import load_file
from torch.nn import functional as F

head = load_file("FOLDER/lift_head.safetensors")
hidden = F.gelu(F.linear(features, head["head.fc_1.weight"], head["head.fc_1.bias"]))
features = F.normalize(F.linear(hidden, head["head.fc_2.weight"], head["head.fc_2.bias"]), dim=-1)
"""
    )


def _space(model: Model) -> str:
    """Where LIFT's head maps features to."""
    return "the text encoder's space" if model.conditioning is None else "the space of the conditioned text vectors"
