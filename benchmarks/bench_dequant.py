"""Gather 4096 random int8 rows and widen them, against torch, numpy and a copy of the same bytes.

"into" rivals fill a buffer that is there already, as a trainer's pinned buffer is; the others also allocate
the result, which on a CPU costs a page fault every 4 KB. The copy moves as many bytes as the gather reads and
writes.
"""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from lift_fast import _C
from lift_fast.ops.dequant import _BACKENDS, _job, dequant, reference

from .harness import Suite

ROWS = 4096
DIMS = (384, 4096)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def table(dim: int, quick: bool, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """codes, scales, rows: larger than any cache, so that a random row comes from memory."""
    generator = torch.Generator().manual_seed(dim)
    n = (1 << 28 if quick else 1 << 30) // dim
    codes = torch.empty((n, dim), dtype=torch.int8).random_(-127, 128, generator=generator)
    scales = torch.rand(n, generator=generator) / 127
    rows = torch.randint(0, n, (ROWS,), generator=generator)
    return codes.to(device), scales.to(device), rows.to(device)


def moved_bytes(dim: int, dtype: torch.dtype) -> int:
    return ROWS * (dim * (1 + dtype.itemsize) + 4 + 8)


def cpu_rivals(codes: Tensor, scales: Tensor, rows: Tensor, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    dim = codes.shape[1]
    out = torch.empty((ROWS, dim), dtype=dtype)
    half = moved_bytes(dim, dtype) // 2
    source, target = torch.ones(half, dtype=torch.uint8), torch.ones(half, dtype=torch.uint8)
    job = _job(codes, scales, rows, out)
    np_source, np_target = source.numpy(), target.numpy()
    np_codes, np_scales, np_rows = codes.numpy(), scales.numpy(), rows.numpy()
    rivals: dict[str, Callable[[], object]] = {
        "lift_fast": lambda: dequant(codes, scales, rows, dtype),
        "torch index_select, mul": lambda: reference(codes, scales, rows, dtype),
        "lift_fast into": lambda: _C.dequant_cpu(**job, threads=torch.get_num_threads()),
        "torch into": lambda: out.copy_(reference(codes, scales, rows, dtype)),
        "torch copy of the same bytes": lambda: target.copy_(source),
        "numpy copy of the same bytes": lambda: np.copyto(np_target, np_source),
    }
    if dtype == torch.float32:
        rivals["numpy take, multiply"] = lambda: np_codes[np_rows] * np_scales[np_rows, None]
    return rivals


def run(suite: Suite) -> None:
    for dim in DIMS:
        codes, scales, rows = table(dim, suite.quick)
        for name, dtype in DTYPES.items():
            case = {"rows": ROWS, "dim": dim, "dtype": name, "threads": torch.get_num_threads()}
            rivals = cpu_rivals(codes, scales, rows, dtype)
            ms = suite.compare(case, rivals, moved_bytes(dim, dtype))
            if (dim, name) == (4096, "bf16"):
                # The faster copy: torch's has as many threads as we have, numpy's has one and waits for nobody.
                copy = min(timing.median for what, timing in ms.items() if "copy" in what)
                into = ms["lift_fast into"].median
                torch_ms = ms["torch into"].median
                suite.bar("int8 -> bf16, 4096 x 4096: speed against a copy of the same bytes", copy / into, 0.8)
                suite.bar("int8 -> bf16, 4096 x 4096: speed against torch index_select, mul", torch_ms / into, 8)
            if torch.cuda.is_available():
                there = codes.to("cuda"), scales.to("cuda"), rows.to("cuda")
                offered = [backend for backend, (_, why_not) in _BACKENDS["cuda"].items() if why_not() is None]
                on_gpu = {b: lambda b=b, t=there, d=dtype: dequant(*t, d, b) for b in offered}
                suite.compare(case, on_gpu, moved_bytes(dim, dtype), "cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", DIMS)
def test_dequant(benchmark, dim, dtype):
    codes, scales, rows = table(dim, quick=True)
    out = benchmark(lambda: dequant(codes, scales, rows, DTYPES[dtype]))
    assert out.shape == (ROWS, dim)
