"""python -m benchmarks.lease.machine: prints a description of this machine as JSON; exit status 2 without a GPU."""

import json
import shutil
import sys
from typing import Any

from ..start import begin

TOOLS = "nvcc", "ncu", "compute-sanitizer"


def describe() -> dict[str, Any]:
    """{"device", "arch", "capability", "cores", "versions", "tools", ...}. Raises RuntimeError without a GPU."""
    import torch

    from lift_fast.measure.machine import machine, versions

    if not torch.cuda.is_available():
        raise RuntimeError(f"torch {torch.__version__} of {sys.executable} finds no CUDA GPU here")
    properties = torch.cuda.get_device_properties(0)
    major, minor = torch.cuda.get_device_capability(0)
    return {
        **machine(),
        "device": torch.cuda.get_device_name(0),
        "capability": f"sm_{major}{minor}",
        "arch": f"{major}{minor}{'a' if major >= 9 else ''}",
        "memory": getattr(properties, "total_memory", None),
        "multiprocessors": getattr(properties, "multi_processor_count", None),
        "l2": getattr(properties, "L2_cache_size", None),
        "cuda": torch.version.cuda,
        "versions": versions(),
        "tools": [tool for tool in TOOLS if shutil.which(tool)],
    }


def main() -> int:
    try:
        begin()
        description = describe()
    except ModuleNotFoundError as error:
        print(f"make gpu: {sys.executable} has no {error.name}; choose a Python that has it: make gpu PYTHON=…")
        return 2
    except RuntimeError as error:
        print(f"make gpu: {error}")
        return 2
    print(json.dumps(description))
    return 0


if __name__ == "__main__":
    sys.exit(main())
