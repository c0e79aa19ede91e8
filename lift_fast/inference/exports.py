"""Reads what `lift-fast export` wrote back into a Lift or a Clip."""

from importlib import import_module
from pathlib import Path
from typing import Any, TypedDict

from .. import foreign, run_folder
from ..errors import ConfigError
from ..nn import Clip, Lift, fill
from ..nn.tensors import read_tensors

ABOUT = "lift_fast.json"
# Format -> the module of nn/weights that reads it; None: the state dict of the model itself.
_FORMATS = {
    "safetensors": None,
    "open_clip": "whole_open_clip",
    "timm": "whole_timm",
    "hf": "whole_hf",
    "sentence-transformers": "whole_hf",
}
ONE_WAY = ("onnx", "torch-export")  # formats that hold a graph, and no weights of ours


class _About(TypedDict):
    """The types of what is used of lift_fast.json."""

    format: str
    run: dict[str, Any]


def is_export(folder: Path) -> bool:
    """Whether a folder is one that `lift-fast export` wrote."""
    return (folder / ABOUT).is_file()


def read(folder: Path) -> tuple[Lift | Clip, dict[str, Any]]:
    """The model of an export, on the CPU and in eval mode, and its description as in run.json.

    Raises ConfigError for a format that holds a graph and no weights of ours, a description that is damaged, and
    weights that are missing, damaged or not those of the model that it describes.
    """
    try:
        about = foreign.read_json(folder / ABOUT)
        foreign.check(about, _About)
        kind, run = about["format"], about["run"]
        if kind not in _FORMATS and kind not in ONE_WAY:
            raise ValueError(f"its format {foreign.shown(kind)} is none that this lift-fast knows")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder}: {ABOUT} is damaged ({error}); export the run again") from error
    if kind in ONE_WAY:
        raise ConfigError(f"{folder} is an export to {kind}, which lift-fast does not read back; load the run")
    try:
        model = run_folder.empty(run)
    except ConfigError as error:
        raise ConfigError(f"{folder}: {ABOUT} is damaged ({error}); export the run again") from error
    try:
        if (name := _FORMATS[kind]) is None:
            fill(model, read_tensors(folder / "model.safetensors"))
        else:
            import_module(f"..nn.weights.{name}", __package__).load(model, folder)
    except (OSError, ValueError, RuntimeError, LookupError) as error:
        raise ConfigError(f"{folder}: its weights do not fit its {ABOUT} ({error}); export the run again") from error
    return model.eval(), run
