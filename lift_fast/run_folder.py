"""A run on disk: model.safetensors beside run.json (what was trained, on what, with which text encoder)."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialise

from .errors import ConfigError, DataError, TrainingError
from .files import write_whole
from .nn import Clip, Lift, preset


def build(run: dict[str, Any]) -> Lift | Clip:
    """The untrained model that a run's description names: keys model, preset, and text_dim or context."""
    sizes = preset(run["preset"])
    if run["model"] == "lift":
        return Lift(sizes, run["text_dim"])
    return Clip(sizes.with_context(run["context"]))


def save(folder: Path, model: Lift | Clip, run: dict[str, Any]) -> None:
    """Writes the weights, then run.json: a folder that has run.json is whole. Raises TrainingError (full disk)."""
    tensors = {name: tensor.contiguous().cpu() for name, tensor in model.state_dict().items()}
    try:
        write_whole(
            {
                folder / "model.safetensors": serialise(tensors),
                folder / "run.json": json.dumps(run, indent=1, default=str).encode(),
            }
        )
    except OSError as error:
        raise TrainingError(f"cannot write the run to {folder}: {error}") from error


def load_run(folder: Path) -> dict[str, Any]:
    """run.json of a finished run. Raises DataError when there is none."""
    file = Path(folder) / "run.json"
    if not file.is_file():
        raise DataError(f"no finished run in {folder}: it has no run.json; train one with: lift-fast train")
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise DataError(f"{file} is damaged ({error}); train again with: lift-fast train") from error


def load(folder: Path, device: str | torch.device = "cpu") -> tuple[Lift | Clip, dict[str, Any]]:
    """The trained model, in eval mode, and its run.json. Raises DataError, ConfigError."""
    run = load_run(folder)
    model = build(run)
    try:
        model.load_state_dict(load_file(Path(folder) / "model.safetensors"))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ConfigError(f"{folder}: model.safetensors does not fit its run.json ({error})") from error
    return model.to(device).eval(), run
