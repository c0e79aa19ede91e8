"""python -m benchmarks.lease.sweep --seconds S: times candidate values of tuned settings in the op that reads them.

Writes a line per value: {"phase": "tune", "family", "device": "sm_90", "setting", "when", "value", "present",
"median_ms", ...}. A value is measured as the first entry of the table, with its `when`. `python -m benchmarks tune
--from` makes entries of the values that beat the present one by more than the spread.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lift_fast.measure.time import interleaved_ms
from lift_fast.ops import tuned

from .. import lines
from ..start import begin, rehearsing, small

MIB = 1 << 20
ROWS, TOKENS, BATCH = small(16384, 1024), 197, small(256, 2)
Call = Callable[[], object]


class Sweep(NamedTuple):
    """Candidate values of a setting.

    present: the table's value for what is measured. when: the condition that a new entry would have. build: returns the
    call that is timed.
    """

    family: str
    setting: str
    present: Any
    when: Mapping[str, Any]
    values: tuple[Any, ...]
    build: Callable[[], Call]


@contextmanager
def with_first_entry(family: str, device: str, entry: Mapping[str, Any]) -> Iterator[None]:
    """Puts an entry before all others of a device's table for the duration of a `with`."""
    original = tuned.entries

    def entries(a_family: str, a_device: str) -> list[dict[str, Any]]:
        first = [dict(entry)] if (a_family, a_device) == (family, device) else []
        return first + original(a_family, a_device)

    def replace(function: Callable[[str, str], list[dict[str, Any]]]) -> None:
        tuned.entries = function  # type: ignore[assignment]
        tuned._lookup.cache_clear()
        tuned._rules.cache_clear()

    replace(entries)
    try:
        yield
    finally:
        replace(original)


def pair_loss(op: str, dim: int, trained: bool = False, backend: str | None = None, rows: int = ROWS) -> Call:
    from lift_fast.ops.pairs.contrastive import contrastive
    from lift_fast.ops.pairs.sigmoid import sigmoid

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
    from lift_fast.ops.attention.op import attention as op

    qkv = torch.randn(BATCH, tokens, 3, 12, head_dim, device="cuda").bfloat16().requires_grad_()
    seed = torch.randn(BATCH, tokens, 12, head_dim, device="cuda").bfloat16()
    return lambda: torch.autograd.grad(op(qkv), [qkv], seed)


def layernorm(width: int, backend: str | None = None) -> Call:
    from lift_fast.ops.transformer.layernorm import layernorm as op

    x, residual, seed = (torch.randn(BATCH * TOKENS, width, device="cuda").bfloat16() for _ in range(3))
    weight, bias = (torch.randn(width, device="cuda").requires_grad_() for _ in range(2))
    leaves = [x.requires_grad_(), residual.requires_grad_(), weight, bias]
    return lambda: torch.autograd.grad(op(x, weight, bias, residual=residual, backend=backend)[0], leaves, seed)


def mlp(width: int, backend: str | None = None) -> Call:
    from lift_fast.ops.transformer.mlp import mlp as op

    shapes = (BATCH * TOKENS, width), (4 * width, width), (4 * width,), (width, 4 * width), (width,)
    leaves = [torch.randn(shape, device="cuda").bfloat16().requires_grad_() for shape in shapes]
    seed = torch.randn(BATCH * TOKENS, width, device="cuda").bfloat16()
    return lambda: torch.autograd.grad(op(*leaves, backend=backend), leaves, seed)


DIMS = {256: [None, 511], 768: [512, 1023], 1536: [1024, 2047], 4096: [2048, None]}  # measured dim -> its entry's range
BLOCKS = [1024, 4096], [2048, 2048], [2048, 4096], [2048, 8192], [4096, 4096], [4096, 8192]
BANDS = tuple({"bytes": size * MIB} for size in (256, 512, 1024, 2048))
KEEPS = None, {"share_of_free": 0.5}


# ROWS, COLS, DEPTH, warps, stages, registers: kernels/pairs.py's TileConfig.
PAIR_TILES = (
    [128, 128, 64, 8, 4, 128],
    [128, 128, 64, 8, 2, 128],
    [128, 128, 32, 8, 4, 128],
    [128, 256, 64, 8, 3],
    [128, 64, 64, 4, 4, 128],
)
STORED_TILES = [64, 64, 0, 4, 1], [32, 128, 0, 8, 1], [128, 64, 0, 8, 1], [64, 128, 0, 8, 1]
MAX_TILES = 7
TOLERANCE = 2e-2  # in relative norm


