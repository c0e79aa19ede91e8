"""What `load` takes, and how the parts of a model are found in it."""

import math
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from .. import foreign, run_folder
from ..cache import Conditioning
from ..errors import ConfigError, DataError
from ..nn import Clip, Lift, fill
from ..nn.weights.files import may_hold_weights, run_of
from ..run_folder import EncodeText
from ..text.presets import spec_for
from ..text.repository import HUB_NAME, hub_snapshot
from . import exports, others
from .model import Parts
from .preprocessing import Preprocessing

_STARTED, _CHECKPOINT, _CHECKPOINTS = "started.json", "checkpoint.json", "checkpoints"  # see train/
_BEST, _BEST_BEFORE = "best", ".best.old"  # see train/best.py


def find(source: str, *, encoder: str | None = None, trust_remote_code: bool = False) -> Parts:
    """The parts of the model at `source`. Arguments and errors as of `load`."""
    path = Path(source).expanduser()
    if path.name == _BEST and not os.path.exists(path) and (before := path.with_name(_BEST_BEFORE)).is_dir():
        path = before  # the folder is just being replaced, or a kill has ended that
    if not os.path.exists(path):  # of a Path it raises for a name that is too long
        # With a folder of the owner's name it is rather a path with a mistake than a name on the hub.
        if not HUB_NAME.fullmatch(source) or path.parent.is_dir():
            raise DataError(
                f"no model at {source}: there is no such file or folder. A name on the hub is owner/model, where no "
                "folder is called owner"
            )
        path = _from_hub(source)
    if path.suffix == ".safetensors" and exports.is_export(path.parent):
        path = path.parent
    why = ""
    model: Lift | Clip | others.ImageTower
    folder = path  # which has the conditioning of the text
    if (run_file := run_of(path)) is not None:
        folder = run_file.parent
        model, run = run_folder.load(folder)
    elif exports.is_export(path):
        model, run = exports.read(path)
    elif (path / _CHECKPOINT).is_file() or (path / _STARTED).is_file():
        model, run, folder = _of_checkpoint(path)
    elif may_hold_weights(path):
        model, run, why = others.read(path)
    else:
        raise DataError(
            f"no model at {path}: it is neither a run (run.json, or {_STARTED} with {_CHECKPOINTS}/), a checkpoint "
            f"({_CHECKPOINT}), an export ({exports.ABOUT}), nor another project's weights (.safetensors, .pt, .pth, "
            ".bin, .ckpt, or a folder with model.safetensors, pytorch_model.bin or open_clip_model.safetensors)"
        )
    return _parts(model, run, folder, why, encoder, trust_remote_code)


def _parts(
    model: "Lift | Clip | others.ImageTower",
    run: dict[str, Any],
    folder: Path,
    why: str,
    encoder: str | None,
    trust_remote_code: bool,
) -> Parts:
    """The parts of a model. run: as in run.json. folder: of the run or export. why: why its text encoder is not known,
    "" if it is."""
    if encoder is not None:
        run = run | {"encoder": _named(encoder, run.get("encoder"))}
    size = model.visual.config.image_size
    given = run.get("preprocessing") or {"image_size": size, "resize_size": size}
    preprocessing = Preprocessing.of_dict(given)
    if preprocessing.image_size != size:
        raise ConfigError(
            f"this model's description: preprocessing.image_size is {preprocessing.image_size}, not the tower's {size}"
        )

    def make_text(device: torch.device) -> EncodeText:
        if isinstance(model, Clip):
            if encoder is None:
                return run_folder.text_encoder(model, run, device)
            own = {"text_dim": model.visual_projection.out_features, "rotation": None, "conditioning": None}
            return run_folder.frozen_encoder(run | own, device, trust_remote_code, download=parts.download)
        if run.get("encoder") is None:
            raise ConfigError(f"the text encoder of this model is not known: {why}; name it with encoder= or --encoder")
        return run_folder.frozen_encoder(run, device, trust_remote_code, parts.conditioning, download=parts.download)

    folder = folder.absolute()  # it is read later

    def read_conditioning() -> Conditioning | None:
        return run_folder.conditioning_of(folder, run)

    scale = model.logit_scale.exp().item()
    if not 0 < scale < math.inf:
        raise ConfigError(
            f"{folder}: its logit_scale is e^{model.logit_scale.item():g}, which no model has; copy it again"
        )
    parts = Parts(model, preprocessing, scale, run, make_text, read_conditioning, download=encoder is not None)
    return parts


