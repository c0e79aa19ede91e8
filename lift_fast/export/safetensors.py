"""Target safetensors: lift-fast's own weights, and config.json, which says in full what they compute."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import save

from ..inference import Model
from ..nn import Clip, Lift
from ..text.spec import without_path
from . import conditioned


def write(model: Model, out: Path) -> list[str]:
    """Writes model.safetensors, the state dict of `nn.Lift` or `nn.Clip` in float32, and config.json."""
    module = model.module
    assert isinstance(module, Lift | Clip)
    tensors = {name: tensor.contiguous() for name, tensor in module.state_dict().items()}
    (out / "model.safetensors").write_bytes(save(tensors, {"format": "pt"}))
    (out / "config.json").write_text(json.dumps(config(model), indent=1), encoding="utf-8")
    return ["the weights are float32, under the names of lift_fast.nn; config.json says what they compute"]


def config(model: Model) -> dict[str, Any]:
    """config.json; docs/export.md describes each field."""
    module = model.module
    assert isinstance(module, Lift | Clip)
    vision = asdict(module.visual.config)
    vision |= {"mlp_dim": module.visual.config.hidden}
    del vision["patch_dropout"]  # only in training
    found: dict[str, Any] = {"model": "lift" if isinstance(module, Lift) else "clip", "vision": vision}
    if isinstance(module, Lift):
        dim = module.head.fc_2.out_features
        found["head"] = {"layers": [module.head.fc_1.in_features, dim, dim], "activation": "gelu"}
    else:
        dim = module.visual_projection.out_features
        transformer = module.text.transformer
        found["text"] = asdict(module.text.config)
        found["text"] |= {"mlp_dim": transformer.mlp_dim, "norm_eps": transformer.norm_eps}
    found |= {"embed_dim": dim, "logit_scale": model.logit_scale, "preprocessing": model.preprocess.as_dict()}
    if isinstance(module, Lift):
        encoder = model.description.get("encoder")
        found["encoder"] = encoder and encoder | {"name": without_path(encoder["name"])}
        found["rotation"] = model.description.get("rotation")
        found["conditioning"] = conditioned.entry(model.conditioning) if model.conditioning else None
    return found


def use(model: Model) -> str:
    """The lines that open the weights without lift-fast."""
    return """\
import json
from safetensors.numpy import load_file

weights = load_file("FOLDER/model.safetensors")
config = json.load(open("FOLDER/config.json"))
"""
