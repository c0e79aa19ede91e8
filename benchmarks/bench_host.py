"""Python's time before and between the kernel launches of the losses, without the work of the GPU.

Launches are stubs and tensors are tiny and on the CPU, but a call makes as many launches as at the named size, because
the settings of the tables are scaled with the rows. The benchmark measures CPU time of this process, with torch's part
and without Triton's launcher: until the last launch, and for the whole call with the backward. The target limits the
share of the first in the GPU time that benchmarks/roofline.py estimates; no GPU has measured that time yet.
"""

import functools
import importlib
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from lift_fast.ops import tuned
from lift_fast.ops.attention import contract as attentions
from lift_fast.ops.attention.op import attention
from lift_fast.ops.pairs import contract as pairs
from lift_fast.ops.pairs import contrastive as contrastive_op
from lift_fast.ops.pairs import cuda as cuda_pairs
from lift_fast.ops.pairs import policy
from lift_fast.ops.pairs import triton as triton_pairs
from lift_fast.ops.pairs.contrastive import contrastive
from lift_fast.ops.pairs.sigmoid import sigmoid

from . import roofline
from .harness import Suite

SIZES = [(16384, 768), (16384, 4096), (65536, 768), (65536, 4096)]
BAND = {"cuda": 16, "triton": 256}  # rows of a band of the tiny matrices: the fewest that the backend allows
DIM = 16
SHARE = 0.15  # target: Python's time over the GPU's


class Clock:
    """Stands in for everything that launches; `at` is the process's CPU time at the last launch, in seconds."""

    def __init__(self) -> None:
        self.at = 0.0

    def launch(self, *arguments: Any, **named: Any) -> None:
        self.at = time.process_time()

    def __getitem__(self, grid: object) -> Callable[..., None]:
        """Replaces a Triton kernel."""
        return self.launch

    def product(self, left: Tensor, right: Tensor, out: Tensor) -> Tensor:
        """Replaces cuBLAS."""
        self.launch()
        return out

    def __getattr__(self, name: str) -> Callable[..., int | None]:
        """Replaces lift_fast._C; scratch sizes are a constant."""
        return (lambda *sizes: 1024) if name.endswith(("scratch", "parts")) else self.launch


@contextmanager
def stubs(backend: str) -> Iterator[Clock]:
    """Makes ops treat tensors on the CPU as tensors on an H100 whose kernels do nothing."""
    clock = Clock()
    with ExitStack() as stack:

        def patch(owner: Any, name: str, value: Any) -> None:
            stack.enter_context(mock.patch.object(owner, name, value))

        for name in ("pairs", "contrastive", "sigmoid", "attention"):
            module = importlib.import_module(f"lift_fast.kernels.{name}")
            for kernel in [name for name in vars(module) if name.endswith("_kernel")]:
                patch(module, kernel, clock)
        patch(triton_pairs, "_product", clock.product)
        patch(cuda_pairs, "_C", clock)
        patch(cuda_pairs, "launch_on", lambda tensor: {"device": 0, "stream": 0})
        patch(cuda_pairs, "_gemm", lambda x: (0, 0))
        for table in ("gpu", "on"):
            patch(tuned, table, lambda family, device: "sm_90")
        patch(contrastive_op, "free_memory", lambda device: 40 * 10**9)
        for backends in (pairs.BACKENDS,) if backend == "cuda" else (pairs.BACKENDS, attentions.BACKENDS):
            module = importlib.import_module(f"lift_fast.ops.{backends.family}.{backend}")
            stack.enter_context(mock.patch.dict(backends.loaded, {backend: module}))
            stack.enter_context(mock.patch.dict(backends.by_device, {"cpu": (backend,)}))
        yield clock


def microseconds(call: Callable[[], object], clock: Clock, repeats: int) -> dict[str, float]:
    """CPU time of a call: until its last launch (median and interquartile range), and in whole (median)."""
    before, whole = [], []
    for number in range(repeats + 20):
        begun = time.process_time()
        call()
        ended = time.process_time()
        if number >= 20:
            before.append(1e6 * (clock.at - begun))
            whole.append(1e6 * (ended - begun))
    quarter, half, more = (sorted(before)[repeats * k // 4] for k in (1, 2, 3))
    return {"python_us": half, "spread_us": more - quarter, "whole_call_us": sorted(whole)[repeats // 2]}


def loss(op: Callable[..., Tensor], rows: int, dim: int, backend: str, repeats: int) -> dict[str, float]:
    """Times a loss over rows x rows scores with frozen text, and its backward, with the launches of that size."""
    plan = policy.plan(rows, rows, dim, 2, backend, None, op is contrastive, "sm_90", lambda: 40 * 10**9)
    bands = -(-2 * rows * rows // tuned.lookup("pairs", "sm_90", "band", trained=False)["bytes"])
    tall = BAND[backend] * bands
    settings = {
        "keep": {"share_of_free": 1.0} if plan.kept else None,
        "block": [BAND[backend], tall],
        "band": {"bytes": 0},
        "widen_below": 0,
    }
    image = torch.randn(tall, DIM, dtype=torch.bfloat16, requires_grad=True)
    text = torch.randn(tall, DIM, dtype=torch.bfloat16)
    scale = torch.tensor(14.3, requires_grad=True)
    with stubs(backend) as clock, ExitStack() as stack:
        for setting, value in settings.items():
            stack.enter_context(tuned.using("pairs", setting, value))
        step = functools.partial(op, image, text, scale, backend=backend)
        return microseconds(lambda: torch.autograd.grad(step(), (image, scale)), clock, repeats)


def attention_backward(repeats: int) -> dict[str, float]:
    """Times the backward of attention."""
    qkv = torch.randn(1, 197, 3, 1, 64, dtype=torch.bfloat16, requires_grad=True)
    with stubs("triton") as clock:
        out = attention(qkv, backend="triton")
        d_out = torch.ones_like(out)
        return microseconds(lambda: torch.autograd.grad(out, qkv, d_out, retain_graph=True), clock, repeats)


def run(suite: Suite) -> None:
    torch.set_num_threads(1)
    repeats = 500 if suite.quick else 2000

    def add(case: dict[str, Any], found: dict[str, float], expected: roofline.Estimate) -> None:
        suite.rows.append({**case, **found, "gpu_estimate_us": 1e6 * expected.seconds})
        share = 1e-6 * found["python_us"] / expected.seconds
        suite.bar(f"{expected.case} ({case['backend']}): Python before launches, of the GPU's time", share, SHARE,
                  at_most=True)  # fmt: skip

    for op, estimate in ((contrastive, roofline.contrastive), (sigmoid, roofline.sigmoid)):
        for rows, dim in SIZES:
            backend = tuned.lookup("pairs", "sm_90", "backend", dim=dim, itemsize=2)[0]
            case = {"what": op.__name__, "rows": rows, "dim": dim, "backend": backend}
            add(case, loss(op, rows, dim, backend, repeats), estimate(rows, dim))
    case = {"what": "attention backward", "rows": 256, "dim": 64, "backend": "triton"}
    add(case, attention_backward(repeats), roofline.attention()[1])
