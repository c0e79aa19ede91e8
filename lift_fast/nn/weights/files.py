"""Reads state dicts from files, and fields of VitConfig from the configuration file in the same folder."""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor

from ... import foreign
from ...errors import ConfigError
from ...files import open_regular
from ..config import preset
from ..tensors import LONGEST_NAME, read_tensors
from .torchscript import check_stored, is_archive, read_archive

# The weights that are looked for in a folder, in this order, and the configuration file of each. Each may also be cut
# into shards, which the file of this name with ".index.json" lists.
_FOLDER = {
    "model.safetensors": "config.json",
    "pytorch_model.bin": "config.json",
    "open_clip_model.safetensors": "open_clip_config.json",
    "open_clip_pytorch_model.bin": "open_clip_config.json",
}

_INDEX = ".index.json"
_PICKLES = (".pt", ".pth", ".bin", ".ckpt")
_RUN = "run.json"  # of a run of lift-fast, see run_folder.py

# A file of `size` bytes may have tensors of so many times `size + _SMALL` bytes: some layers may share theirs.
_MOST_SHARED, _SMALL = 4, 1 << 20

_HF_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "quick_gelu": "quick_gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
_OPEN_CLIP_POOLS = {"tok": "cls", "avg": "avg"}
_TIMM_POOLS = {"token": "cls", "avg": "avg"}


class _ShardIndex(TypedDict):
    """An index of shards, as transformers writes it."""

    weight_map: dict[str, str]


def read(path: str | Path) -> dict[str, Tensor]:
    """Reads the state dict of a file, or of a folder with one, onto the CPU. Never runs code from the file.

    Accepts .safetensors; .pt, .pth, .bin and .ckpt with torch's weights_only, which refuses pickles of anything but
    tensors and plain values; TorchScript archives, of which only the tensors are read; and a .index.json with all the
    shards that it lists. A dict under "state_dict" or "model" is unwrapped, and the prefixes "module." of
    DistributedDataParallel and "_orig_mod." of torch.compile are removed from the keys, the latter at every place.

    Raises ConfigError when there is no such file, or it is damaged, refused or has no state dict of plain tensors.
    """
    path = files_of(path)[0]
    state = _whole(path) if path.name.endswith(_INDEX) else _file(path)
    plain = {_unwrapped(key): tensor for key, tensor in state.items()}
    if len(plain) != len(state):
        raise ConfigError(f"{path}: neither a state dict nor a dict with one: some keys differ in _orig_mod only")
    while plain and all(key.startswith("module.") for key in plain):
        plain = {key.removeprefix("module."): tensor for key, tensor in plain.items()}
    return plain


def files_of(path: str | Path) -> list[Path]:
    """The file of weights at `path`, which in a folder is the first of the usual names; its shards, if it is an index;
    and then the configuration file of the folder, if it has one of another project.

    Raises ConfigError when there are no weights.
    """
    path = Path(path)
    found = [path / name for name in _pair(path)] if path.is_dir() else [path]
    if not found[0].is_file():
        raise ConfigError(f"{path}: no such file")
    shards = sorted(set(_index(found[0]).values())) if found[0].name.endswith(_INDEX) else []
    return [found[0], *(found[0].parent / name for name in shards), *(file for file in found[1:] if file.is_file())]


def config_fields(path: str | Path) -> dict[str, Any]:
    """The fields of VitConfig that the configuration file of a folder determines; of a run of lift-fast also when
    `path` is its model.safetensors. Empty where there is none. Raises ConfigError."""
    path = Path(path)
    file = run_of(path) or (path / _pair(path)[1] if path.is_dir() else None)
    if file is None or not file.is_file():
        return {}
    try:
        settings = foreign.read_json(file)
        if file.name == _RUN:
            found = _own(settings)
        elif "model_cfg" in settings:
            found = _open_clip(settings["model_cfg"])
        elif "architecture" in settings:  # timm's
            found = {"pool": _TIMM_POOLS[settings["global_pool"]]} if settings.get("global_pool") else {}
        else:
            found = _hugging_face(path)
        if not isinstance(found.get("heads", 1), int) or found.get("heads", 1) < 1:
            raise ValueError(f"{found['heads']} heads")
        if not isinstance(found.get("norm_eps", 0.0), (int, float)):
            raise ValueError(f"a layernorm's epsilon of {found['norm_eps']!r}")
    except Exception as error:  # a file of another kind or of another project may cause any
        raise ConfigError(
            f"{file}: not the configuration of a ViT that this tower computes ({error!r:.300})"
        ) from error
    return found


def run_of(path: Path) -> Path | None:
    """The run.json of the run of lift-fast at `path`, its folder or model.safetensors; None for other weights."""
    file = (path.parent if path.name == "model.safetensors" else path) / _RUN
    return file if file.is_file() else None


def may_hold_weights(path: Path) -> bool:
    """Whether `read` takes a path, by its name or by the names of the files in it."""
    if path.is_dir():
        return _weights_in(path) is not None
    return path.is_file() and (path.suffix in (".safetensors", *_PICKLES) or path.name.endswith(_INDEX))


def _weights_in(folder: Path) -> tuple[str, str] | None:
    """The names of a folder's weights, or of their index, and of its configuration file; None without weights."""
    names = [(weights, config) for name, config in _FOLDER.items() for weights in (name, name + _INDEX)]
    return next((pair for pair in names if (folder / pair[0]).is_file()), None)


