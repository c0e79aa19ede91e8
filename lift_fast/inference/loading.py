"""load: a Model from what training, an export, a hub or another project left."""

import os

import torch

from .model import Model
from .sources import find


def load(
    source: str | os.PathLike[str],
    *,
    device: str | torch.device = "auto",
    dtype: torch.dtype = torch.float32,
    encoder: str | None = None,
    trust_remote_code: bool = False,
) -> Model:
    """Loads a trained model to be used: its image encoder now, its text encoder when a text is first encoded.

    source: the folder of a run (its final weights, or the newest checkpoint of one that is not finished), a checkpoint
    in it, a folder that `lift-fast export` wrote, another project's folder or file of weights (CLIP models of open_clip
    and Hugging Face, LIFT's authors' .pt), or a name on the Hugging Face hub, owner/model. Only `source` and `encoder`
    are ever looked for in a network, and no other encoder that the source names.

    device, dtype: as of `Model.to`. encoder: the text encoder, a folder or name as for `lift-fast embed`, where the
    source does not say it, or names one on the hub that is not in the local hub cache. trust_remote_code: whether a
    text encoder may run code from its repository.

    Raises DataError when there is nothing at `source`; ConfigError for weights that are damaged, refused or of a model
    that lift-fast does not compute, and for a device or dtype that does not exist.
    """
    name = os.fspath(source)
    model = Model(find(name, encoder=encoder, trust_remote_code=trust_remote_code), name, device)
    return model.to(dtype=dtype)
