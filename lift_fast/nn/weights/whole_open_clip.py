"""A whole Lift or Clip in the layout of open_clip's CLIP.

A Clip is open_clip's own CLIP, where that computes it. A Lift, and any other Clip, has a tower of timm, with the head
in open_clip's adapter (`TimmModel`): its MLP is Linear(width -> 2 · dim), GELU, Linear(2 · dim -> dim), so that LIFT's
head, whose hidden width is dim, is filled up with zeros. That is exact, because GELU(0) = 0, and it stays so when
open_clip trains it: neither of the two matrices gets a gradient where the other one is zero.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ...errors import ConfigError
from ..config import CLIP_VOCAB_SIZE
from ..models import Clip, Lift
from ..tensors import read_tensors
from .convert import save as save_tower
from .layouts import open_clip_text_key
from .whole_timm import load_parts

WEIGHTS = "open_clip_model.safetensors"
# The text tower that stands for a missing one. It has CLIP's tokens, so that it runs: all that it returns is NaN.
STAND_IN = {"context_length": 77, "vocab_size": CLIP_VOCAB_SIZE, "width": 1, "heads": 1, "layers": 1}

_TRUNK, _MLP, _PROJ = "visual.trunk.", "visual.head.mlp.", "visual.head.proj.weight"


def is_native(model: Lift | Clip) -> bool:
    """Whether open_clip's own VisionTransformer and its one matrix after it compute the image features. It has
    quick_gelu in both towers or in none."""
    if isinstance(model, Lift):
        return False
    vit, text = model.visual.config, model.text.config
    same = (vit.activation == "quick_gelu") == (text.activation == "quick_gelu")
    return vit.class_token and not vit.patch_bias and same


def save(model: Lift | Clip, text: Mapping[str, Tensor] | None = None) -> dict[str, dict[str, Tensor]]:
    """File name -> its tensors, new and contiguous. text: for a Lift, the part of the state dict that is the text
    tower; None: that of STAND_IN, of NaN.

    Raises ConfigError for a tower that neither open_clip's nor timm's VisionTransformer computes.
    """
    state = {"logit_scale": model.logit_scale.detach().clone()}
    native = is_native(model)
    if native:
        assert isinstance(model, Clip)
        state |= save_tower(model.visual, "open_clip", projection=model.visual_projection.weight)
    else:
        state |= {_TRUNK + key: tensor for key, tensor in save_tower(model.visual, "timm").items()}
    if isinstance(model, Clip):
        if not native:
            state[_PROJ] = model.visual_projection.weight.detach().clone()
        own = model.text.state_dict()
        state |= {open_clip_text_key(name): tensor.clone() for name, tensor in own.items()}
        state["text_projection"] = model.text_projection.weight.detach().T.clone(memory_format=torch.contiguous_format)
        return {WEIGHTS: state}
    dim = model.head.fc_2.out_features
    for name, tensor in model.head.state_dict().items():
        key, rows, columns = _MLP + name.replace("_", ""), *_added(name, dim)
        size = (tensor.shape[0] + rows, *(n + columns for n in tensor.shape[1:]))
        state[key] = tensor.new_zeros(size)
        state[key][tuple(slice(n) for n in tensor.shape)] = tensor
    return {WEIGHTS: state | dict(_stand_in(dim) if text is None else text)}


def load(model: Lift | Clip, folder: Path) -> None:
    """Fills a model with the weights of a folder with the file of `save`, also where open_clip wrote it again.

    Raises ConfigError for weights that are not those of the model's tower, and for a head that LIFT's cannot be;
    OSError, ValueError, KeyError or RuntimeError for a file or tensor that is missing, damaged, of another shape,
    or too many.
    """
    state, native = read_tensors(folder / WEIGHTS), is_native(model)
    rest = {"logit_scale": state.pop("logit_scale").reshape(())}
    if isinstance(model, Clip):
        rest |= {f"text.{name}": state.pop(open_clip_text_key(name)) for name in model.text.state_dict()}
        rest["text_projection.weight"] = state.pop("text_projection").T
        rest["visual_projection.weight"] = state.pop("visual.proj").T if native else state.pop(_PROJ)
    else:
        state = {key: tensor for key, tensor in state.items() if key.startswith("visual.")}  # without the text tower
        for name, tensor in model.head.state_dict().items():
            full = state.pop(_MLP + name.replace("_", ""))
            kept = tuple(slice(n) for n in tensor.shape)
            rest[f"head.{name}"] = full[kept].clone()
            full[kept] = 0
            if full.any():
                raise ConfigError(
                    "the hidden layer of the head is wider than LIFT's: these are no longer the exported weights"
                )
    if not native:
        state = {key.removeprefix(_TRUNK): tensor for key, tensor in state.items()}
    load_parts(model, state, "open_clip" if native else "timm", rest)


def _added(name: str, dim: int) -> tuple[int, int]:
    """Rows and columns of zeros that open_clip's MLP has more than ours."""
    return {"fc_1.weight": (dim, 0), "fc_1.bias": (dim, 0), "fc_2.weight": (0, dim), "fc_2.bias": (0, 0)}[name]


def _stand_in(dim: int) -> dict[str, Tensor]:
    """The state dict of the text tower STAND_IN for features of length dim."""
    width = STAND_IN["width"]
    shapes = {
        "token_embedding.weight": (STAND_IN["vocab_size"], width),
        "positional_embedding": (STAND_IN["context_length"], width),
        "ln_final.weight": (width,),
        "ln_final.bias": (width,),
        "text_projection": (width, dim),
    }
    block = {"ln_1": (width,), "qkv": (3 * width, width), "proj": (width, width), "ln_2": (width,)}
    block |= {"fc_1": (4 * width, width), "fc_2": (width, 4 * width)}
    for name, shape in block.items():
        for leaf, size in {"weight": shape, "bias": shape[:1]}.items():
            shapes[open_clip_text_key(f"transformer.blocks.0.{name}.{leaf}")] = size
    return {key: torch.full(shape, torch.nan) for key, shape in shapes.items()}
