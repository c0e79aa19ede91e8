"""A whole Lift or Clip in the layout of timm: the tower as its VisionTransformer, the rest under our own names.

timm's head is one linear layer, so that it holds CLIP's projection, as in timm's own CLIP towers, with a bias of zero.
LIFT's head and CLIP's text tower are in a second file, which timm does not read.
"""

from pathlib import Path

import torch
from torch import Tensor

from ...errors import ConfigError
from ..models import Clip, Lift, fill
from ..tensors import read_tensors
from .convert import load as load_tower
from .convert import save as save_tower

WEIGHTS = "model.safetensors"


def rest_file(model: Lift | Clip) -> str:
    """The name of the second file."""
    return "clip_text.safetensors" if isinstance(model, Clip) else "lift_head.safetensors"


def save(model: Lift | Clip) -> dict[str, dict[str, Tensor]]:
    """File name -> its tensors, new and contiguous.

    Raises ConfigError for a tower that timm's VisionTransformer does not compute.
    """
    tower = save_tower(model.visual, "timm")
    rest = {name: tensor.clone() for name, tensor in model.state_dict().items() if not name.startswith("visual.")}
    if isinstance(model, Clip):
        tower["head.weight"] = rest.pop("visual_projection.weight")
        tower["head.bias"] = torch.zeros_like(tower["head.weight"][:, 0])
    return {WEIGHTS: tower, rest_file(model): rest}


def load(model: Lift | Clip, folder: Path) -> None:
    """Fills a model with the weights of a folder with the files of `save`, also where timm wrote the first one again.

    Raises ConfigError for weights that are not those of the model's tower, and for a bias that CLIP's projection does
    not have; OSError, ValueError, KeyError or RuntimeError for a file or tensor that is missing, damaged, of
    another shape, or too many.
    """
    state, rest = read_tensors(folder / WEIGHTS), read_tensors(folder / rest_file(model))
    if isinstance(model, Clip):
        rest["visual_projection.weight"] = state.pop("head.weight")
        check_no_bias(state.pop("head.bias"))
    load_parts(model, state, "timm", rest)


def check_no_bias(bias: Tensor) -> None:
    """Raises ConfigError when a bias that stands for none is not zero."""
    if bias.any():
        raise ConfigError("the projection has a bias, which CLIP's has not: these are no longer the exported weights")


def load_parts(model: Lift | Clip, tower: dict[str, Tensor], layout: str, rest: dict[str, Tensor]) -> None:
    """Fills a model, strictly: its tower from a state dict of the layout, all else from `rest`, under our names."""
    loaded = load_tower(tower, layout, config=model.visual.config, dtype=None)  # type: ignore[arg-type]
    state = {f"visual.{name}": tensor for name, tensor in loaded.visual.state_dict().items()}
    fill(model, state | rest | {key: tower[key] for key in loaded.left_out})
