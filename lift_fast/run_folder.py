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
from safetensors.torch import save as serialise
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from . import foreign
from .cache import Conditioning, Rotation
from .cache.conditioning import CONDITIONING
from .errors import CacheError, CacheMismatch, ConfigError, DataError, TrainingError
from .files import remove_abandoned, write_whole
from .foreign import Count, Number
from .nn import Clip, Lift, TextConfig, VitConfig, check_size, fill, preset
from .nn.tensors import read_tensors
from .text.encoder import Encoder
from .text.repository import code_of, first_line, locate
from .text.spec import EncoderSpec
from .text.tokenizer import ClipTokenizer

EncodeText = Callable[[Sequence[str]], Tensor]
_CAPTIONS_AT_ONCE = 256  # in CLIP's text tower


class _Config(TypedDict, total=False):
    """The settings of a run that are used: compared, listed in reports and cards, or named in messages."""

    data: list[str]
    cache: list[str]
    pictures: list[str]
    options: dict[str, Any]
    init_from: str | None
    steps: Count
    batch_size: Count
    seed: Count
    checkpointing: Literal["none", "mlp", "branches", "block"]
    loss: str
    lock: str
    schedule: str
    unlocked_blocks: Count
    warmup: Count
    cooldown: Count
    patch_dropout: float
    lr: float
    layer_decay: float
    weight_decay: float
    beta1: float
    beta2: float
    eps: float
    clip_grad: float
    ema: float
    min_crop_area: float
    flip: float
    colour: float
    fp8: bool


class _Machine(TypedDict, total=False):
    cpu: str | None
    cores: Count | None
    memory_gib: float | None
    gpu: str | None
    os: str | None


class _Best(TypedDict):
    step: Count
    score: float
    of: str


class _Skipped(TypedDict):
    sample: str
    reason: str


class _Finished(TypedDict):
    """What `lift-fast train` says of a run that is complete."""

    loss: list[Number | None]
    images_per_s: float
    seconds: float
    skipped_pictures: Count
    skipped_causes: dict[str, Count]
    skipped_met: Count
    skipped: list[_Skipped]


class _Needed(TypedDict):
    model: Literal["lift", "clip"]
    preset: str


class _Run(_Needed, total=False):
    """The types of what is used of run.json."""

    vit: VitConfig
    text: TextConfig
    preprocessing: dict[str, Any]
    text_dim: int
    embed_dim: int
    context: int
    encoder: EncoderSpec | None
    rotation: dict[str, Any] | None
    conditioning: dict[str, Any] | None
    codec: str
    config: _Config
    field: str
    read: dict[str, Any]
    captions: Count
    samples_seen: Count
    params: Count
    ranks: Count
    device: str
    precision: Literal["bf16", "fp32"]
    machine: _Machine | None
    versions: dict[str, str]
    step_ms: float
    step_ms_spread: float
    images_per_s: float
    seconds: float
    peak_memory_bytes: Count | None
    loss: list[Number | None]
    best: _Best | None
    skipped_steps: Count
    skipped_pictures: Count
    skipped_met: Count
    skipped_causes: dict[str, Count]
    skipped: list[_Skipped]


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
    try:
        foreign.check(run, _Run)
        for name in {"lift": ("text_dim",), "clip": ("context",)}[run["model"]]:
            if name not in run:
                raise ValueError(f"it has no {name}")
        for name in ("text_dim", "embed_dim", "context"):
            check_size(name, run.get(name, 1))
        if "context" in run.get("text", ()):
            raise ValueError("its text has a context of its own")
        if run.get("encoder") is not None:
            spec = EncoderSpec(**run["encoder"])
            if not run["encoder"].get("name") or "\0" in spec.name:
                raise ValueError("its encoder has no name")
        if run.get("conditioning") is not None:
            Conditioning.check(run["conditioning"])
        if run.get("rotation") is not None:
            Rotation.check(run["rotation"])
    except (ValueError, CacheError, ConfigError) as error:
        raise ConfigError(f"this model's description: {error}") from error


def empty(run: Any) -> Lift | Clip:
    """The model of a description that was read from a file, with weights of no meaning, until nn.fill gives it some.

    Raises ConfigError for a description that is not valid.
    """
    check(run)
    try:
        with _NoInitialisation():
            return build(run)
    except (RuntimeError, MemoryError, OverflowError) as error:  # torch's, for memory that is not there
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
        remove_abandoned(folder)
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
    """The content of run.json. Raises DataError when the file is missing or is not JSON, ConfigError as `check`."""
    file = Path(folder) / "run.json"
    if not file.is_file():
        raise DataError(f"no finished run in {folder}: it has no run.json; train one with: lift-fast train")
    try:
        run = foreign.read_json(file)
    except (OSError, ValueError) as error:
        raise DataError(f"{file} is damaged ({error}); train again with: lift-fast train") from error
    try:
        check(run)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error
    return run


def read_finished(folder: Path) -> dict[str, Any]:
    """The same of a run that training has ended, with the figures that it ends with. Raises as read_description."""
    run = read_description(folder)
    try:
        foreign.check(run, _Finished)
    except ValueError as error:
        raise ConfigError(f"{folder}: this model's description: {error}") from error
    return run


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
        fill(model, read_tensors(Path(folder) / "model.safetensors"))
    except (OSError, ValueError, RuntimeError) as error:
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
    *,
    download: bool = False,
) -> EncodeText:
    """The same of the frozen encoder that "encoder", "text_dim", "conditioning" and "rotation" of a run describe.

    download: as of text.repository.locate.

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
    recorded = EncoderSpec.of_dict(run["encoder"])
    spec = replace(recorded, trust_remote_code=trust_remote_code)
    if recorded.trust_remote_code and not trust_remote_code:
        code = "; ".join(code_of(spec, locate(spec, download=download)[0])) or "now none"
        raise ConfigError(
            f"{spec.name} runs code from its repository ({code}); read it, then allow it with --trust-remote-code"
        )
    encoder = Encoder(spec, device=device, download=download)
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
