"""Exports: a trained model as a folder that another project's own code loads.

A target is a module of this package with two functions:

    write(model, out) -> list[str]   writes the files into the empty folder `out`; returns, in sentences, what the other
                                     project computes differently and what the folder does not hold
    use(model) -> str                lines of Python that load the folder FOLDER and use it, for the model card

and, if a file of the folder has to say where the folder is, place(folder, address), which writes that into it: the
address is "local-dir:PATH", or "hf-hub:OWNER/NAME" while it is uploaded.

The model that they get has float32 weights on the CPU.
"""

import copy
import json
import os
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import torch

from .. import __version__
from ..cache.conditioning import CONDITIONING
from ..errors import ConfigError
from ..files import is_part, locked_folder, part_folder, remove_abandoned
from ..inference import Model
from ..nn import Clip, Lift
from . import conditioned
from .card import is_found, model_card
from .classes import write_classes
from .description import described

TARGETS = {
    "open_clip": "open_clip",
    "timm": "timm",
    "hf": "hf",
    "sentence-transformers": "sentence_transformers",
    "onnx": "onnx",
    "torch-export": "torch_export",
    "safetensors": "safetensors",
}  # the name of a target -> its module


def export(
    model: Model,
    to: str,
    out: str | os.PathLike[str],
    *,
    names: Sequence[str] = (),
    templates: Sequence[str] = ("a photo of a {}.",),
    licence: str | None = None,
) -> list[str]:
    """Writes a model into the folder `out`, which then also holds lift_fast.json, a model card, README.md, and, where
    its text vectors are conditioned, conditioning.safetensors.

    to: a key of TARGETS. names, templates: classes, as of `Model.zero_shot`, whose features become classes.npz, so that
    images can be classified without a text encoder. licence: of the weights, for the card, as the Hugging Face hub
    names it ("mit"). The weights are written in float32.

    Returns sentences that say what the other project computes differently, and what the folder does not hold.

    Raises ConfigError for an unknown target, a folder that holds something, a model that is not lift-fast's, and a
    target that cannot hold this model, and when a file cannot be written; BackendError when a package that writes the
    target is not installed; what `Model.conditioning` and `Model.zero_shot` raise. `out` is then as it was.
    """
    if to not in TARGETS:
        raise ConfigError(f"no target {to!r}; choose one of {', '.join(TARGETS)}")
    out = Path(os.path.realpath(Path(out).expanduser()))
    for within in (out.parent, out):
        remove_abandoned(within, out.name)
    if out.exists() and not (out.is_dir() and _is_free(out)):
        raise _exists(out)
    if not isinstance(model.module, Lift | Clip):
        raise ConfigError(
            f"{model.source} is a model of another project that lift-fast only encodes with; export a run of lift-fast"
        )
    target = import_module(f".{TARGETS[to]}", __name__)
    run, conditioning = described(model), model.conditioning
    try:
        # In an empty folder that exists, which stays where it is: it may be mounted, or a shell's working folder.
        with part_folder(out, within=out if out.exists() else None) as part:
            if names:
                write_classes(model, names, templates, part / "classes.npz")
            model = copy.copy(model)
            model.module = copy.deepcopy(model.module)
            model.to("cpu", torch.float32)
            remarks = target.write(model, part)
            if conditioning is not None:
                (part / CONDITIONING).write_bytes(conditioning.to_bytes())
                remarks.append(conditioned.REMARK)
            if run.get("encoder") and not is_found(model, run):
                name = run["encoder"]["name"]
                remarks.append(f"the text encoder is recorded as {name}, without its path: load takes it with encoder=")
            (part / "README.md").write_text(
                model_card(model, run, to, target.use(model), remarks, licence), encoding="utf-8"
            )
            about = {"format": to, "version": __version__, "run": run}
            (part / "lift_fast.json").write_text(json.dumps(about, indent=1), encoding="utf-8")
            if hasattr(target, "place"):
                target.place(part, f"local-dir:{out}")
            _move(part, out)
    except OSError as error:
        raise _not_written(out, error) from error
    return remarks


def _is_free(folder: Path) -> bool:
    """Whether a folder is empty but for the parts of exports."""
    return all(is_part(name) for name in os.listdir(folder))


def _move(part: Path, out: Path) -> None:
    """Moves a whole folder to its place. Raises ConfigError when another export was there first."""
    if part.parent == out:
        with locked_folder(out):
            if not _is_free(out):
                raise _exists(out)
            for path in sorted(part.iterdir(), key=lambda path: path.name == "lift_fast.json"):  # by it `load` knows it
                path.rename(out / path.name)
        return
    try:
        part.rename(out)
    except OSError as error:
        if out.exists():
            raise _exists(out) from error
        raise


def _exists(out: Path) -> ConfigError:
    return ConfigError(f"{out} exists already; remove it or name another --out")


def _not_written(out: Path, error: OSError) -> ConfigError:
    return ConfigError(f"the export {out} cannot be written ({error.strerror or error})")
