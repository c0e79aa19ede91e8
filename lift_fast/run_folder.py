"""A trained run on disk: a folder with model.safetensors (the weights) and run.json (what was trained, and how).

Training writes it, evaluation and inference read it. The content of run.json is called `run` in the code. These of
its keys suffice to build the model and the text encoder again:

    model, preset                  "lift" or "clip", and a name in nn.PRESETS
    vit                            the fields of VitConfig in which the image tower is not the preset's, if any
    text_dim, encoder, rotation    LIFT: output width of the head, the EncoderSpec of the cached text, its rotation
    conditioning                   LIFT: the entry of the text's conditioning, whose numbers are in the folder's
                                   conditioning.safetensors; None or absent without one
    context                        CLIP: caption length in tokens
    text, embed_dim                CLIP: the fields of TextConfig, and the width of the joint space, that are not the
                                   preset's, if any (of models that were not trained here)
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypedDict

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialise
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from . import foreign
from .cache import Conditioning, Rotation
from .cache.conditioning import CONDITIONING
from .errors import CacheError, CacheMismatch, ConfigError, DataError, TrainingError
from .files import write_whole
from .nn import Clip, Lift, TextConfig, VitConfig, check_size, fill, preset
from .text.encoder import Encoder
from .text.repository import code_notice, code_of, first_line, locate
from .text.spec import EncoderSpec
from .text.tokenizer import ClipTokenizer

EncodeText = Callable[[Sequence[str]], Tensor]
_CAPTIONS_AT_ONCE = 256  # in CLIP's text tower


class _Config(TypedDict, total=False):
    data: list[str]
    init_from: str | None


class _Run(TypedDict, total=False):
    """The types of what is used of run.json."""

    model: Literal["lift", "clip"]
    preset: str
    vit: dict[str, Any]
    text: dict[str, Any]
    preprocessing: dict[str, Any]
    text_dim: int
    embed_dim: int
    context: int
    encoder: dict[str, Any] | None
    rotation: dict[str, Any] | None
    conditioning: dict[str, Any] | None
    config: _Config
    field: str
    machine: dict[str, Any] | None
    versions: dict[str, str]
    step_ms: float
    step_ms_spread: float
    images_per_s: float
    seconds: float
    skipped_causes: dict[str, int]


def build(run: dict[str, Any]) -> Lift | Clip:
    """The model that a run describes, with freshly initialised weights, on the CPU.

    Raises ConfigError when there is no such preset, and for sizes that no model has.
    """
    sizes = preset(run["preset"])
    sizes = replace(sizes, vit=replace(sizes.vit, **run.get("vit", {})))
    if run["model"] == "lift":
        return Lift(sizes, run["text_dim"])
    text = replace(sizes.text, **run.get("text", {}), context=run["context"])
    return Clip(replace(sizes, text=text, embed_dim=run.get("embed_dim", sizes.embed_dim)))


def check(run: Any) -> None:
    """Validates a description that was read from a file: that `build` can use it, and the types of all that is used.

    Raises ConfigError.
    """
    foreign.check(run, _Run, "it")
    needed = ["model", "preset", *{"lift": ["text_dim"], "clip": ["context"]}.get(run.get("model"), [])]
    if missing := [name for name in needed if name not in run]:
        raise ConfigError(f"this model's description: {missing[0]} is missing")
    foreign.check_fields(run.get("vit", {}), VitConfig, "vit")
    foreign.check_fields(run.get("text", {}), TextConfig, "text")
    for name in ("text_dim", "embed_dim", "context"):
        check_size(name, run.get(name, 1))
    if run.get("encoder") is not None:
        foreign.check_fields(run["encoder"], EncoderSpec, "encoder")
        if "name" not in run["encoder"]:
            raise ConfigError("this model's description: encoder.name is missing")
    if run.get("conditioning") is not None:
        try:
            Conditioning.check(run["conditioning"])
        except CacheError as error:
            raise ConfigError(f"this model's description: {error}") from error


def empty(run: Any) -> Lift | Clip:
    """The model of a description that was read from a file, with weights of no meaning, until nn.fill gives it some.

    Raises ConfigError for a description that is not valid.
    """
    check(run)
    try:
        with _NoInitialisation():
            return build(run)
    except (RuntimeError, OverflowError) as error:  # torch's, for memory that is not there
        raise ConfigError(f"this model's description: no memory holds such sizes ({first_line(error)})") from error


class _NoInitialisation(TorchFunctionMode):
    """Makes random initialisation do nothing, so that weights of any size take no time, and memory that is never
    written to. (The meta device would take none at all, but its first use imports torch._dynamo, for a second.)"""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"]  # as torch.nn.init passes it on
        return (torch.empty if func is torch.randn else func)(*args, **(kwargs or {}))


def save(folder: Path, model: Lift | Clip, run: dict[str, Any], conditioning: Conditioning | None = None) -> None:
    """Writes the conditioning of the run's text, the weights, then run.json, each atomically: a folder that has
    run.json is complete.

    Raises TrainingError when a file cannot be written (a full disk), ValueError for another conditioning than `run`
    names.
    """
    _check_named(conditioning, run)
    tensors = {name: tensor.contiguous().cpu() for name, tensor in model.state_dict().items()}
    try:
        write_whole(
            ({} if conditioning is None else {folder / CONDITIONING: conditioning.to_bytes()})
            | {
                folder / "model.safetensors": serialise(tensors),
                folder / "run.json": json.dumps(run, indent=1, default=str).encode(),
            }
        )
    except OSError as error:
        raise TrainingError(f"cannot write the run to {folder}: {error}") from error


def read_description(folder: Path) -> dict[str, Any]:
    """The content of run.json. Raises DataError when the file is missing or is not JSON."""
    file = Path(folder) / "run.json"
    if not file.is_file():
        raise DataError(f"no finished run in {folder}: it has no run.json; train one with: lift-fast train")
    try:
        return json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{file} is damaged ({error}); train again with: lift-fast train") from error


def load(folder: Path, device: str | torch.device = "cpu") -> tuple[Lift | Clip, dict[str, Any]]:
    """The trained model on `device`, in eval mode, and the content of run.json.

    Raises DataError as read_description does; ConfigError when the description is not valid or the weights are
    missing, damaged, or not those of the model that run.json describes.
    """
    run = read_description(folder)
    try:
        model = empty(run)
    except ConfigError as error:
        raise ConfigError(f"{folder}: {error}") from error
    try:
        fill(model, load_file(Path(folder) / "model.safetensors"))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ConfigError(f"{folder}: model.safetensors does not fit its run.json ({error})") from error
    return model.to(device).eval(), run


def conditioning_of(folder: Path, run: dict[str, Any]) -> Conditioning | None:
    """The conditioning of the text of the run in `folder`; None without one. run: its description.

    Raises CacheError when its file is missing, damaged or not the one that the description names.
    """
    entry = run.get("conditioning")
    return None if entry is None else Conditioning.load(Path(folder), entry, run.get("text_dim"))


def text_encoder(
    model: Lift | Clip,
    run: dict[str, Any],
    device: torch.device,
    trust_remote_code: bool = False,
    conditioning: Conditioning | None = None,
) -> EncodeText:
    """A function from captions to their features, float32 [captions, dim] on the CPU, each row of length 1.

    For LIFT it is the frozen encoder that embedded the training text, with the cache's conditioning and rotation
    applied; for CLIP the model's own text tower. trust_remote_code: LIFT: whether the encoder may run code from its
    repository. conditioning: LIFT: `conditioning_of` the run.

    Raises as `frozen_encoder`.
    """
    if isinstance(model, Clip):
        return _tower_encoder(model, ClipTokenizer(run["context"]), device)
    return frozen_encoder(run, device, trust_remote_code, conditioning)


def frozen_encoder(
    run: dict[str, Any],
    device: torch.device,
    trust_remote_code: bool = False,
    conditioning: Conditioning | None = None,
) -> EncodeText:
    """The same of the frozen encoder that "encoder", "text_dim", "conditioning" and "rotation" of a run describe.

    Raises EncoderError when the encoder cannot be loaded, ConfigError when it needs trust_remote_code, CacheMismatch
    when its dim, or that of the conditioned vectors, is not the one that is needed; ValueError for another conditioning
    than `run` names.
    """
    _check_named(conditioning, run)
    if conditioning is not None and conditioning.dim != run["text_dim"]:
        raise CacheMismatch(
            f"the conditioning of this run gives vectors of dim {conditioning.dim}, its head {run['text_dim']}"
        )
    # That run.json allows remote code does not permit running it here: the run may come from somebody else.
    spec = replace(EncoderSpec(**run["encoder"]), trust_remote_code=trust_remote_code)
    if run["encoder"].get("trust_remote_code") and not trust_remote_code:
        raise ConfigError(
            f"{spec.name} runs code from its repository ({'; '.join(code_of(spec, locate(spec)[0])) or 'now none'}); "
            "read it, then allow it with --trust-remote-code"
        )
    encoder = Encoder(spec, device=device)
    wanted = run["text_dim"] if conditioning is None else conditioning.source_dim
    if encoder.dim != wanted:
        needs = "the head of this run" if conditioning is None else "the conditioning of this run is for"
        raise CacheMismatch(f"{encoder.spec.name} gives vectors of dim {encoder.dim}, {needs} {wanted}")
    rotation = None if run.get("rotation") is None else Rotation.from_dict(run["rotation"], run["text_dim"])

    def encode(captions: Sequence[str]) -> Tensor:
        vectors = encoder.encode(captions)
        if conditioning is not None:
            # On the CPU: a GPU may have been set to TF32, whose errors the small deviations would magnify.
            vectors = conditioning.apply(vectors.cpu())
        return (vectors if rotation is None else rotation.apply(vectors)).cpu()

    return encode


def encoder_code(folder: Path) -> list[str]:
    """What to print before the encoder of the run in `folder` may run code: `text.repository.code_notice` of it.

    Raises DataError as read_description does, EncoderError when the encoder is not found.
    """
    encoder = read_description(folder).get("encoder")
    return code_notice(replace(EncoderSpec(**encoder), trust_remote_code=True)) if encoder else []


def _check_named(conditioning: Conditioning | None, run: dict[str, Any]) -> None:
    """Raises ValueError unless it is the conditioning that a run names: with another, texts would be compared with
    images in the wrong space, and nothing would show it."""
    if (None if conditioning is None else conditioning.as_dict()) != run.get("conditioning"):
        raise ValueError("this is not the conditioning that the run names; take that of conditioning_of")


def _tower_encoder(model: Clip, tokenizer: ClipTokenizer, device: torch.device) -> EncodeText:
    @torch.no_grad()
    def encode(captions: Sequence[str]) -> Tensor:
        parts = [
            model.encode_text(tokenizer(captions[start : start + _CAPTIONS_AT_ONCE]).to(device))
            for start in range(0, len(captions), _CAPTIONS_AT_ONCE)
        ]
        return F.normalize(torch.cat(parts).float(), dim=-1).cpu()

    return encode
