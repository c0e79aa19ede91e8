# csrc/bindings.cpp. Pointers and streams are integers; see csrc/ops.h for shapes.
from typing import Any

def build_info() -> dict[str, Any]: ...
def isa_levels() -> list[str]: ...
def dequant_cpu(
    codes: int, scales: int, rows: int, out: int, n: int, m: int, dim: int, codes_stride: int,
    scales_stride: int, type: int, threads: int, isa: str = "",
) -> None: ...  # fmt: skip
def dequant_cuda(
    codes: int, scales: int, rows: int, out: int, n: int, m: int, dim: int, codes_stride: int,
    scales_stride: int, type: int, device: int, stream: int,
) -> None: ...  # fmt: skip
def cuda_device_count() -> int: ...
