"""What an export says of its run, in lift_fast.json and the card: all that is needed to use it, and no local path."""

from dataclasses import asdict
from pathlib import Path, PurePath
from typing import Any

from .. import foreign, scores
from ..errors import DataError
from ..inference import Model
from ..nn import Clip, Lift
from ..text.spec import without_path

_BUILD = ("model", "preset", "text_dim", "encoder", "conditioning", "rotation", "codec", "context", "field")
_RECORD = (
    "captions samples_seen params seconds step_ms step_ms_spread images_per_s precision ranks device skipped_steps "
    "skipped_pictures skipped_causes"
).split()
_SETTINGS = (
    "loss steps batch_size seed lock unlocked_blocks patch_dropout lr schedule warmup cooldown layer_decay "
    "weight_decay beta1 beta2 eps clip_grad ema min_crop_area flip colour fp8"
).split()
_SCORES = ("format", "retrieval", "first_caption", "composition", "zero_shot", "skipped")  # of eval.json
_PARTS = ("train", "training", "heldout", "held-out", "val", "valid", "validation", "test")


def described(model: Model) -> dict[str, Any]:
    """The description of a Lift or Clip, as in run.json: what `run_folder.build` and `load` need, and the figures and
    settings of training without losses, machine and paths. Of paths only the last part is kept. Of a run that was
    evaluated, the scores. Raises DataError for an eval.json that is damaged or of another version.
    """
    run, module = model.description, model.module
    assert isinstance(module, Lift | Clip)
    found = {key: run[key] for key in (*_BUILD, *_RECORD) if key in run}
    found["vit"] = asdict(module.visual.config)
    if isinstance(module, Clip):
        text = asdict(module.text.config)
        found |= {"context": text.pop("context"), "text": text, "embed_dim": module.visual_projection.out_features}
    found["preprocessing"] = model.preprocess.as_dict()
    if scores := _scores(model):
        found["evaluation"] = scores
    if run.get("encoder"):
        found["encoder"] = run["encoder"] | {"name": without_path(run["encoder"]["name"])}
    config = run.get("config", {})
    if config:
        found["config"] = {key: config[key] for key in _SETTINGS if key in config}
        found["config"]["data"] = [set_name(path) for path in config.get("data", ())]
        if config.get("init_from"):
            found["config"]["init_from"] = PurePath(config["init_from"]).name
    return found


def _scores(model: Model) -> Any:
    """Those in the folder of the run, eval.json; of an export, those that it was made with."""
    file = Path(model.source).expanduser() / "eval.json"
    try:
        content = foreign.read_json(file) if file.is_file() else model.description.get("evaluation")
        if content is None:
            return None
        foreign.check(content, dict[str, Any])
        if scores.is_of_another_version(content):
            raise DataError(
                f"{model.source}: its eval.json is of an earlier lift-fast; make it again with: lift-fast eval --json"
            )
        scores.check(content)
        return {name: content[name] for name in _SCORES}
    except (OSError, ValueError, LookupError) as error:
        raise bad_scores(model, error) from error


def bad_scores(model: Model, error: Exception) -> DataError:
    """For scores that are damaged."""
    return DataError(
        f"{model.source}: its eval.json is not JSON as eval writes it ({_said(error)}); make it again with: "
        "lift-fast eval --json"
    )


def _said(error: Exception) -> str:
    return f"it has no {error}" if isinstance(error, LookupError) else str(error)


def set_name(path: str) -> str:
    """The name of a data set, of its path: the last part, and the one before it where the last is train or the like."""
    parts = PurePath(path).parts
    return "/".join(parts[-2:] if parts[-1:] and parts[-1] in _PARTS else parts[-1:])
