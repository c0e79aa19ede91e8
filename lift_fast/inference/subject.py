"""A Model as evaluation takes it."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from ..errors import EncoderError
from ..eval.images import Pixels
from ..eval.subject import Subject
from ..nn import Clip
from ..text.repository import locate, resolved
from ..text.spec import EncoderSpec
from .model import Model
from .store import model_identity, weights_digest

_FEATURES = "eval-features"
_STARTED = "started.json"  # of a run, see train/


def subject_of(model: Model) -> Subject:
    """What lift_fast.eval.run.evaluate takes of a model. Raises CacheError as Model.conditioning."""
    made = model.preprocess
    model.conditioning  # noqa: B018 - reads its file, so that an error comes before any work
    return Subject(
        encode_image=lambda pixels: model.module.encode_image(pixels.to(model.dtype)),  # type: ignore[operator]
        encode_text=lambda texts: model.encode_text(texts).cpu(),
        pixels=Pixels(made.image_size, made.resize_size, made.mean, made.std),
        device=model.device,
        description=model.description,
        image_identity=lambda: model_identity(model),
        text_identity=lambda: text_identity(model),
    )


def features_folder(model: Model) -> Path | None:
    """Where evaluation keeps the features of a model: eval-features in its folder, of a checkpoint in the run's; None
    for a name on the hub and for a file."""
    folder = Path(model.source).expanduser()
    if not os.path.isdir(folder):
        return None
    above = folder.resolve().parents[:2]
    return next((path for path in above if (path / _STARTED).is_file()), folder) / _FEATURES


def text_identity(model: Model) -> str | None:
    """A digest of all that decides a model's text features, 32 hex digits; the same for models that share a frozen
    encoder, its settings, conditioning and rotation. None where that is not known.

    Of an encoder in a folder it has the sizes and times of the files, of one on the hub the commit.
    """
    run = model.description
    about = {name: run.get(name) for name in ("text_dim", "conditioning", "rotation", "context", "text")}
    about["device"] = model.device.type
    if run.get("encoder") is not None:
        spec = replace(EncoderSpec(**run["encoder"]), trust_remote_code=False)
        try:
            folder, file = locate(spec)
        except EncoderError:  # it is raised again where the encoder is needed
            return None
        spec = resolved(spec, folder)
        if Path(folder).parent.name == "snapshots":  # the hub's cache: a commit's files do not change
            about["encoder"] = spec.as_dict()
        else:
            about["encoder"] = replace(spec, name="").as_dict()
            about["files"] = sorted(_stamps(Path(folder), file))
    elif not isinstance(model.module, Clip):
        return None
    state = model.module.state_dict() if isinstance(model.module, Clip) else {}
    return weights_digest({name: weights for name, weights in state.items() if not name.startswith("visual")}, about)


def _stamps(folder: Path, file: str | None) -> Iterator[tuple[str, int, int]]:
    """Name, size and time of last change of the files in a folder and below, or of one of them."""
    for path, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name != _FEATURES and not name.startswith(".")]
        for name in [name for name in names if not file or name == file]:
            status = os.stat(os.path.join(path, name))
            yield os.path.relpath(os.path.join(path, name), folder), status.st_size, status.st_mtime_ns