def _named(encoder: str, known: dict[str, Any] | None) -> dict[str, Any]:
    """The settings of the text encoder `encoder`. known: those of the encoder that the model was trained against, which
    it is a copy of in another place."""
    if known is None:
        return spec_for(encoder).as_dict()
    return known if known.get("name") == encoder else known | {"name": encoder, "revision": None}


def _from_hub(name: str) -> Path:
    """The folder of a model on the hub, from the local hub cache or downloaded. Raises DataError."""
    try:
        folder = Path(hub_snapshot(name))
        if not any(kind(folder) for kind in (run_of, exports.is_export, may_hold_weights)):
            folder = Path(hub_snapshot(name, cached=False))  # the cache had its configuration or tokenizer only
    except PermissionError as error:
        raise DataError(f"the hub does not give you the model {name!r}: {error}; check the name, or log in") from error
    except ConnectionError as error:
        raise DataError(
            f"no model at {name}: it is neither a file or folder nor in the local hub cache, and the hub cannot be "
            f"reached ({error})"
        ) from error
    return folder


def _of_checkpoint(path: Path) -> tuple[Lift | Clip, dict[str, Any], Path]:
    """The model of a checkpoint, or of the newest one of a run that is not finished, as that run would end with it:
    with the averaged weights, if there are any. With it what run.json would say, and the run's folder.

    Raises DataError when no checkpoint is whole, it is of another run, or the run is not described; ConfigError when
    the weights do not fit that description.
    """
    # Not at the top: finished runs do without it.
    from ..train.checkpoints import newest_whole, verified
    from ..train.storage import whole_tensors

    try:
        if (path / _CHECKPOINT).is_file():
            path = path.resolve()
            folder, step = path.parent.parent, int(path.name.removeprefix("step-"))
            found, reason = verified(path, step), ""
        else:
            folder, reason = path, "it has written none yet"
            found = None
            if (path / _CHECKPOINTS).is_dir():
                found, damaged = newest_whole(path / _CHECKPOINTS)
                reason = next(iter(damaged.values()), reason)
    except (OSError, ValueError) as error:
        raise DataError(f"the checkpoint {path} is damaged ({error}); name another one") from error
    if found is None:
        raise DataError(f"no checkpoint of the run {folder} is whole: {reason}")
    run = _started(folder, found.state.get("run")) | {"step": found.step}
    model = run_folder.empty(run)
    try:
        state = whole_tensors(found.folder, found.index, "model.") | whole_tensors(found.folder, found.index, "ema.")
        fill(model, state)
    except (OSError, SafetensorError, ValueError, RuntimeError, LookupError) as error:
        raise ConfigError(
            f"{found.folder}: the checkpoint does not fit its run's {_STARTED} ({error!s:.300})"
        ) from error
    return model.eval(), run, folder


def _started(folder: Path, identity: str | None) -> dict[str, Any]:
    """What run.json would say of the model and the text of a run that is not finished, from its started.json.

    identity: of the run that a checkpoint is of. Raises DataError.
    """
    from ..train.folder import Started

    file = folder / _STARTED
    try:
        started = foreign.read_json(file)
        foreign.check(started, Started)
        if started["checksum"] != identity:
            raise DataError(f"the checkpoint is of another run than {folder}; put it back into the folder of its own")
        settings, about = started["mathematics"], started["about"]
        run = {name: settings[name] for name in ("model", "preset")} | {"config": about["config"]}
        # Runs that were started before "vit" was kept have the preset's, unless they began with other weights.
        run["vit"] = about["vit"] if settings["init_from"] else {}
        if run["model"] == "clip":
            return run | {"context": settings["context"], "field": settings["field"]}
        cache = started["fingerprints"]["caches"][0]
        prefix = "encoder "
        encoder = {name.removeprefix(prefix): value for name, value in cache.items() if name.startswith(prefix)}
        run |= {"text_dim": settings["text_dim"], "encoder": encoder}
        run["conditioning"] = cache.get("conditioning")
        return run | {name: cache[name] for name in ("rotation", "field", "codec")}
    except (OSError, ValueError, LookupError) as error:
        raise DataError(
            f"{file} is missing, damaged or of another version ({error!r}); finish the run first"
        ) from error
