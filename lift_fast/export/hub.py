"""Uploads an export to the Hugging Face hub. The only code of lift-fast that sends anything."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

from .. import foreign
from ..errors import ConfigError
from ..inference.exports import ABOUT
from ..text.repository import HUB_NAME, first_line
from . import TARGETS


def check_name(name: str) -> None:
    """Raises ConfigError unless `name` is one of the hub, owner/model."""
    if not HUB_NAME.fullmatch(name):
        raise ConfigError(f"--push takes a name on the Hugging Face hub, owner/model, not {name!r}")


def push(folder: Path, name: str, *, private: bool = False) -> str:
    """Uploads the files of an export to the model `name` (owner/model), which is made if there is none, with the login
    of `hf auth login`; returns its address.

    private: make it private. Raises ConfigError for a name that is not valid, a model that exists and is public where
    it was to be private, and when the hub refuses or cannot be reached; `folder` stays as it is.
    """
    from huggingface_hub import HfApi

    check_name(name)
    hub = HfApi()
    try:
        # A public model is never made private, and one that exists keeps its setting, whatever is asked for.
        address = hub.create_repo(name, private=private, exist_ok=True)
        public = private and not hub.model_info(name).private
        if not public:
            with _placed(folder, name):
                hub.upload_folder(repo_id=name, folder_path=folder, commit_message="lift-fast export")
    except Exception as error:  # the hub's HTTP client has many connection errors of its own
        raise ConfigError(
            f"the hub did not take {name}: {first_line(error)}; log in with `hf auth login`, check the name, and "
            f"upload the export again with: hf upload {name} {folder}"
        ) from error
    if public:
        raise ConfigError(f"{name} exists on the hub and is public, so --private is not kept; nothing was uploaded")
    return str(address)


@contextmanager
def _placed(folder: Path, name: str) -> Iterator[None]:
    """While this lasts, the files of a target that have to say where the folder is say that it is on the hub."""
    target = import_module(f".{TARGETS[foreign.read_json(folder / ABOUT)['format']]}", __package__)
    if not hasattr(target, "place"):
        yield
        return
    target.place(folder, f"hf-hub:{name}")
    try:
        yield
    finally:
        target.place(folder, f"local-dir:{folder.absolute()}")
