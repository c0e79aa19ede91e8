"""Gather rows of a quantized table and widen them: what turns a text cache's rows into a tensor."""

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...errors import BackendError
from ..backends import _C, DTYPES, address, launch_on, why_no_cpp, why_no_cuda, why_no_triton
from .codecs import CODECS, Codec


def reference(
    codes: Tensor,
    scales: Tensor | None,
    rows: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    *,
    codec: str = "int8",
    dim: int | None = None,
    normalize: bool = False,
) -> Tensor:
    """The definition: value(codes[rows]) · scales[rows], computed in float32, rounded once to dtype.

    With dtype float64 it is computed in float64. The rows are gathered before they are widened.
    """
    kind = CODECS[codec]
    values = _values(codes if rows is None else _take(codes, rows), kind, dim)
    if dtype == torch.int8:
        return values
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    if normalize:
        squares = values.to(torch.float64).square().sum(1, keepdim=True)
        # Integers' squares are summed exactly, and the float32 root rounded correctly, as torch's own is not on every
        # CPU: the same bits wherever division is IEEE's.
        exact = wide if kind.integer else torch.float64
        lengths = squares.to(exact).to(torch.float64).sqrt().to(exact)
        factors = torch.where(squares == 0, 0.0, lengths.reciprocal())
        return (values.to(exact) * factors).to(wide).to(dtype)
    if scales is None:
        return values.to(wide).to(dtype)
    scales = scales if rows is None else scales.index_select(0, rows)
    return (values.to(wide) * scales.to(wide)[:, None]).to(dtype)


def _values(codes: Tensor, codec: Codec, dim: int | None) -> Tensor:
    """What the codes stand for: int8 [m, dim] for the integer codecs, else float32."""
    if not codec.integer:
        return codes.to(torch.float32)
    if not codec.packed:
        return codes
    shifts = torch.arange(0, 8, codec.bits, dtype=torch.uint8, device=codes.device)
    fields = (codes[:, :, None] >> shifts & (1 << codec.bits) - 1).flatten(1)[:, :dim]
    return torch.tensor(codec.levels, dtype=torch.int8, device=codes.device)[fields.long()]


def _take(codes: Tensor, rows: Tensor) -> Tensor:
    if codes.dtype == torch.float8_e4m3fn:  # of which not every torch selects rows
        return codes.view(torch.uint8).index_select(0, rows).view(codes.dtype)
    return codes.index_select(0, rows)


def dequant(
    codes: Tensor,
    scales: Tensor | None,
    rows: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    backend: str | None = None,
    *,
    codec: str = "int8",
    dim: int | None = None,
    normalize: bool = False,
) -> Tensor:
    """The vectors of codes[rows] as [m, dim], or of all n rows without `rows`; the same bits on every backend.

    codes: [n, columns] as codecs.py describes them, any strides: int8, float8_e4m3fn, float32 or bfloat16
    [n, dim], or for "int4r" and "int2r" uint8 [n, ceil(dim · bits / 8)], whose dim must be given.
    scales: float32 [n]; None for "f32" and "bf16", which have none.
    rows: int64 [m], any order, repeats allowed.
    dtype: float32, bfloat16 or float16, rounded to nearest even from the float32 product of value and scale; or, of
    integer codecs, int8: the integers alone, without their scales, which may be None.
    normalize: each row divided by its length, for which its scale does not matter and may be None; a row of zeros
    stays zeros. Lengths of f32, bf16 and fp8 rows are float32 or float64 sums in any order: 1e-6 between backends.
    backend: "cpp" or "torch" on the CPU; "cuda", "triton" or "torch" on a GPU; None: the first that is here.

    All on one device. With rows on a GPU, codes and scales may also lie in pinned host memory, where the GPU reads
    the rows it is asked for across the bus and no others (keep scales on the GPU: 4 bytes are a request of 32); the
    result is on the rows' device. "torch" has the host gather them, and waits.

    No gradient: codes are constants, and the scales belong to a table that nobody trains.

    Raises IndexError for a row outside the table on the CPU; on a GPU such a row is NaN, 0 as int8 ("cuda",
    "triton"), since raising would make the host wait. Raises ValueError for codecs, shapes, dtypes and devices
    that do not fit, and BackendError for a backend that is not here.
    """
    dim = _check(codes, scales, rows, dtype, codec, dim, normalize)
    if normalize or dtype == torch.int8:
        scales = None
    return torch.ops.lift_fast.dequant(codes, scales, rows, dtype, backend or "", codec, dim, normalize)


