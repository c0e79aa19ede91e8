"""python -m benchmarks.lease.sweep --seconds S: candidate values of tuned settings, each timed in the op that reads it.

A line a value: {"phase": "tune", "family", "device": "sm_90", "setting", "when", "value", "present", "median_ms", ...},
`when` as the table has it. `python -m benchmarks tune --from` makes table entries of those that are faster than the
present value by more than the spread. Two sweeps beside each other: the same `when` is not measured twice.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch

from lift_fast.measure.time import interleaved_ms
from lift_fast.ops import tuned

from .. import lines
from ..start import begin, rehearsing, small

MIB = 1 << 20
ROWS, TOKENS, BATCH = small(16384, 1024), 197, small(256, 2)
Call = Callable[[], object]


class Sweep(NamedTuple):
    """facts: for which the present value is looked up. when: for which the entry is to hold. build: makes the call."""

    family: str
    setting: str
    facts: Mapping[str, Any]
    when: Mapping[str, Any]
    values: tuple[Any, ...]
    build: Callable[[], Call]


def pair_loss(op: str, dim: int, trained: bool = False, backend: str | None = None) -> Call:
    from lift_fast.ops.contrastive import contrastive
    from lift_fast.ops.sigmoid import sigmoid

    from ..bench_contrastive import features
    from ..pairs import Case

    image, text = features(Case(ROWS, dim, "bf16", trained), "cuda")
    scalars = [torch.tensor(value, device="cuda", requires_grad=True) for value in (14.0, -10.0)]
    loss = {"contrastive": contrastive, "sigmoid": sigmoid}[op]
    leaves = [image, *([text] if trained else []), *scalars]

    def call() -> object:
        return torch.autograd.grad(loss(image, text, *scalars, backend=backend), leaves, allow_unused=True)

    return call


def attention(tokens: int, head_dim: int = 64) -> Call:
    from lift_fast.ops.attention import attention as op

    qkv = torch.randn(BATCH, tokens, 3, 12, head_dim, device="cuda").bfloat16().requires_grad_()
    seed = torch.randn(BATCH, tokens, 12, head_dim, device="cuda").bfloat16()
    return lambda: torch.autograd.grad(op(qkv), [qkv], seed)


def layernorm(width: int, backend: str | None = None) -> Call:
    from lift_fast.ops.layernorm import layernorm as op

    x, residual, seed = (torch.randn(BATCH * TOKENS, width, device="cuda").bfloat16() for _ in range(3))
    weight, bias = (torch.randn(width, device="cuda").requires_grad_() for _ in range(2))
    leaves = [x.requires_grad_(), residual.requires_grad_(), weight, bias]
    return lambda: torch.autograd.grad(op(x, weight, bias, residual=residual, backend=backend)[0], leaves, seed)


def mlp(width: int, backend: str | None = None) -> Call:
    from lift_fast.ops.mlp import mlp as op

    shapes = (BATCH * TOKENS, width), (4 * width, width), (4 * width,), (width, 4 * width), (width,)
    leaves = [torch.randn(shape, device="cuda").bfloat16().requires_grad_() for shape in shapes]
    seed = torch.randn(BATCH * TOKENS, width, device="cuda").bfloat16()
    return lambda: torch.autograd.grad(op(*leaves, backend=backend), leaves, seed)


DIMS = {256: [None, 511], 768: [512, 1023], 1536: [1024, 2047], 4096: [2048, None]}  # the dim measured -> its range
ORDERS = ["triton", "cuda", "torch"], ["cuda", "triton", "torch"]
BLOCKS = [1024, 4096], [2048, 2048], [2048, 4096], [2048, 8192], [4096, 4096], [4096, 8192]
BANDS = tuple({"bytes": size * MIB} for size in (256, 512, 1024, 2048))
KEEPS = None, {"share_of_free": 0.5}


def sweeps() -> Iterator[Sweep]:
    for dim in (768, 4096, 1536, 256):
        when = {"dim": DIMS[dim], "itemsize": 2}
        yield Sweep(
            "pairs", "backend", {"dim": dim, "itemsize": 2}, when, ORDERS, partial(pair_loss, "contrastive", dim)
        )
    for dim, span in ((768, [None, 1023]), (4096, [1024, None])):
        build = partial(pair_loss, "contrastive", dim, False, "cuda")
        yield Sweep("pairs", "block", {"dim": dim}, {"dim": span}, BLOCKS, build)
    for trained in (False, True):
        build = partial(pair_loss, "contrastive", 4096, trained, "cuda")
        yield Sweep("pairs", "band", {"trained": trained}, {"trained": trained}, BANDS, build)
    for dim in (768, 1536):
        facts = {"dim": dim, "itemsize": 2, "backend": "cuda"}
        when = {"dim": DIMS[dim], "itemsize": 2}
        yield Sweep("pairs", "keep", facts, when, KEEPS, partial(pair_loss, "contrastive", dim, False, "cuda"))


def measure(sweep: Sweep, device: str) -> None:
    """A line for each value; what fails has one that says so."""
    try:
        present = tuned.lookup(sweep.family, device, sweep.setting, **sweep.facts)
    except (LookupError, FileNotFoundError) as error:
        lines.write({"phase": "tune", "note": f"{sweep.family} {sweep.setting} {dict(sweep.facts)}: {error!r}"})
        return
    plain = sweep.build()
    calls: dict[int, Call] = {}
    values = [present, *(value for value in sweep.values if value != present)]
    case: dict[str, Any] = {
        "phase": "tune",
        "family": sweep.family,
        "device": device,
        "gpu": torch.cuda.get_device_name(0),
    }
    case |= {"setting": sweep.setting, "when": dict(sweep.when)}
    for number, value in enumerate(values):

        def call(value: Any = value) -> object:
            with tuned.using(sweep.family, sweep.setting, value):
                return plain()

        try:
            call()
            torch.cuda.synchronize()
            calls[number] = call
        except Exception as error:
            lines.write({**case, "value": value, "note": f"{type(error).__name__}: {error}"[:300]})
            torch.cuda.empty_cache()
    if not calls:
        return
    for number, (median, spread) in interleaved_ms(calls, 1 if rehearsing() else 9, 1, "cuda").items():
        figures = {"median_ms": median, "spread_ms": spread}
        lines.write({**case, "value": values[number], "present": number == 0, **figures})


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, required=True, help="begin no further sweep after so long")
    parser.add_argument("--short", action="store_true", help="two sweeps")
    arguments = parser.parse_args()
    end = time.monotonic() + arguments.seconds
    for number, sweep in enumerate(sweeps()):
        if time.monotonic() > end or (arguments.short and number == 2):
            return
        measure(sweep, tuned.gpu(sweep.family, torch.device("cuda", 0)))
        torch.cuda.empty_cache()


if __name__ == "__main__":
    begin()
    sys.exit(main())