def _pair(folder: Path) -> tuple[str, str]:
    """The same. Raises ConfigError when the folder has no weights."""
    if (pair := _weights_in(folder)) is None:
        raise ConfigError(f"{folder}: none of {', '.join(_FOLDER)}; name the file itself")
    return pair


def _whole(index: Path) -> dict[str, Tensor]:
    """The state dict of all shards that an index lists. Raises ConfigError."""
    entries = _index(index)
    state: dict[str, Tensor] = {}
    for name in sorted(set(entries.values())):
        shard = _file(index.parent / name)
        wanted = {key for key, file in entries.items() if file == name}
        if wanted != shard.keys():
            raise ConfigError(
                f"{index}: it lists other tensors in {name} than that shard has ({min(wanted ^ shard.keys())}); copy "
                "the folder again"
            )
        state |= shard
    return state


def _index(path: Path) -> dict[str, str]:
    """Key -> name of its shard. Raises ConfigError for a damaged index, and for a shard that is missing or lies outside
    of the folder."""
    try:
        content = foreign.read_json(path)
        foreign.check(content, _ShardIndex)
        entries: dict[str, str] = content["weight_map"]
        if not entries:
            raise ValueError("its weight_map names no files")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not a complete index of shards ({error}); copy it again") from error
    for name in set(entries.values()):
        if name in ("", ".", "..") or re.search(r"[/\\:\0]", name):
            raise ConfigError(f"{path}: it lists {name!r}, which is not the name of a file in this folder; correct it")
        if not (path.parent / name).is_file():
            raise ConfigError(f"{path}: the shard {name} is missing; copy the whole folder")
    return entries


def _file(path: Path) -> dict[str, Tensor]:
    """The state dict of one file, with the keys that it has there. Raises ConfigError."""
    state: Any
    if path.suffix == ".safetensors":
        try:
            state = read_tensors(path)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path}: not a complete safetensors file ({error}); copy it again") from error
    elif path.suffix in _PICKLES:
        try:
            open_regular(path).close()
            check_stored(path)
            state = read_archive(path) if is_archive(path) else torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged or hostile pickle may raise anything
            raise ConfigError(
                f"{path}: cut short, or a pickle of more than tensors and plain values, which could run code and was "
                "refused. If you trust it, load it yourself and save its state_dict as .safetensors "
                f"({type(error).__name__}: {str(error).partition(chr(10))[0][:300]})"
            ) from error
    else:
        raise ConfigError(f"{path}: must be .safetensors, .pt, .pth, .bin or .ckpt, or a folder with such a file")
    for key in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not all(isinstance(t, Tensor) for t in state.values()):
        raise ConfigError(f"{path}: neither a state dict nor a dict with one under 'state_dict' or 'model'")
    if problem := _not_plain(state, path.stat().st_size):
        raise ConfigError(f"{path}: not tensors as a model has them ({problem}); save its state_dict as .safetensors")
    return dict(state)


def _not_plain(state: Mapping[Any, Tensor], size: int) -> str:
    """What of a state dict's tensors is not in the file, of `size` bytes, as plain numbers, in words; "" for none."""
    total = 0
    for key, tensor in state.items():
        if not isinstance(key, str):
            return f"a key is no text but a {type(key).__name__}"
        if len(key) > LONGEST_NAME:
            return f"a key has more than {LONGEST_NAME} characters"
        if tensor.device.type != "cpu" or tensor.layout != torch.strided or tensor.is_quantized:
            return f"{key} is on {tensor.device.type}, {tensor.layout}{', quantized' * tensor.is_quantized}"
        total += tensor.numel() * tensor.element_size()
        if total > _MOST_SHARED * (size + _SMALL):  # they share storages, or repeat one by a stride of 0
            return f"{key} and those before it have {total} bytes, and the file {size}"
    return ""


def _unwrapped(key: str) -> str:
    return ".".join(part for part in key.split(".") if part != "_orig_mod")


def _own(run: Mapping) -> dict[str, Any]:
    vit = replace(preset(run["preset"]).vit, **run.get("vit", {}))
    return {name: getattr(vit, name) for name in ("heads", "activation", "norm_eps", "pool", "norm_after_pool")}


def _open_clip(model: Mapping) -> dict[str, Any]:
    vision = model["vision_cfg"]
    if vision.get("timm_model_name"):
        return {}
    tanh = (vision.get("act_kwargs") or {}).get("approximate") == "tanh"
    return {
        "heads": vision.get("width", 768) // vision.get("head_width", 64),
        "activation": "quick_gelu" if model.get("quick_gelu") else "gelu_tanh" if tanh else "gelu",
        "norm_eps": (vision.get("norm_kwargs") or {}).get("eps", 1e-5),
        "pool": _OPEN_CLIP_POOLS[vision.get("pool_type", "tok")],
        "norm_after_pool": bool(vision.get("final_ln_after_pool")),
    }


def _hugging_face(folder: Path) -> dict[str, Any]:
    from transformers import AutoConfig  # not at the top: the import takes seconds

    # With the defaults that the file omits.
    config = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    config = getattr(config, "vision_config", config)
    return {
        "heads": config.num_attention_heads,
        "activation": _HF_ACTIVATIONS[config.hidden_act],
        "norm_eps": config.layer_norm_eps,
    }