@torch.library.custom_op(
    "lift_fast::dequant",
    mutates_args=(),
    schema="(Tensor codes, Tensor? scales, Tensor? rows, ScalarType dtype, str backend, str codec, SymInt dim,"
    " bool normalize) -> Tensor",
)
def _dequant(
    codes: Tensor,
    scales: Tensor | None,
    rows: Tensor | None,
    dtype: torch.dtype,
    backend: str,
    codec: str,
    dim: int,
    normalize: bool,
) -> Tensor:
    device = (codes if rows is None else rows).device
    for name, part in (("codes", codes), ("scales", scales)):
        if part is not None and part.device != device and not part.is_pinned():
            raise ValueError(f"{name} must be on {device}, as rows are, or in pinned host memory")
    launch = _choose(device.type, backend)
    m = len(codes) if rows is None else len(rows)
    if m and rows is not None and not len(codes):
        raise IndexError(f"{m} rows asked of an empty table")
    if codes.shape[1] > 1 and codes.stride(1) != 1:
        # Only what is asked for becomes contiguous: the table may be larger than memory.
        if rows is None:
            codes = codes.contiguous()
        else:
            codes, scales, rows = *_taken(codes, scales, rows), None
    out = torch.empty((m, dim), dtype=dtype, device=device)
    if out.numel():
        launch(codes, scales, None if rows is None else rows.contiguous(), out, CODECS[codec], normalize)
    elif rows is not None:
        _refuse_outside(rows, len(codes))
    return out


@_dequant.register_fake
def _(
    codes: Tensor,
    scales: Tensor | None,
    rows: Tensor | None,
    dtype: torch.dtype,
    backend: str,
    codec: str,
    dim: int,
    normalize: bool,
) -> Tensor:
    of = codes if rows is None else rows
    return of.new_empty((of.shape[0], dim), dtype=dtype)


def _check(
    codes: Tensor,
    scales: Tensor | None,
    rows: Tensor | None,
    dtype: torch.dtype,
    codec: str,
    dim: int | None,
    normalize: bool,
) -> int:
    """dim, of what fits together."""
    kind = CODECS.get(codec)
    if kind is None:
        raise ValueError(f"codec {codec!r} is unknown; this version knows {', '.join(CODECS)}")
    if dim is None and not kind.packed and codes.dim() == 2:
        dim = codes.shape[1]
    if dim is None and kind.packed:
        raise ValueError(f"codec {codec} packs its codes: dim must be given")
    if codes.dtype != kind.dtype or codes.dim() != 2 or dim is None or codes.shape[1] != kind.columns(dim):
        wanted = f"{str(kind.dtype).removeprefix('torch.')} [n, {'dim' if dim is None else kind.columns(dim)}]"
        raise ValueError(f"codes must be {wanted}, not {codes.dtype} {list(codes.shape)}")
    if dtype not in DTYPES or (dtype == torch.int8 and not kind.integer):
        also = ", or int8" if kind.integer else f" for codec {codec}"
        raise ValueError(f"dtype must be float32, bfloat16 or float16{also}, not {dtype}")
    if normalize and dtype == torch.int8:
        raise ValueError("normalize divides, and dtype int8 holds integers")
    if scales is not None and not kind.scaled:
        raise ValueError(f"codec {codec} has no scales")
    if scales is None:
        if kind.scaled and not normalize and dtype != torch.int8:
            raise ValueError(f"scales must be float32 [{codes.shape[0]}], one a row, not None")
    elif scales.shape != codes.shape[:1] or scales.dtype != torch.float32:
        raise ValueError(
            f"scales must be float32 [{codes.shape[0]}], one a row, not {scales.dtype} {list(scales.shape)}"
        )
    if rows is not None and (rows.dim() != 1 or rows.dtype != torch.int64):
        raise ValueError(f"rows must be int64 [m], not {rows.dtype} {list(rows.shape)}")
    parts = [tensor for tensor in (codes, scales, rows) if tensor is not None]
    # Host memory beside rows on a GPU: pinned or not is asked where no compiler traces.
    hosted = ("cpu", "cuda") if rows is not None and rows.device.type == "cuda" else ()
    if any(part.device != parts[-1].device and part.device.type not in hosted for part in parts):
        raise ValueError(f"codes, scales and rows must be on one device, not {', '.join(str(p.device) for p in parts)}")
    return dim


