"""A whole Lift or Clip under the names of Hugging Face's transformers, and back, bit for bit.

The image tower is that of CLIPVisionModel or ViTModel, CLIP's text tower that of CLIPTextModel. A CLIPModel pools by
the class token; so a Clip is one file as of CLIPModel where its tower does, and else a file for each tower. What
transformers has no model for is in the file `head` under lift-fast's own names.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor

from ...errors import ConfigError
from ..config import VitConfig
from ..models import Clip, Lift, fill
from ..tensors import read_tensors
from .layouts import TABLES, Layout, LayoutTable


class Files(NamedTuple):
    """The files of an export, relative to its folder."""

    image: str
    """The image tower, or the whole CLIPModel."""
    text: str
    """CLIP's text tower, where the model is no CLIPModel."""
    head: str
    """LIFT's head, or CLIP's projection of images; logit_scale."""


TRANSFORMERS = Files("model.safetensors", "text/model.safetensors", "lift_head.safetensors")
SENTENCE_TRANSFORMERS = Files(
    "image_0_Transformer/model.safetensors", "text_0_Transformer/model.safetensors", "lift_head.safetensors"
)


def layout_of(config: VitConfig) -> Layout:
    """The layout whose models compute the tokens of this tower: hf_clip (CLIPVisionModel) or hf_vit (ViTModel).

    Raises ConfigError, naming the fields, when there is none.
    """
    if config.class_token and config.pre_norm and not config.patch_bias:
        return "hf_clip"
    averages_first = config.pool == "avg" and config.norm_after_pool  # ViTModel gives the normalised tokens only
    if config.class_token and config.patch_bias and not config.pre_norm and not averages_first:
        return "hf_vit"
    names = ("class_token", "pre_norm", "patch_bias", "pool", "norm_after_pool")
    fields = ", ".join(f"{name} is {getattr(config, name)!r}" for name in names)
    raise ConfigError(
        f"no model of Hugging Face computes this tower: {fields}. CLIPVisionModel needs a class token, pre_norm and no "
        "patch_bias; ViTModel a class token, patch_bias, no pre_norm, and the last norm before pooling"
    )


def is_clip_model(model: Lift | Clip) -> TypeGuard[Clip]:
    """Whether the model is a CLIPModel: both towers, both projections and the logit scale."""
    config = model.visual.config
    return isinstance(model, Clip) and config.pool == "cls" and layout_of(config) == "hf_clip"


def save(model: Lift | Clip, files: Files = TRANSFORMERS) -> dict[str, dict[str, Tensor]]:
    """File -> its state dict, as new tensors of the model's dtypes. Raises ConfigError as `layout_of` does."""
    saved: dict[str, dict[str, Tensor]] = {}
    state = model.state_dict()
    for name, file, keys, ones in _places(model, files):
        pieces = state[name].chunk(len(keys)) if len(keys) > 1 else (state[name],)
        for key, piece in zip(keys, pieces, strict=True):
            saved.setdefault(file, {})[key] = piece[(None,) * ones].clone(memory_format=torch.contiguous_format)
    return saved


def load(model: Lift | Clip, folder: Path) -> None:
    """Fills `model` with the weights of an export for transformers or sentence-transformers.

    Raises OSError, ValueError or KeyError for a file or key that is missing or damaged; RuntimeError for unknown
    keys and for other shapes than the model's; ConfigError as `layout_of` does.
    """
    files = SENTENCE_TRANSFORMERS if (folder / SENTENCE_TRANSFORMERS.image).is_file() else TRANSFORMERS
    places = list(_places(model, files))
    read = {file: read_tensors(folder / file) for file in {file for _, file, _, _ in places}}
    state = {}
    for name, file, keys, ones in places:
        pieces = [read[file].pop(key) for key in keys]
        tensor = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
        state[name] = tensor.reshape(tensor.shape[ones:])
    if unknown := [key for tensors in read.values() for key in tensors]:
        raise RuntimeError(f"unknown keys: {', '.join(unknown[:4])}")
    fill(model, state)


def _places(model: Lift | Clip, files: Files) -> Iterator[tuple[str, str, list[str], int]]:
    """Yields, per tensor of the model: its name, its file, its keys there (by rows where there are several), and the
    number of leading dimensions of size 1 that it has there."""
    layout = layout_of(model.visual.config)
    image, prefix = _table(layout), "vision_model." if layout == "hf_clip" else ""
    text = replace(
        _table("hf_clip"),
        outer={
            "token_embedding": "embeddings.token_embedding",
            "positional_embedding": "embeddings.position_embedding.weight",
            "ln_final": "final_layer_norm",
        },
    )
    whole = files == TRANSFORMERS and is_clip_model(model)
    for name in model.state_dict():
        part, _, rest = name.partition(".")
        if part == "visual":
            yield name, files.image, [prefix + key for key in image.keys(rest)], image.leading_ones.get(rest, 0)
        elif part == "text":
            yield name, files.image if whole else files.text, [f"text_model.{key}" for key in text.keys(rest)], 0
        elif part == "text_projection" and files == TRANSFORMERS:  # as of CLIPTextModelWithProjection
            yield name, files.image if whole else files.text, [name], 0
        else:
            yield name, files.image if whole else files.head, [name], 0


def _table(layout: Layout) -> LayoutTable:
    return next(table for table in TABLES if table.layout == layout)
