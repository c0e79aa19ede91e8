"""What an export says of its run, in lift_fast.json and the card: all that is needed to use it, and no local path."""

from dataclasses import asdict
from pathlib import PurePath
from typing import Any

from ..inference import Model
from ..nn import Clip, Lift

_BUILD = ("model", "preset", "text_dim", "encoder", "rotation", "codec", "context", "field")
_RECORD = (
    "captions samples_seen params seconds step_ms step_ms_spread images_per_s precision ranks device skipped_steps "
    "skipped_pictures skipped_causes"
).split()
_SETTINGS = (
    "loss steps batch_size seed lock unlocked_blocks patch_dropout lr schedule warmup cooldown layer_decay "
    "weight_decay beta1 beta2 eps clip_grad ema min_crop_area flip colour fp8"
).split()
_PARTS = ("train", "training", "heldout", "held-out", "val", "valid", "validation", "test")


def described(model: Model) -> dict[str, Any]:
    """The description of a Lift or Clip, as in run.json: what `run_folder.build` and `load` need, and the figures and
    settings of training without losses, machine and paths. Of paths only the last part is kept.
    """
    run, module = model.description, model.module
    assert isinstance(module, Lift | Clip)
    found = {key: run[key] for key in (*_BUILD, *_RECORD) if key in run}
    found["vit"] = asdict(module.visual.config)
    if isinstance(module, Clip):
        text = asdict(module.text.config)
        found |= {"context": text.pop("context"), "text": text, "embed_dim": module.visual_projection.out_features}
    found["preprocessing"] = model.preprocess.as_dict()
    if run.get("encoder"):
        found["encoder"] = run["encoder"] | {"name": name_of_encoder(run["encoder"]["name"])}
    config = run.get("config", {})
    if config:
        found["config"] = {key: config[key] for key in _SETTINGS if key in config}
        found["config"]["data"] = [set_name(path) for path in config.get("data", ())]
        if config.get("init_from"):
            found["config"]["init_from"] = PurePath(config["init_from"]).name
    return found


def name_of_encoder(name: str) -> str:
    """The name of a text encoder; of a folder's path, which says nothing on another machine, the last part."""
    path = PurePath(name)
    return path.name if path.is_absolute() or len(path.parts) > 2 or name[0] in ".~" else name


def set_name(path: str) -> str:
    """The name of a data set, of its path: the last part, and the one before it where the last is train or the like."""
    parts = PurePath(path).parts
    return "/".join(parts[-2:] if parts[-1] in _PARTS else parts[-1:])