def _taken(codes: Tensor, scales: Tensor | None, rows: Tensor) -> tuple[Tensor, Tensor | None]:
    """codes[rows] and scales[rows] on the rows' device, each gathered where it is."""
    there = rows.to(codes.device)
    _refuse_outside(there, len(codes))
    taken = _take(codes, there).to(rows.device)
    return taken, None if scales is None else scales.index_select(0, rows.to(scales.device)).to(rows.device)


def _refuse_outside(rows: Tensor, n: int) -> None:
    """IndexError for a row outside n on the CPU; a GPU's own index check does it without a wait."""
    if rows.device.type != "cpu":
        return
    bad = ((rows < 0) | (rows >= n)).nonzero()
    if len(bad):
        first = int(bad[0])
        raise IndexError(f"rows[{first}] is {int(rows[first])}, outside a table of {n} rows")


# A backend fills `out` [m, dim], not empty and contiguous; each row of codes and rows are contiguous.
Launch = Callable[[Tensor, Tensor | None, Tensor | None, Tensor, Codec, bool], None]


def _job(
    codes: Tensor,
    scales: Tensor | None,
    rows: Tensor | None,
    out: Tensor,
    codec: Codec = CODECS["int8"],
    normalize: bool = False,
) -> dict[str, Any]:
    """The job of csrc/common/ops.h, in addresses and counts."""
    m, dim = out.shape
    return {
        "codes": codes.data_ptr(),
        "scales": address(scales),
        "rows": address(rows),
        "out": out.data_ptr(),
        "n": len(codes),
        "m": m,
        "dim": dim,
        "codes_stride": codes.stride(0) * codes.element_size(),
        "scales_stride": 0 if scales is None else scales.stride(0),
        "codec": codec.number,
        "type": DTYPES[out.dtype],
        "normalize": normalize,
    }


def _cpp(codes: Tensor, scales: Tensor | None, rows: Tensor | None, out: Tensor, codec: Codec, normalize: bool) -> None:
    _C.dequant_cpu(**_job(codes, scales, rows, out, codec, normalize), threads=torch.get_num_threads(), isa="")


def _cuda(
    codes: Tensor, scales: Tensor | None, rows: Tensor | None, out: Tensor, codec: Codec, normalize: bool
) -> None:
    _C.dequant_cuda(**_job(codes, scales, rows, out, codec, normalize), **launch_on(out))


def _triton(
    codes: Tensor, scales: Tensor | None, rows: Tensor | None, out: Tensor, codec: Codec, normalize: bool
) -> None:
    from ...kernels.dequant import dequant as launch

    with torch.cuda.device_of(out):
        launch(codes, scales, rows, out, codec.levels, normalize)


def _torch(
    codes: Tensor, scales: Tensor | None, rows: Tensor | None, out: Tensor, codec: Codec, normalize: bool
) -> None:
    if rows is not None:
        codes, scales = _taken(codes, scales, rows)
    out.copy_(reference(codes, scales, None, out.dtype, codec=codec.name, dim=out.shape[1], normalize=normalize))


# device -> backends in order of preference: name -> (launch, why it is not here)
_BACKENDS: dict[str, dict[str, tuple[Launch, Callable[[], str | None]]]] = {
    "cpu": {"cpp": (_cpp, why_no_cpp), "torch": (_torch, lambda: None)},
    "cuda": {
        "cuda": (_cuda, why_no_cuda),
        "triton": (_triton, why_no_triton),
        "torch": (_torch, lambda: None),
    },
}
_chosen: dict[tuple[str, str], Launch] = {}


def _choose(device: str, backend: str) -> Launch:
    """The launcher for a device, the named one or the first that is here. Raises BackendError."""
    if (device, backend) not in _chosen:
        offered = dict(_BACKENDS.get(device, {"torch": (_torch, lambda: None)}))
        if device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
            offered["triton"] = (_triton, why_no_triton)
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
