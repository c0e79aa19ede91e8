"""Reads what `lift-fast export` wrote back into a Lift or a Clip."""

import json
from importlib import import_module
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from .. import run_folder
from ..errors import ConfigError
from ..nn import Clip, Lift, fill

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


def is_export(folder: Path) -> bool:
    """Whether a folder is one that `lift-fast export` wrote."""
    return (folder / ABOUT).is_file()


def read(folder: Path) -> tuple[Lift | Clip, dict[str, Any]]:
    """The model of an export, on the CPU and in eval mode, and its description as in run.json.

    Raises ConfigError for a format that holds a graph and no weights of ours, a description that is damaged, and
    weights that are missing, damaged or not those of the model that it describes.
    """
    try:
        about = json.loads((folder / ABOUT).read_bytes())
        kind, run = about["format"], about["run"]
        name = None if kind in ONE_WAY else _FORMATS[kind]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(f"{folder}: {ABOUT} is damaged ({error!r}); export the run again") from error
    if kind in ONE_WAY:
        raise ConfigError(f"{folder} is an export to {kind}, which lift-fast does not read back; load the run")
    try:
        model = run_folder.empty(run)
    except ConfigError as error:
        raise ConfigError(f"{folder}: {ABOUT} is damaged ({error}); export the run again") from error
    try:
        if name is None:
            fill(model, load_file(folder / "model.safetensors"))
        else:
            import_module(f"..nn.weights.{name}", __package__).load(model, folder)
    except (OSError, SafetensorError, RuntimeError, KeyError) as error:
        raise ConfigError(f"{folder}: its weights do not fit its {ABOUT} ({error}); export the run again") from error
    return model.eval(), run
