"""Gather rows of int8 codes and widen them: what turns a text cache's rows into a tensor."""

import os
from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import BackendError

try:
    from .. import _C
except ImportError:  # a source tree that nobody built
    _C = None  # type: ignore[assignment]

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # and `Out` of csrc/ops.h


def reference(codes: Tensor, scales: Tensor, rows: Tensor | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """The definition: codes[rows] · scales[rows], computed in float32, rounded once to dtype.

    With float64 scales and dtype it is computed in float64. The rows are gathered before they are widened.
    """
    if rows is not None:
        codes, scales = codes.index_select(0, rows), scales.index_select(0, rows)
    return (codes.to(scales.dtype) * scales[:, None]).to(dtype)


def dequant(
    codes: Tensor,
    scales: Tensor,
    rows: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    backend: str | None = None,
) -> Tensor:
    """codes[rows] · scales[rows] as [m, dim], or all n rows without `rows`; the same bits on every backend.

    codes: int8 [n, dim], any strides. scales: float32 [n]. rows: int64 [m], any order, repeats allowed.
    All on one device. dtype: float32, bfloat16 or float16, rounded to nearest even from the float32 product.
    backend: "cpp" or "torch" on the CPU; "cuda", "triton" or "torch" on a GPU; None: the first that is here.

    No gradient: codes are integers, and the scales belong to a table that nobody trains.

    Raises IndexError for a row outside the table on the CPU; on a GPU such a row is NaN ("cuda", "triton"),
    since raising would make the host wait. Raises ValueError for shapes, dtypes and devices that do not fit,
    and BackendError for a backend that is not here.
    """
    _check(codes, scales, rows, dtype)
    return torch.ops.lift_fast.dequant(codes, scales, rows, dtype, backend or "")


@torch.library.custom_op(
    "lift_fast::dequant",
    mutates_args=(),
    schema="(Tensor codes, Tensor scales, Tensor? rows, ScalarType dtype, str backend) -> Tensor",
)
def _dequant(codes: Tensor, scales: Tensor, rows: Tensor | None, dtype: torch.dtype, backend: str) -> Tensor:
    launch = _choose(codes.device.type, backend)
    m, dim = len(codes) if rows is None else len(rows), codes.shape[1]
    if m and rows is not None and not len(codes):
        raise IndexError(f"{m} rows asked of an empty table")
    if dim > 1 and codes.stride(1) != 1:
        # Only what is asked for becomes contiguous: the table may be larger than memory.
        if rows is None:
            codes = codes.contiguous()
        else:
            _refuse_outside(rows, len(codes))
            codes, scales, rows = codes.index_select(0, rows), scales.index_select(0, rows), None
    out = torch.empty((m, dim), dtype=dtype, device=codes.device)
    if out.numel():
        launch(codes, scales, None if rows is None else rows.contiguous(), out)
    elif rows is not None:
        _refuse_outside(rows, len(codes))
    return out


@_dequant.register_fake
def _(codes: Tensor, scales: Tensor, rows: Tensor | None, dtype: torch.dtype, backend: str) -> Tensor:
    return codes.new_empty((codes if rows is None else rows).shape[:1] + codes.shape[1:], dtype=dtype)


def _check(codes: Tensor, scales: Tensor, rows: Tensor | None, dtype: torch.dtype) -> None:
    if codes.dim() != 2 or codes.dtype != torch.int8:
        raise ValueError(f"codes must be int8 [n, dim], not {codes.dtype} {list(codes.shape)}")
    if scales.shape != codes.shape[:1] or scales.dtype != torch.float32:
        raise ValueError(
            f"scales must be float32 [{codes.shape[0]}], one a row, not {scales.dtype} {list(scales.shape)}"
        )
    if rows is not None and (rows.dim() != 1 or rows.dtype != torch.int64):
        raise ValueError(f"rows must be int64 [m], not {rows.dtype} {list(rows.shape)}")
    if scales.device != codes.device or (rows is not None and rows.device != codes.device):
        devices = [str(tensor.device) for tensor in (codes, scales, rows) if tensor is not None]
        raise ValueError(f"codes, scales and rows must be on one device, not {', '.join(devices)}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be float32, bfloat16 or float16, not {dtype}")


def _refuse_outside(rows: Tensor, n: int) -> None:
    """IndexError for a row outside n on the CPU; a GPU's own index check does it without a wait."""
    if rows.device.type != "cpu":
        return
    bad = ((rows < 0) | (rows >= n)).nonzero()
    if len(bad):
        first = int(bad[0])
        raise IndexError(f"rows[{first}] is {int(rows[first])}, outside a table of {n} rows")


# A backend fills `out` [m, dim], not empty and contiguous; codes' last dimension and rows are contiguous.
Launch = Callable[[Tensor, Tensor, Tensor | None, Tensor], None]


def _job(codes: Tensor, scales: Tensor, rows: Tensor | None, out: Tensor) -> dict[str, int]:
    """The job of csrc/ops.h, in addresses and counts."""
    m, dim = out.shape
    return {
        "codes": codes.data_ptr(),
        "scales": scales.data_ptr(),
        "rows": 0 if rows is None else rows.data_ptr(),
        "out": out.data_ptr(),
        "n": len(codes),
        "m": m,
        "dim": dim,
        "codes_stride": codes.stride(0),
        "scales_stride": scales.stride(0),
        "type": DTYPES[out.dtype],
    }


def _cpp(codes: Tensor, scales: Tensor, rows: Tensor | None, out: Tensor) -> None:
    _C.dequant_cpu(**_job(codes, scales, rows, out), threads=torch.get_num_threads(), isa="")


def _cuda(codes: Tensor, scales: Tensor, rows: Tensor | None, out: Tensor) -> None:
    stream = torch.cuda.current_stream(codes.device).cuda_stream
    _C.dequant_cuda(**_job(codes, scales, rows, out), device=codes.device.index, stream=stream)


def _triton(codes: Tensor, scales: Tensor, rows: Tensor | None, out: Tensor) -> None:
    from ..kernels.dequant import dequant as launch

    with torch.cuda.device_of(codes):
        launch(codes, scales, rows, out)


def _torch(codes: Tensor, scales: Tensor, rows: Tensor | None, out: Tensor) -> None:
    if rows is not None:
        _refuse_outside(rows, len(codes))
    out.copy_(reference(codes, scales, rows, out.dtype))


def _why_no_cpp() -> str | None:
    return None if _C else "lift_fast._C is not built; run `pip install -e .` in the source tree"


def _why_no_cuda() -> str | None:
    if _C is None or not _C.build_info()["cuda"]:
        why = _C.build_info()["reason"] if _C else "lift_fast._C is not built"
        return f"{why}; install again with LIFT_FAST_CUDA=1 and a CUDA toolkit"
    if not _C.cuda_device_count():
        return "its CUDA runtime finds no GPU, or the driver is older than it"
    archs = _C.build_info()["archs"]
    for device in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(device)
        if not _serves(archs.split(";"), (major, minor)):
            here = f"{torch.cuda.get_device_name(device)} has compute capability {major}.{minor}"
            wanted = f'LIFT_FAST_CUDA=1 LIFT_FAST_CUDA_ARCHS="{major}{minor}"'
            return f"{here}, and lift_fast._C is compiled for {archs}; install again with {wanted}"
    return None


def _serves(archs: list[str], capability: tuple[int, int]) -> bool:
    """Whether a build for archs, made as setup.py makes it, has code for a GPU of this (major, minor).

    Machine code serves its own major from its minor on; of "90a" only 9.0. The PTX of the last, without its
    a or f, serves everything from there on.
    """
    for arch in archs:
        least = divmod(int(arch.rstrip("af")), 10)
        if capability == least or (not arch.endswith("a") and capability[0] == least[0] and capability > least):
            return True
    return capability >= divmod(int(archs[-1].rstrip("af")), 10)


def _why_no_triton() -> str | None:
    try:
        import triton  # noqa: F401
    except ImportError:
        return "triton is not installed; a CUDA build of torch brings it, or `pip install triton`"
    return None


# device -> backends in order of preference: name -> (launch, why it is not here)
_BACKENDS: dict[str, dict[str, tuple[Launch, Callable[[], str | None]]]] = {
    "cpu": {"cpp": (_cpp, _why_no_cpp), "torch": (_torch, lambda: None)},
    "cuda": {
        "cuda": (_cuda, _why_no_cuda),
        "triton": (_triton, _why_no_triton),
        "torch": (_torch, lambda: None),
    },
}
_chosen: dict[tuple[str, str], Launch] = {}


def _choose(device: str, backend: str) -> Launch:
    """The launcher for a device, the named one or the first that is here. Raises BackendError."""
    if (device, backend) not in _chosen:
        offered = dict(_BACKENDS.get(device, {"torch": (_torch, lambda: None)}))
        if device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
            offered["triton"] = (_triton, _why_no_triton)
        if backend and backend not in offered:
            raise BackendError(f"dequant has no backend {backend!r} on {device}; it has {', '.join(offered)}")
        for name in [backend] if backend else offered:
            launch, why_not = offered[name]
            reason = why_not()
            if reason is None:
                _chosen[device, backend] = launch
                break
        else:
            raise BackendError(f"dequant's backend {backend!r} is not here: {reason}")
    return _chosen[device, backend]
