"""Whether texts were encoded by the same encoder, in the same way."""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError, EncoderError
from .repository import locate, resolved
from .spec import EncoderSpec

FEATURES = "eval-features"  # in a model's folder: what evaluation keeps, and no file of an encoder


def text_identity(run: Mapping[str, Any], device: torch.device, *, download: bool = False) -> str | None:
    """All that decides the text features of a frozen encoder on a device: the same text for runs that share its
    settings, conditioning and rotation. None where the encoder is not known or not found.

    run: "encoder", "text_dim", "conditioning" and "rotation" as in run.json. download: as of `locate`. Of an encoder in
    a folder the identity has the sizes and times of the files, of one on the hub the commit. It has no versions of
    libraries, which change features by rounding errors.
    """
    if run.get("encoder") is None:
        return None
    about = {name: run.get(name) for name in ("text_dim", "conditioning", "rotation")} | {"device": device.type}
    try:
        spec = EncoderSpec.of_dict(run["encoder"])
        spec = replace(spec, trust_remote_code=False)  # a permission: it changes no vector
        folder, file = locate(spec, download=download)
        spec = resolved(spec, folder)
        if Path(folder).parent.name != "snapshots":  # of the hub's cache, in which a commit's files do not change
            spec = replace(spec, name="")  # a copy will do
            about["files"] = sorted(_stamps(Path(folder), file))
    except (ConfigError, EncoderError, OSError):  # it is raised again where the encoder is needed
        return None
    return json.dumps(about | {"encoder": spec.as_dict()}, sort_keys=True)


def _stamps(folder: Path, file: str | None) -> Iterator[tuple[str, int, int]]:
    """Name, size and time of last change of the files in a folder and below, or of one of them. Raises OSError."""
    for path, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name != FEATURES and not name.startswith(".")]
        for name in [name for name in names if file in (None, name)]:
            status = os.stat(os.path.join(path, name))
            yield os.path.relpath(os.path.join(path, name), folder), status.st_size, status.st_mtime_ns
