"""The weights that a run starts from: those of another run, or another project's image tower."""

import hashlib
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from .. import run_folder
from ..errors import ConfigError
from ..nn import Clip, Lift, VitConfig
from ..nn.weights import load
from ..nn.weights.files import files_of, run_of

# Fields of VitConfig that are not sizes.
_CONVENTIONS = ("class_token", "pool", "patch_bias", "pre_norm", "norm_after_pool", "activation", "norm_eps")


def conventions(path: Path, vit: VitConfig) -> dict[str, Any]:
    """The fields of VitConfig, sizes aside, in which the tower at `path` is not `vit`: as "vit" in run.json, they make
    `run_folder.build` build a model that computes what the weights were trained for. Raises as `init_from`."""
    found = load(path).visual.config
    return {name: getattr(found, name) for name in _CONVENTIONS if getattr(found, name) != getattr(vit, name)}


def init_from(model: Lift | Clip, path: Path) -> str:
    """Loads the weights at `path` into a new model that is not yet sharded; returns a sentence on what was loaded.

    path: a folder with the weights and run.json of lift-fast, or anything that `nn.weights.load` takes. The image tower
    is always loaded. If it is of images of another size, its positions are interpolated to the model's. Of a run of the
    same kind and sizes all is loaded. LIFT also takes its authors' head and logit scale, if the head has its sizes.

    Raises ConfigError for weights that cannot be read, and for a tower of other sizes or conventions than the model's;
    DataError for a damaged run.json.
    """
    if (run := run_of(path)) is not None:
        return _from_run(model, run.parent)
    loaded = load(path)
    _check(loaded.visual.config, model.visual.config, path)
    loaded.visual.resize(model.visual.config.image_size)
    model.visual.load_state_dict(loaded.visual.state_dict())
    tower = loaded.visual.config
    said = f"Weights: the image tower of {path} ({loaded.layout}, pool {tower.pool}, {tower.activation})"
    if loaded.head is None or not isinstance(model, Lift):
        return said
    theirs, ours = ([tuple(p.shape) for p in head.parameters()] for head in (loaded.head, model.head))
    if theirs != ours or loaded.projection is not None:
        return f"{said}, without its head, which has other sizes"
    model.head.load_state_dict(loaded.head.state_dict())
    if loaded.logit_scale is None:
        return f"{said}, and its head"
    with torch.no_grad():
        model.logit_scale.copy_(loaded.logit_scale)
    model.clamp_logit_scale()
    return f"{said}, its head and logit scale"


def weights_digest(path: Path) -> str:
    """A checksum, as hexadecimal digits, of the files that `init_from` reads at `path`: the weights, and the
    configuration in the same folder, which may decide the conventions.

    Raises ConfigError when there are no weights.
    """
    digest = hashlib.sha256()
    for part in files_of(path):
        with part.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _from_run(model: Lift | Clip, folder: Path) -> str:
    source, run = run_folder.load(folder)
    _check(source.visual.config, model.visual.config, folder)
    source.visual.resize(model.visual.config.image_size)
    name = {"lift": "LIFT", "clip": "CLIP"}[run["model"]]
    theirs, ours = source.state_dict(), model.state_dict()
    sizes = [{key: tensor.shape for key, tensor in state.items()} for state in (theirs, ours)]
    if sizes[0] == sizes[1]:
        model.load_state_dict(theirs)
        text = f", for the text of {run['encoder']['name']}" if run.get("encoder") else ""
        if conditioning := run.get("conditioning"):
            text += f", conditioned with power {conditioning['power']:g}"
        return f"Weights: all of the {name} run {folder}{text}"
    model.visual.load_state_dict(source.visual.state_dict())
    why = "the rest has other sizes" if type(source) is type(model) else "the rest is of another kind of model"
    return f"Weights: the image tower of the {name} run {folder}; {why}, and starts afresh"


def _check(found: VitConfig, wanted: VitConfig, path: Path) -> None:
    """Raises ConfigError unless two towers compute the same with the same weights, up to the size of their images."""
    pairs = {
        f.name: (getattr(found, f.name), getattr(wanted, f.name))
        for f in fields(VitConfig)
        if f.name not in ("image_size", "mlp_dim", "patch_dropout")
    }
    pairs["mlp_dim"] = found.hidden, wanted.hidden
    if found.pool == wanted.pool == "cls":
        del pairs["norm_after_pool"]  # both orders are equal
    different = [f"{name} is {theirs!r}, not {ours!r}" for name, (theirs, ours) in pairs.items() if theirs != ours]
    if different:
        raise ConfigError(f"--init-from {path}: its image tower is not the one of this run: {', '.join(different)}")
