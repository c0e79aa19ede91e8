"""Reads state dicts from files, and fields of VitConfig from the configuration file in the same folder."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ...errors import ConfigError

# The weights that are looked for in a folder, in this order, and the configuration file of each.
_FOLDER = {
    "model.safetensors": "config.json",
    "pytorch_model.bin": "config.json",
    "open_clip_model.safetensors": "open_clip_config.json",
    "open_clip_pytorch_model.bin": "open_clip_config.json",
}

_HF_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "quick_gelu": "quick_gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
_OPEN_CLIP_POOLS = {"tok": "cls", "avg": "avg"}
_TIMM_POOLS = {"token": "cls", "avg": "avg"}


def read(path: str | Path) -> dict[str, Tensor]:
    """Reads the state dict of a file, or of a folder with one, onto the CPU. Never runs code from the file.

    Accepts .safetensors, and .pt, .pth, .bin and .ckpt with torch's weights_only, which refuses pickles of anything but
    tensors and plain values. A dict under "state_dict" or "model" is unwrapped, and the prefixes "module." and
    "_orig_mod." (of DistributedDataParallel and torch.compile) are removed from the keys.

    Raises ConfigError when there is no such file, or it is damaged, refused or has no state dict.
    """
    path = files_of(path)[0]
    state: Any
    if path.suffix == ".safetensors":
        try:
            state = load_file(path)
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"{path}: not a complete safetensors file ({error}); copy it again") from error
    elif path.suffix in (".pt", ".pth", ".bin", ".ckpt"):
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged or hostile pickle may raise anything
            raise ConfigError(
                f"{path}: cut short, or a pickle of more than tensors and plain values, which could run code and was "
                "refused. If you trust it, load it yourself and save its state_dict as .safetensors "
                f"({type(error).__name__}: {str(error).partition(chr(10))[0]})"
            ) from error
    else:
        raise ConfigError(f"{path}: must be .safetensors, .pt, .pth, .bin or .ckpt, or a folder with such a file")
    for key in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not all(isinstance(t, Tensor) for t in state.values()):
        raise ConfigError(f"{path}: neither a state dict nor a dict with one under 'state_dict' or 'model'")
    state = {str(key): tensor for key, tensor in state.items()}
    for prefix in ("module.", "_orig_mod."):
        if state and all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): tensor for key, tensor in state.items()}
    return state


def files_of(path: str | Path) -> list[Path]:
    """The file of weights at `path`, which in a folder is the first of the usual names, and then the configuration file
    of the folder, if it has one. Raises ConfigError when there are no weights.
    """
    path = Path(path)
    found = [path / name for name in _pair(path)] if path.is_dir() else [path]
    if not found[0].is_file():
        raise ConfigError(f"{path}: no such file")
    return [file for file in found if file.is_file()]


def config_fields(path: str | Path) -> dict[str, Any]:
    """The fields of VitConfig that a folder's configuration file determines; empty for a file. Raises ConfigError."""
    path = Path(path)
    file = path / _pair(path)[1] if path.is_dir() else path
    if not path.is_dir() or not file.is_file():
        return {}
    try:
        settings = json.loads(file.read_text())
        if "model_cfg" in settings:
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
        raise ConfigError(f"{file}: not the configuration of a ViT that this tower computes ({error!r})") from error
    return found


def _pair(folder: Path) -> tuple[str, str]:
    """The names of a folder's weights file and of its configuration file. Raises ConfigError when it has no weights."""
    for pair in _FOLDER.items():
        if (folder / pair[0]).is_file():
            return pair
    raise ConfigError(f"{folder}: none of {', '.join(_FOLDER)}; name the file itself")


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
