"""python -m benchmarks.lease.hot: profiles our kernels with ncu and writes a line for each of the five slowest.

ncu runs this module with --pass, which calls each of our ops once. The GPU's clocks are left as they are.
"""

import csv
import io
import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import product
from typing import Any

from .. import lines
from ..start import ROOT, begin

METRICS = {
    "gpu__time_duration.sum": "median_ms",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "sm_percent",
    "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed": "dram_percent",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy_percent",
    "smsp__issue_active.avg.pct_of_peak_sustained_active": "issue_percent",
    "launch__registers_per_thread": "registers",
}
SCALE = {"median_ms": 1e-6}  # ncu counts nanoseconds with --print-units base
HOTTEST, LAUNCHES = 5, 60
ROWS = 4096  # two blocks of scores


def ours() -> set[str]:
    """The names of our kernels, in Triton and CUDA."""
    from .smoke import CASES

    triton = {kernel.rsplit(".")[-1] for case in CASES.values() for kernel in case.kernels if not case.built}
    cuda = "".join(file.read_text() for file in sorted((ROOT / "csrc").rglob("*.cu*")))
    return triton | set(re.findall(r"__global__ void\s+(?:__launch_bounds__\([^)]*\)\s*)?(\w+)\(", cuda))


def command() -> list[str]:
    """The ncu command that profiles one pass."""
    ncu = ["ncu", "--profile-from-start", "off", "--clock-control", "none", "--launch-count", str(LAUNCHES)]
    names = f"regex:^({'|'.join(sorted(ours()))})$"
    output = ["--csv", "--page", "raw", "--print-units", "base", "--kernel-name", names]
    return [*ncu, *output, "--metrics", ",".join(METRICS), sys.executable, "-m", "benchmarks.lease.hot", "--pass"]


def kernels(output: str) -> Iterator[dict[str, Any]]:
    """Yields {"case": kernel name, figures} for each kernel in ncu's CSV table, which may follow other output."""
    table = output[output.index('"ID"') :] if '"ID"' in output else ""
    for row in list(csv.DictReader(io.StringIO(table)))[1:]:  # the row after the header has the units
        figures = {}
        for metric, name in METRICS.items():
            try:
                figures[name] = float(row[metric].replace(",", "")) * SCALE.get(name, 1)
            except (KeyError, ValueError):  # a metric that this ncu or this GPU does not have
                continue
        yield {"case": row["Kernel Name"], **figures}


def one_pass() -> None:
    """Calls each op once while the profiler runs, after a first call that compiles its kernels."""
    import torch

    from . import sweep

    calls = [sweep.attention(197), sweep.layernorm(768), sweep.mlp(768), sweep.mlp(768, "triton_gemm")]
    for op, backend in product(("contrastive", "sigmoid"), ("triton", "cuda")):
        calls.append(sweep.pair_loss(op, 768, False, backend, ROWS))
    for call in calls:
        call()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    for call in calls:
        call()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def main() -> int:
    done = subprocess.run(command(), cwd=ROOT, capture_output=True, text=True)
    found: dict[str, dict[str, Any]] = {}
    for kernel in kernels(done.stdout):
        if "median_ms" in kernel:
            known = found.setdefault(kernel["case"], kernel)
            if kernel["median_ms"] > known["median_ms"]:
                found[kernel["case"]] = kernel
    for kernel in sorted(found.values(), key=lambda one: -one["median_ms"])[:HOTTEST]:
        lines.write({"phase": "ncu", "backend": "lift_fast", **kernel})
    if not found:
        print((done.stderr or done.stdout)[-2000:] or "ncu reported none of our kernels")
    return 0 if found else 1


if __name__ == "__main__":
    begin()
    sys.exit(one_pass() if sys.argv[1:] == ["--pass"] else main())
