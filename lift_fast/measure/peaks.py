"""How fast a device multiplies matrices, by its datasheet and as measured, and what fraction of that a step reaches.

MFU, model FLOPs utilisation (Chowdhery et al., arXiv 2204.02311, appendix B), counts the FLOPs that the model asks
for (flops.py), not those that an implementation spends on computing activations again.
"""

import re
from collections.abc import Callable
from typing import Any

import torch

# Dense FLOP/s (datasheets print twice as much, with sparsity), sums in float32:
# A100: NVIDIA A100 Tensor Core GPU datasheet. H100 SXM, PCIe: NVIDIA H100 Tensor Core GPU Architecture, table 3.
# H100 NVL, H200, H200 NVL: their datasheets. B200: NVIDIA DGX B200 datasheet, an eighth. L40S: its datasheet.
# RTX 4090: NVIDIA Ada GPU Architecture, appendix A.
PEAKS: dict[str, dict[str, float]] = {
    "A100": {"bf16": 312e12},
    "H100 SXM": {"bf16": 989.4e12, "fp8": 1978.9e12},
    "H100 PCIe": {"bf16": 756e12, "fp8": 1513e12},
    "H100 NVL": {"bf16": 835.5e12, "fp8": 1671e12},
    "H200": {"bf16": 989.4e12, "fp8": 1978.9e12},
    "H200 NVL": {"bf16": 835.5e12, "fp8": 1671e12},
    "B200": {"bf16": 2250e12, "fp8": 4500e12},
    "L40S": {"bf16": 362.05e12, "fp8": 733e12},
    "RTX 4090": {"bf16": 165.2e12, "fp8": 330.3e12},
}

# What CUDA calls the device -> the name above; the first that is found in it. SXM is not in the H100's own name:
# "NVIDIA H100 80GB HBM3".
_NAMES = (
    (r"\bA100\b", "A100"),
    (r"\bH100 PCIe\b", "H100 PCIe"),
    (r"\bH100 NVL\b", "H100 NVL"),
    (r"\bH100\b", "H100 SXM"),
    (r"\bH200 NVL\b", "H200 NVL"),
    (r"\bH200\b", "H200"),
    (r"\bB200\b", "B200"),
    (r"\bL40S\b", "L40S"),
    (r"\bRTX 4090$", "RTX 4090"),  # neither the 4090 D nor the laptop's
)
GEMM_SIZE = {"cuda": 8192, "cpu": 2048}


def peak(device_name: str, dtype: str = "bf16") -> float | None:
    """FLOP/s by the datasheet of torch.cuda.get_device_name(); None for a device or dtype that is not in PEAKS."""
    for pattern, name in _NAMES:
        if re.search(pattern, device_name, re.IGNORECASE):
            return PEAKS[name].get(dtype)
    return None


def gemm(
    device: str | torch.device = "cpu", dtype: torch.dtype = torch.bfloat16, size: int | None = None
) -> tuple[Callable[[], Any], int]:
    """torch.mm of two random square matrices into a third, as a call, and its FLOPs."""
    size = size or GEMM_SIZE[torch.device(device).type]
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    return lambda: torch.mm(left, right, out=out), 2 * size**3


def mfu(flops: float, seconds: float, rate: float) -> float:
    """The fraction of `rate` (FLOP/s) at which `flops` were done in `seconds`."""
    return flops / seconds / rate
