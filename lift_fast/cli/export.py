"""lift-fast export: a trained model as a folder of another project."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from ..errors import ConfigError
from .common import say
from .use import print_code

# The keys of export.TARGETS, repeated because that package imports torch.
TargetName = Literal["open_clip", "timm", "hf", "sentence-transformers", "onnx", "torch-export", "safetensors"]


@dataclass(frozen=True)
class Export:
    """Write a trained model as a folder that another project's own code loads, with a model card.

    docs/export.md has what each folder holds and how it is loaded.
    """

    run: tyro.conf.Positional[str]
    """Folder of a run or an export, or anything else that lift_fast.load takes."""
    to: TargetName
    """hf: transformers. safetensors: lift-fast's own weights, and config.json."""
    out: Path
    """Folder to write."""
    names: tuple[str, ...] = ()
    """Classes, whose features become classes.npz: then images are classified without a text encoder."""
    templates: tuple[str, ...] = ("a photo of a {}.",)
    """Sentences to put the names in, in place of {}; of several the mean is taken."""
    licence: str | None = None
    """Licence of the weights, for the card, as the Hugging Face hub names it: mit, cc-by-4.0, …"""
    push: str | None = None
    """Upload the folder to the Hugging Face hub under this name, OWNER/MODEL. Nothing is uploaded without it."""
    private: bool = False
    """--push: make it private."""
    encoder: str | None = None
    """Text encoder as in embed, where RUN names none, or one on the hub that is not in the local hub cache."""
    trust_remote_code: bool = False
    """--names: run Python code that comes with the text encoder."""

    def __post_init__(self) -> None:
        if self.private and self.push is None:
            raise ConfigError("--private is about an upload; add --push OWNER/MODEL, or leave it out")

    def __call__(self) -> None:
        import lift_fast

        from ..export import export
        from ..export.hub import check_name, push

        if self.push is not None:
            check_name(self.push)
        model = lift_fast.load(self.run, device="cpu", encoder=self.encoder, trust_remote_code=self.trust_remote_code)
        if self.names:
            print_code(model, self.trust_remote_code)
        remarks = export(model, self.to, self.out, names=self.names, templates=self.templates, licence=self.licence)
        for remark in remarks:
            say(remark)
        say(f"written to {self.out}")
        if self.push is not None:
            say(f"uploaded to {push(self.out, self.push, private=self.private)}")
