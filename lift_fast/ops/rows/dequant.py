"""Gather rows of a quantized table and widen them: turns a text cache's rows into a tensor."""

import torch
from torch import Tensor

from ..backends import DTYPES, spares_dynamo
from .codecs import CODECS, Codec
from .contract import BACKENDS, RowGather


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
        # Squares of integers are summed exactly. The float32 root is taken in float64 and rounded, because torch's
        # float32 root is not correctly rounded on every CPU. So the bits are the same wherever division is IEEE's.
        exact = wide if kind.integer else torch.float64
        lengths = squares.to(exact).to(torch.float64).sqrt().to(exact)
        factors = torch.where(squares == 0, 0.0, lengths.reciprocal())
        return (values.to(exact) * factors).to(wide).to(dtype)
    if scales is None:
        return values.to(wide).to(dtype)
    scales = scales if rows is None else scales.index_select(0, rows)
    return (values.to(wide) * scales.to(wide)[:, None]).to(dtype)


def _values(codes: Tensor, codec: Codec, dim: int | None) -> Tensor:
    """The values that codes stand for, [m, dim]: int8 for the integer codecs, else float32."""
    if not codec.integer:
        return codes.to(torch.float32)
    if not codec.packed:
        return codes
    shifts = torch.arange(0, 8, codec.bits, dtype=torch.uint8, device=codes.device)
    fields = (codes[:, :, None] >> shifts & (1 << codec.bits) - 1).flatten(1)[:, :dim]
    return torch.tensor(codec.levels, dtype=torch.int8, device=codes.device)[fields.long()]


def _take(codes: Tensor, rows: Tensor) -> Tensor:
    if codes.dtype == torch.float8_e4m3fn:  # some versions of torch have no index_select for it
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
    [n, dim], or for "int4r" and "int2r" uint8 [n, ceil(dim · bits / 8)], which need dim.
    scales: float32 [n]; None for "f32" and "bf16", which have none.
    rows: int64 [m], any order, repeats allowed.
    dtype: float32, bfloat16 or float16, rounded to nearest even from the float32 product of value and scale; or, for
    integer codecs, int8: the integers without their scales, which may be None.
    normalize: divides each row by its length. Scales then have no effect and may be None; a row of zeros stays zeros.
    For f32, bf16 and fp8 the length is a float32 or float64 sum in any order: backends differ by up to 1e-6.
    backend: "cpp" or "torch" on the CPU; "cuda", "triton" or "torch" on a GPU; None: the first one available.

    All tensors are on one device. With rows on a GPU, codes and scales may also lie in pinned host memory: the GPU then
    reads only the requested rows across the bus (keep scales on the GPU: each 4-byte scale costs a request of 32
    bytes), and the result is on the rows' device. "torch" gathers on the host instead, and waits for the GPU.

    No gradient: codes are constants, and the table's scales are not trained.

    Raises IndexError for a row outside the table on the CPU; on a GPU such a row is NaN, 0 as int8 ("cuda",
    "triton"), because raising would make the host wait for the GPU. Raises ValueError for an unknown codec and for
    shapes, dtypes or devices that do not match, and BackendError for a backend that is not available.
    """
    dim = _check(codes, scales, rows, dtype, codec, dim, normalize)
    if normalize or dtype == torch.int8:
        scales = None
    return torch.ops.lift_fast.dequant(codes, scales, rows, dtype, backend or "", codec, dim, normalize)


@spares_dynamo
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
    _, module = BACKENDS.choose("dequant", device.type, None, backend, BACKENDS.offered(device.type))
    m = len(codes) if rows is None else len(rows)
    if m and rows is not None and not len(codes):
        raise IndexError(f"{m} rows requested from an empty table")
    if codes.shape[1] > 1 and codes.stride(1) != 1:
        # Only the requested rows are made contiguous: a copy of the whole table might not fit in memory.
        if rows is None:
            codes = codes.contiguous()
        else:
            codes, scales, rows = *taken(codes, scales, rows), None
    out = torch.empty((m, dim), dtype=dtype, device=device)
    if out.numel():
        index = None if rows is None else rows.contiguous()
        module.widen(RowGather(codes, scales, index, out, CODECS[codec], normalize))
    elif rows is not None:
        _check_inside(rows, len(codes))
    return out


@_dequant.register_fake
def _(codes, scales, rows, dtype, backend, codec, dim, normalize):
    index = codes if rows is None else rows
    return index.new_empty((index.shape[0], dim), dtype=dtype)


def _check(
    codes: Tensor,
    scales: Tensor | None,
    rows: Tensor | None,
    dtype: torch.dtype,
    codec: str,
    dim: int | None,
    normalize: bool,
) -> int:
    """Validates the arguments of `dequant` and returns dim. Raises ValueError."""
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
        raise ValueError("normalize needs a floating dtype: dtype int8 holds integers")
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
    # With rows on a GPU the table may be in host memory. The op checks that it is pinned, where nothing traces.
    hosted = ("cpu", "cuda") if rows is not None and rows.device.type == "cuda" else ()
    if any(part.device != parts[-1].device and part.device.type not in hosted for part in parts):
        raise ValueError(f"codes, scales and rows must be on one device, not {', '.join(str(p.device) for p in parts)}")
    return dim


def taken(codes: Tensor, scales: Tensor | None, rows: Tensor) -> tuple[Tensor, Tensor | None]:
    """codes[rows] and scales[rows], gathered on their own devices and copied to the rows' device."""
    index = rows.to(codes.device, copy=True)  # the caller's may change after they were checked
    _check_inside(index, len(codes))
    part = _take(codes, index).to(rows.device)
    return part, None if scales is None else scales.index_select(0, index.to(scales.device)).to(rows.device)


def _check_inside(rows: Tensor, n: int) -> None:
    """Raises IndexError for a row outside 0..n-1 on the CPU. On a GPU torch's own index check does, without a wait."""
    if rows.device.type != "cpu":
        return
    bad = ((rows < 0) | (rows >= n)).nonzero()
    if len(bad):
        first = int(bad[0])
        raise IndexError(f"rows[{first}] is {int(rows[first])}, outside a table of {n} rows")
