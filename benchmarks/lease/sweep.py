"""python -m benchmarks.lease.sweep --seconds S: candidate values of tuned settings, each timed in the op that reads it.

A line a value: {"phase": "tune", "family", "device": "sm_90", "setting", "when", "value", "present", "median_ms", ...},
A value is measured as it would be in the table: an entry with its `when` in front of the others. `python -m benchmarks
tune --from` makes entries of those that are faster than the present value by more than the spread.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
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
    """present: the value that the table has for what is measured. when: for which an entry is to hold. build: makes
    the call that is timed."""

    family: str
    setting: str
    present: Any
    when: Mapping[str, Any]
    values: tuple[Any, ...]
    build: Callable[[], Call]


@contextmanager
def in_front(family: str, device: str, entry: Mapping[str, Any]) -> Iterator[None]:
    """The table as it would be with one more entry, the first."""
    others = tuned.entries

    def entries(a_family: str, a_device: str) -> list[dict[str, Any]]:
        first = [dict(entry)] if (a_family, a_device) == (family, device) else []
        return first + others(a_family, a_device)

    tuned.entries = entries  # type: ignore[assignment]
    tuned._lookup.cache_clear()
    try:
        yield
    finally:
        tuned.entries = others
        tuned._lookup.cache_clear()


def pair_loss(op: str, dim: int, trained: bool = False, backend: str | None = None, rows: int = ROWS) -> Call:
    from lift_fast.ops.contrastive import contrastive
    from lift_fast.ops.sigmoid import sigmoid

    from ..bench_contrastive import features
    from ..pairs import Case

    image, text = features(Case(rows, dim, "bf16", trained), "cuda")
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


TILES = ("tile",)  # the settings of kernels, of which other devices' tables and other facts have candidates
MOST_TILES = 5


def sweeps(device: str) -> Iterator[Sweep]:
    """What decides most first."""

    def known(setting: str, when: Mapping[str, Any], values: tuple[Any, ...], build: Callable[[], Call], **facts: Any):
        try:
            present = tuned.lookup("pairs", device, setting, **facts)
        except LookupError as error:
            lines.write({"phase": "tune", "note": f"pairs {setting} {facts}: {error!r}"})
            return
        yield Sweep("pairs", setting, present, when, values, build)

    loss = partial(pair_loss, "contrastive")
    for dim in (768, 4096, 1536, 256):
        when, facts = {"dim": DIMS[dim], "itemsize": 2}, {"dim": dim, "itemsize": 2}
        yield from known("backend", when, ORDERS, partial(loss, dim), **facts)
    for dim, span in ((768, [None, 1023]), (4096, [1024, None])):
        yield from known("block", {"dim": span}, BLOCKS, partial(loss, dim, False, "cuda"), dim=dim)
    yield from _tiles(device)
    for trained in (False, True):
        yield from known("band", {"trained": trained}, BANDS, partial(loss, 4096, trained, "cuda"), trained=trained)
    for dim in (768, 1536):
        when, facts = {"dim": DIMS[dim], "itemsize": 2}, {"dim": dim, "itemsize": 2, "backend": "cuda"}
        yield from known("keep", when, KEEPS, partial(loss, dim, False, "cuda"), **facts)


def _tiles(device: str) -> Iterator[Sweep]:
    """For each tile of the device's tables those that any GPU's table has for the same kind of kernel."""
    for family in sorted({file.name.split(".")[0] for file in tuned.HERE.glob("*.json")}):
        if not any(name == device for name in tuned.devices(family)):
            continue
        several = [entry for name in tuned.devices(family) if name != "cpu" for entry in tuned.entries(family, name)]
        for entry in tuned.entries(family, device):
            build = _workload(family, entry["when"])
            if entry["setting"] not in TILES or build is None:
                continue
            alike = [other["value"] for other in several if _kind(other) == _kind(entry)]
            values = [value for number, value in enumerate(alike) if value not in alike[:number]]
            if len(values) > 1:
                present = entry["value"]
                yield Sweep(family, entry["setting"], present, entry["when"], tuple(values[:MOST_TILES]), build)


def _kind(entry: Mapping[str, Any]) -> list[Any]:
    """What tells one kernel's setting from another's: the facts that are words or truths, not ranges."""
    return [
        entry["setting"],
        sorted((name, rule) for name, rule in entry["when"].items() if not isinstance(rule, list)),
    ]


def _workload(family: str, when: Mapping[str, Any]) -> Callable[[], Call] | None:
    """A call in which a setting with this `when` is looked up; None where that is not known here."""
    dim = _within(when.get("dim", when.get("width")), 768)
    if family == "pairs":
        return partial(pair_loss, "sigmoid" if when.get("kind") == "sigmoid" else "contrastive", dim, False, "triton")
    if family == "attention":
        return partial(attention, _within(when.get("tokens"), TOKENS), _within(when.get("head_dim"), 64))
    if family == "layernorm":
        return partial(layernorm, dim, "triton")
    return partial(mlp, dim, "triton_gemm") if family == "mlp" else None


def _within(rule: Any, usual: int) -> int:
    """The usual value, or what of the range is next to it."""
    low, high = rule if isinstance(rule, list) else (rule, rule)
    return min(max(usual, low or 0), high or max(usual, low or 0))


def measure(sweep: Sweep, device: str) -> None:
    """A line for each value; what fails has one that says so."""
    plain = sweep.build()
    calls: dict[int, Call] = {}
    values = [sweep.present, *(value for value in sweep.values if value != sweep.present)]
    case: dict[str, Any] = {"phase": "tune", "family": sweep.family, "device": device, "setting": sweep.setting}
    case |= {"when": dict(sweep.when), "gpu": torch.cuda.get_device_name(0)}
    for number, value in enumerate(values):
        entry = {"setting": sweep.setting, "when": sweep.when, "value": value}

        def call(entry: Mapping[str, Any] = entry) -> object:
            with in_front(sweep.family, device, entry):
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
    device = tuned.gpu("pairs", torch.device("cuda", 0))
    for number, sweep in enumerate(sweeps(device)):
        if time.monotonic() > end or (arguments.short and number == 2):
            return
        measure(sweep, device)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    begin()
    sys.exit(main())