def sweeps(device: str) -> Iterator[Sweep]:
    """Yields the sweeps, those of the largest effect first."""

    def known(setting: str, when: Mapping[str, Any], values: tuple[Any, ...], build: Callable[[], Call], **facts: Any):
        """A sweep of a setting of the pair losses; a line with a note if the table has no value for these facts."""
        try:
            present = tuned.lookup("pairs", device, setting, **facts)
        except LookupError as error:
            lines.write({"phase": "tune", "note": f"pairs {setting} {facts}: {error!r}"})
            return
        yield Sweep("pairs", setting, present, when, values, build)

    loss = partial(pair_loss, "contrastive")
    for dim in (768, 4096, 1536, 256):
        when = {"dim": DIMS[dim], "itemsize": 2}
        yield from _orders("pairs", device, when, {"dim": dim, "itemsize": 2}, partial(loss, dim))
    for dim, span in ((768, [None, 1023]), (4096, [1024, None])):
        yield from known("block", {"dim": span}, BLOCKS, partial(loss, dim, False, "cuda"), dim=dim)
    for tokens in (TOKENS, 577):
        facts = {"tokens": tokens, "head_dim": 64, "causal": False}
        yield from _orders("attention", device, {"tokens": [tokens, tokens]}, facts, partial(attention, tokens))
    yield from _orders("transformer", device, {}, {}, _both)
    fused, stored = partial(loss, 768, False, "triton"), partial(loss, 1536, False, "triton")
    yield from known("fused_up_to", {}, (511,), fused)  # dim 768 from scores by cuBLAS
    yield from known("fused_up_to", {}, (2047,), stored)  # dim 1536 by the fused kernels
    for kind in ("stats", "grad"):
        yield from known("form", {"kind": kind}, ("persistent",), fused, kind=kind)
    yield from known("tile", {"aligned": True}, PAIR_TILES, fused, aligned=True, kind="stats")
    yield from known("stored", {}, STORED_TILES, stored)
    yield from _tiles(device)
    for trained in (False, True):
        yield from known("band", {"trained": trained}, BANDS, partial(loss, 4096, trained, "cuda"), trained=trained)
    for dim in (768, 1536):
        when, facts = {"dim": DIMS[dim], "itemsize": 2}, {"dim": dim, "itemsize": 2, "backend": "cuda"}
        yield from known("keep", when, KEEPS, partial(loss, dim, False, "cuda"), **facts)


def _both() -> Call:
    """layernorm and mlp, which share their order of backends."""
    calls = layernorm(768), mlp(768)
    return lambda: [call() for call in calls]


def _orders(
    family: str, device: str, when: Mapping[str, Any], facts: Mapping[str, Any], build: Callable[[], Call]
) -> Iterator[Sweep]:
    """Sweeps the order of the backends: each available one first, the rest in their present order.

    torch, the fallback, is never put first.
    """
    from lift_fast.ops.attention import contract as attentions
    from lift_fast.ops.pairs import contract as pairs
    from lift_fast.ops.transformer import contract as transformers

    known = {"pairs": pairs.BACKENDS, "attention": attentions.BACKENDS, "transformer": transformers.BACKENDS}[family]
    entry = _entry(family, device, "backend", facts)
    if entry:
        present = entry["value"]
        candidates = [name for name in present if name in known.here("cuda") and name != "torch"]
        orders = [[name, *(other for other in present if other != name)] for name in candidates]
        yield Sweep(family, "backend", present, when, tuple(orders), build)


# (family, setting of a kernel, the facts with which it is looked up, the call that looks it up)
KERNELS: tuple[tuple[str, str, Mapping[str, Any], Callable[[], Call]], ...] = (
    ("attention", "backward", {"tokens": TOKENS, "head_dim": 64, "causal": False}, partial(attention, TOKENS)),
    ("attention", "forward", {"tokens": TOKENS, "head_dim": 64, "causal": False}, partial(attention, TOKENS)),
    ("transformer", "layernorm_backward", {"width": 768, "itemsize": 2}, partial(layernorm, 768, "triton")),
    ("transformer", "linear_act_backward", {"aligned": True, "width": 3072}, partial(mlp, 768, "triton_gemm")),
    ("transformer", "linear_act", {"aligned": True, "width": 3072}, partial(mlp, 768, "triton_gemm")),
    ("transformer", "bias_act_backward", {"width": 3072, "itemsize": 2}, partial(mlp, 768, "triton")),
    ("transformer", "layernorm", {"width": 768, "itemsize": 2}, partial(layernorm, 768, "triton")),
    ("transformer", "bias_act", {"width": 3072, "itemsize": 2}, partial(mlp, 768, "triton")),
)


