"""Chooses a device and the precision to compute in."""

import torch

from .errors import ConfigError
from .ranks import Rank


def pick_device(name: str) -> torch.device:
    """The device that a `--device` option names: auto (a GPU if torch sees one, else the CPU), cpu, cuda or cuda:N.

    Raises ConfigError for any other name and for a GPU that torch does not see.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")  # refused below
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"no device {name!r}; use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device {name!r} is not available: torch sees {torch.cuda.device_count()} GPUs")
    return device


def device_of_rank(name: str, rank: Rank, threads: int | None) -> torch.device:
    """The device that a `--device` option names, for a rank: with several ranks "cuda", and "auto" where there are
    GPUs, are the GPU of the rank's number on its machine, which becomes torch's current one.

    threads: CPU threads of torch from now on; None: as they are. Raises ConfigError as pick_device.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    device = pick_device(name)
    if device.type == "cuda" and rank.world > 1:
        device = pick_device(f"cuda:{rank.local}") if device.index is None else device
        torch.cuda.set_device(device)
    return device


def gpu_index(device: torch.device) -> int | None:
    """The index of a GPU: of the current one for "cuda" without an index; None for the CPU."""
    if device.type != "cuda":
        return None
    return torch.cuda.current_device() if device.index is None else device.index


def use_bf16(precision: str, device: torch.device) -> bool:
    """Whether to autocast to bfloat16. precision: bf16, fp32, or auto: bf16 if the processor multiplies it natively."""
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
