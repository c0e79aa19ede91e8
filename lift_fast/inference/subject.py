"""A Model as evaluation takes it."""

import os
from pathlib import Path

from ..eval.images import Pixels
from ..eval.subject import Subject
from ..nn import Clip
from ..text.identity import FEATURES, text_identity
from .model import Model
from .store import model_identity, weights_digest

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
        text_identity=lambda: _text_identity(model),
    )


def features_folder(model: Model) -> Path | None:
    """Where evaluation keeps the features of a model: eval-features in its folder, of a checkpoint in the run's; None
    for a name on the hub and for a file."""
    folder = Path(model.source).expanduser()
    if not os.path.isdir(folder):
        return None
    above = folder.resolve().parents[:2]
    return next((path for path in above if (path / _STARTED).is_file()), folder) / FEATURES


def _text_identity(model: Model) -> str | None:
    """text.identity.text_identity of the model; with that of a CLIP's own text tower."""
    run, frozen = model.description, text_identity(model.description, model.device, download=model.download_encoder)
    if not isinstance(model.module, Clip) or (frozen is None and run.get("encoder") is not None):
        return frozen
    state = {name: weights for name, weights in model.module.state_dict().items() if not name.startswith("visual")}
    return weights_digest(state, run.get("context"), run.get("text"), frozen, model.device.type)
