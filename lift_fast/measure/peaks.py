"""How fast a device multiplies matrices, by its datasheet and as measured, and the fraction of that a step reaches.

MFU, model FLOPs utilisation (Chowdhery et al., arXiv 2204.02311, appendix B), counts the FLOPs that the model needs
(flops.py), without those that recomputing activations adds.
"""

import re
from collections.abc import Callable
from typing import Any

import torch

# Pattern in the device name that CUDA reports (the first match counts), dense FLOP/s in bf16 and in fp8 with sums in
# float32. Datasheets print twice as much, with sparsity.
PEAKS: tuple[tuple[str, float, float | None], ...] = (
    (r"\bA100\b", 312e12, None),  # NVIDIA A100 Tensor Core GPU datasheet
    (r"\bH100 PCIe\b", 756e12, 1513e12),  # NVIDIA H100 Tensor Core GPU Architecture, table 3
    (r"\bH100 NVL\b", 835.5e12, 1671e12),  # its datasheet
    (r"\bH100\b", 989.4e12, 1978.9e12),  # H100 SXM, reported as "NVIDIA H100 80GB HBM3"; source as for PCIe
    (r"\bH200 NVL\b", 835.5e12, 1671e12),  # its datasheet
    (r"\bH200\b", 989.4e12, 1978.9e12),  # its datasheet
    (r"\bB200\b", 2250e12, 4500e12),  # NVIDIA DGX B200 datasheet, an eighth
    (r"\bL40S\b", 362.05e12, 733e12),  # its datasheet
    (r"\bRTX 4090$", 165.2e12, 330.3e12),  # not the 4090 D or the laptop's; NVIDIA Ada GPU Architecture, appendix A
)
GEMM_SIZE = {"cuda": 8192, "cpu": 2048}


def peak(device_name: str, dtype: str = "bf16") -> float | None:
    """FLOP/s by the datasheet; None for a device or dtype that is not in PEAKS.

    device_name: from torch.cuda.get_device_name(). dtype: "bf16" or "fp8".
    """
    for pattern, bf16, fp8 in PEAKS:
        if re.search(pattern, device_name, re.IGNORECASE):
            return {"bf16": bf16, "fp8": fp8}.get(dtype)
    return None


def gemm(
    device: str | torch.device = "cpu", dtype: torch.dtype = torch.bfloat16, size: int | None = None
) -> tuple[Callable[[], Any], int]:
    """A call of torch.mm on two random square matrices, with preallocated output, and its FLOPs.

    size: rows and columns; None takes the device's GEMM_SIZE.
    """
    size = size or GEMM_SIZE[torch.device(device).type]
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    return lambda: torch.mm(left, right, out=out), 2 * size**3


def mfu(flops: float, seconds: float, rate: float) -> float:
    """The fraction of `rate` (FLOP/s) that `flops` in `seconds` reach."""
    return flops / seconds / rate
