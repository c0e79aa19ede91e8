"""Gather 4096 random int8 rows and widen them, BATCHES times, against torch, numpy and a copy of the same bytes.

"into" rivals fill a buffer that is there already, as a trainer's pinned buffer is; the others also allocate
the result, which on a CPU costs a page fault every 4 KB. The copy moves as many bytes as the gather reads and
writes.
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
BATCHES = 16  # of other rows each: one is over before OpenMP's threads stop spinning after an op of torch's
DIMS = (384, 4096)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def table(dim: int, quick: bool, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """codes, scales, rows [BATCHES, ROWS]: larger than any cache, so that a random row comes from memory."""
    generator = torch.Generator().manual_seed(dim)
    n = (1 << 28 if quick else 1 << 30) // dim
    codes = torch.empty((n, dim), dtype=torch.int8).random_(-127, 128, generator=generator)
    scales = torch.rand(n, generator=generator) / 127
    rows = torch.randint(0, n, (BATCHES, ROWS), generator=generator)
    return codes.to(device), scales.to(device), rows.to(device)


def moved_bytes(dim: int, dtype: torch.dtype) -> int:
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
                # The faster copy: torch's has as many threads as we have, numpy's has one and waits for nobody.
                copy = min(timing.median for what, timing in ms.items() if "copy" in what)
                into = ms["lift_fast into"].median
                torch_ms = ms["torch into"].median
                suite.bar("int8 -> bf16, 4096 x 4096: speed against a copy of the same bytes", copy / into, 0.8)
                suite.bar("int8 -> bf16, 4096 x 4096: speed against torch index_select, mul", torch_ms / into, 8)
            if torch.cuda.is_available():
                there = codes.to("cuda"), scales.to("cuda"), rows.to("cuda")
                names = BACKENDS.here("cuda")
                on_gpu = {b: lambda b=b, t=there, d=dtype: dequant(*t[:2], t[2].flatten(), d, b) for b in names}
                suite.compare(case, on_gpu, moved_bytes(dim, dtype), "cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", DIMS)
def test_dequant(benchmark, dim, dtype):
    codes, scales, rows = table(dim, quick=True)
    out = benchmark(lambda: dequant(codes, scales, rows[0], DTYPES[dtype]))
    assert out.shape == (ROWS, dim)
