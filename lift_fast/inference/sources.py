"""What `load` takes, and how the parts of a model are found in it."""

from pathlib import Path

import torch

from .. import run_folder
from ..errors import DataError
from ..nn import Clip, Lift
from ..run_folder import EncodeText
from .model import Parts
from .preprocessing import Preprocessing


def find(source: str, *, encoder: str | None = None, trust_remote_code: bool = False) -> Parts:
    """The parts of the model at `source`. Arguments and errors as of `load`."""
    folder = Path(source).expanduser()
    if (folder / "run.json").is_file():
        return _of_run(folder, encoder, trust_remote_code)
    raise DataError(f"no model at {source}")


def _of_run(folder: Path, encoder: str | None, trust_remote_code: bool) -> Parts:
    model, run = run_folder.load(folder)
    return parts_of(model, run, encoder, trust_remote_code)


def parts_of(model: Lift | Clip, run: dict, encoder: str | None, trust_remote_code: bool) -> Parts:
    """The parts of a Lift or Clip that `run` describes, as in run.json."""
    size = model.visual.config.image_size
    given = run.get("preprocessing")
    preprocessing = Preprocessing(**given) if given else Preprocessing(size, size)

    def make_text(device: torch.device) -> EncodeText:
        return run_folder.text_encoder(model, run, device, trust_remote_code)

    return Parts(model, preprocessing, model.logit_scale.exp().item(), run, make_text)
