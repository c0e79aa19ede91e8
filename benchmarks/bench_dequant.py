"""Gathers and widens 4096 random int8 rows, BATCHES times, against torch, numpy and a copy of the same bytes.

Rivals named "into" fill an allocated buffer, as a trainer does with its pinned one; the others also allocate the
result, which on a CPU costs a page fault for every 4 KB. The copy moves as many bytes as the gather reads and writes.
"""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from lift_fast.ops.rows import cpp
from lift_fast.ops.rows.codecs import CODECS
from lift_fast.ops.rows.contract import BACKENDS, RowGather
from lift_fast.ops.rows.dequant import dequant, reference

from .harness import Suite

ROWS = 4096
BATCHES = 16  # with different rows; a single one would end before OpenMP's threads stop spinning after a torch op
DIMS = (384, 4096)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def table(dim: int, quick: bool, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """codes [n, dim], scales [n], rows [BATCHES, ROWS]; larger than the CPU's caches, so rows come from memory."""
    generator = torch.Generator().manual_seed(dim)
    n = (1 << 28 if quick else 1 << 30) // dim
    codes = torch.empty((n, dim), dtype=torch.int8).random_(-127, 128, generator=generator)
    scales = torch.rand(n, generator=generator) / 127
    rows = torch.randint(0, n, (BATCHES, ROWS), generator=generator)
    return codes.to(device), scales.to(device), rows.to(device)


def moved_bytes(dim: int, dtype: torch.dtype) -> int:
    """Bytes read and written by one call: codes, scales and row numbers in, widened rows out."""
    return BATCHES * ROWS * (dim * (1 + dtype.itemsize) + 4 + 8)


def cpu_rivals(codes: Tensor, scales: Tensor, rows: Tensor, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    dim = codes.shape[1]
    out = torch.empty((ROWS, dim), dtype=dtype)
    half = moved_bytes(dim, dtype) // BATCHES // 2
    source, target = torch.ones(half, dtype=torch.uint8), torch.ones(half, dtype=torch.uint8)
    np_source, np_target = source.numpy(), target.numpy()
    np_codes, np_scales = codes.numpy(), scales.numpy()
    one: dict[str, Callable[[Tensor], object]] = {
        "lift_fast": lambda batch: dequant(codes, scales, batch, dtype),
        "torch index_select, mul": lambda batch: reference(codes, scales, batch, dtype),
        "lift_fast into": lambda batch: cpp.widen(RowGather(codes, scales, batch, out, CODECS["int8"])),
        "torch into": lambda batch: out.copy_(reference(codes, scales, batch, dtype)),
        "torch copy of the same bytes": lambda batch: target.copy_(source),
        "numpy copy of the same bytes": lambda batch: np.copyto(np_target, np_source),
    }
    if dtype == torch.float32:
        one["numpy take, multiply"] = lambda batch: np_codes[batch.numpy()] * np_scales[batch.numpy(), None]
    return {what: lambda call=call: [call(batch) for batch in rows] for what, call in one.items()}


def run(suite: Suite) -> None:
    for dim in DIMS:
        codes, scales, rows = table(dim, suite.quick)
        for name, dtype in DTYPES.items():
            case = {"rows": ROWS, "batches": BATCHES, "dim": dim, "dtype": name, "threads": torch.get_num_threads()}
            rivals = cpu_rivals(codes, scales, rows, dtype)
            ms = suite.compare(case, rivals, moved_bytes(dim, dtype))
            if (dim, name) == (4096, "bf16"):
                # The faster copy: torch's uses as many threads as we do, numpy's only one but without synchronization.
                copy = min(timing.median for what, timing in ms.items() if "copy" in what)
                into = ms["lift_fast into"].median
                torch_ms = ms["torch into"].median
                suite.bar("int8 -> bf16, 4096 x 4096: speed against a copy of the same bytes", copy / into, 0.8)
                suite.bar("int8 -> bf16, 4096 x 4096: speed against torch index_select, mul", torch_ms / into, 8)
            if torch.cuda.is_available():
                on_device = codes.to("cuda"), scales.to("cuda"), rows.to("cuda")
                names = BACKENDS.here("cuda")
                on_gpu = {b: lambda b=b, t=on_device, d=dtype: dequant(*t[:2], t[2].flatten(), d, b) for b in names}
                suite.compare(case, on_gpu, moved_bytes(dim, dtype), "cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", DIMS)
def test_dequant(benchmark, dim, dtype):
    codes, scales, rows = table(dim, quick=True)
    out = benchmark(lambda: dequant(codes, scales, rows[0], DTYPES[dtype]))
    assert out.shape == (ROWS, dim)