def _tiles(device: str) -> Iterator[Sweep]:
    """Sweeps each kernel's tile: the variants of its present one, and the tiles in other devices' tables."""
    for family, setting, facts, build in KERNELS:
        entry = _entry(family, device, setting, facts)
        if entry and isinstance(entry["value"], dict):
            tables = [one for name in tuned.devices(family) if name != "cpu" for one in tuned.entries(family, name)]
            others = [one["value"] for one in tables if one["setting"] == setting and isinstance(one["value"], dict)]
            several = [*variants(entry["value"]), *others]
            values = tuple(value for number, value in enumerate(several) if value not in several[:number])
            yield Sweep(family, setting, entry["value"], entry["when"], values[:MAX_TILES], build)


def variants(tile: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields tiles that differ in one number: doubled or halved, or one stage more or less."""
    for name, change in (("warps", (2, 0.5)), ("rows", (0.5, 2)), ("elements", (2, 0.5)), ("a_warp", (2, 0.5))):
        if name in tile:
            yield from ({**tile, name: int(tile[name] * factor)} for factor in change if tile[name] * factor >= 1)
    if "stages" in tile:
        yield from ({**tile, "stages": tile["stages"] + step} for step in (1, -1) if tile["stages"] + step >= 1)


def _entry(family: str, device: str, setting: str, facts: Mapping[str, Any]) -> dict[str, Any] | None:
    """The entry that a lookup with these facts takes; rules about facts that are not given are ignored."""
    if device not in tuned.devices(family):
        return None
    for entry in tuned.entries(family, device):
        rules = entry["when"].items()
        if entry["setting"] == setting and all(tuned.holds(facts[name], rule) for name, rule in rules if name in facts):
            return entry
    return None


def _tensors(results: Any) -> list[Tensor]:
    """Copies of the tensors in a call's results, in order."""
    if isinstance(results, Tensor):
        return [results.detach().clone()]
    return [one for part in results for one in _tensors(part)] if isinstance(results, (list, tuple)) else []


def _largest_error(got: list[Tensor], want: list[Tensor]) -> float:
    """The largest error of a tensor in relative norm; 0 where `want` is almost zero, infinite for NaN."""
    largest = 0.0
    for one, other in zip(got, want, strict=True):
        size = float(other.float().norm())
        error = float((one.float() - other.float()).norm()) / size if size > 1e-6 else 0.0
        largest = max(largest, error if error == error else float("inf"))
    return largest


def _call_in_words(build: Callable[[], Call]) -> str:
    """The call as text, e.g. "pair_loss('contrastive', 768)"."""
    if not isinstance(build, partial):
        return build.__name__
    return f"{build.func.__name__}({', '.join(map(repr, build.args))})"


def measure(sweep: Sweep, device: str) -> None:
    """Writes a line per value. The line of a value that fails, or changes the results, has a note and no times."""
    values = [sweep.present, *(value for value in sweep.values if value != sweep.present)]
    if len(values) == 1:
        return
    op_call = sweep.build()
    calls: dict[int, Call] = {}
    expected: list[Tensor] = []
    case: dict[str, Any] = {"phase": "tune", "family": sweep.family, "device": device, "setting": sweep.setting}
    case |= {"when": dict(sweep.when), "case": _call_in_words(sweep.build), "gpu": torch.cuda.get_device_name(0)}
    for number, value in enumerate(values):
        entry = {"setting": sweep.setting, "when": sweep.when, "value": value}

        def call(entry: Mapping[str, Any] = entry) -> object:
            with with_first_entry(sweep.family, device, entry):
                return op_call()

        try:
            results = _tensors(call())
            torch.cuda.synchronize()
            expected = expected or results
            if not rehearsing() and (change := _largest_error(results, expected)) > TOLERANCE:
                raise ValueError(f"its results differ from those of the present value by {change:.2g} in relative norm")
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
    parser.add_argument("--seconds", type=float, required=True, help="start no further sweep after this time")
    parser.add_argument("--short", action="store_true", help="only two sweeps")
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
