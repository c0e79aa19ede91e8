"""Shared by the benchmarks of the pair losses: inputs, interleaved timing, peak memory and errors, one row per rival.

Every rival, including ours, gets the same contiguous features and number of threads, is called once before it is timed,
and computes its loss and the gradients of the images, of the text if it is trained, of logit_scale and of logit_bias.

`python -m benchmarks.pairs JSON` measures memory: it prints the peak of one rival on the CPU, in a new process.
"""

import ctypes
import importlib
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lift_fast.measure.machine import machine
from lift_fast.measure.time import Timing, interleaved_ms, median_ms
from lift_fast.ops import tuned
from lift_fast.ops.pairs.contract import choose
from lift_fast.ops.rows.quantized import QuantizedRows

from .harness import Suite
from .launches import launches, registers

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LOGIT_SCALE = 1 / 0.07  # CLIP's initial value
OURS, LEAN, GEMM = "lift_fast", "lift_fast lean", "torch.mm"
COMPILED = "open_clip compiled"
SAMPLE = 256  # rows whose gradients are compared with float64

Loss = Callable[..., Tensor]  # image, text, logit_scale[, logit_bias] -> the loss
Step = Callable[[], tuple[Tensor, tuple[Tensor | None, ...]]]
Key = tuple[str, str]  # rival, text: "frozen", "trainable" or "int8"


class Case(NamedTuple):
    rows: int
    dim: int
    dtype: str
    trainable: bool

    @property
    def text(self) -> str:
        return "trainable" if self.trainable else "frozen"

    @property
    def gemm_flops(self) -> int:
        return 2 * self.rows**2 * self.dim

    @property
    def flops(self) -> int:
        """The fewest possible: the scores, the images' gradient, and the text's if it is trained."""
        return (3 if self.trainable else 2) * self.gemm_flops

    def __str__(self) -> str:
        return f"B = {self.rows}, D = {self.dim}, {self.dtype}, {self.text} text"


class Truth(NamedTuple):
    """The loss and the gradients of the sampled rows, in float64."""

    loss: Tensor
    image: Tensor
    text: Tensor


class Op(NamedTuple):
    """A loss: its implementations on a device (ours and others), and its definition in float64."""

    suite: str
    parameters: tuple[float, ...]  # logit_scale[, logit_bias]
    rivals: Callable[[str, Callable[[str], None]], dict[str, Loss]]  # (device, note)
    truth: Callable[..., Truth]  # (image, text, *parameters, sample), float64


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def fits(rows: int) -> bool:
    """Whether the six float32 matrices of rows x rows that dense rivals need fit into the CPU's memory."""
    return 6 * 4 * rows**2 < machine()["memory_gib"] * 2**30


def features(case: Case, device: str) -> tuple[Tensor, Tensor]:
    """Unit rows in the case's dtype; the cosine of a positive is about 1/2, of a negative that of random directions."""
    generator = torch.Generator(device).manual_seed(case.rows + case.dim)
    shape = case.rows, case.dim
    text = F.normalize(torch.randn(shape, generator=generator, device=device), dim=1)
    other = F.normalize(torch.randn(shape, generator=generator, device=device), dim=1)
    image = F.normalize(text + 3**0.5 * other, dim=1)
    dtype = DTYPES[case.dtype]
    return image.to(dtype).requires_grad_(), text.to(dtype).requires_grad_(case.trainable)


def compiled(loss: Loss) -> Loss:
    """The loss under torch.compile, set up at the first call because importing the compiler takes seconds."""
    cached: list[Loss] = []

    def call(*arguments: Any) -> Tensor:
        if not cached:
            cached.append(torch.compile(loss, dynamic=False))
        return cached[0](*arguments)

    return call


def quantized(text: Tensor) -> QuantizedRows:
    """The rows as int8 codes with a float32 scale each, rounded to nearest."""
    wide = text.detach().float()
    scales = wide.abs().amax(dim=1) / 127
    return QuantizedRows((wide / scales[:, None]).round().to(torch.int8), scales, "int8", wide.shape[1])


def parameters(op: Op, device: str) -> list[Tensor]:
    return [torch.tensor(value, device=device, requires_grad=True) for value in op.parameters]


def step(loss: Loss, image: Tensor, text: Tensor | QuantizedRows, scalars: list[Tensor]) -> Step:
    """A call that returns the loss and its gradients for the inputs that need one."""
    leaves = [x for x in (image, text, *scalars) if isinstance(x, Tensor) and x.requires_grad]

    def run() -> tuple[Tensor, tuple[Tensor | None, ...]]:
        value = loss(image, text, *scalars)
        # Some rivals have no gradient for the scale.
        return value.detach(), torch.autograd.grad(value, leaves, allow_unused=True)

    return run


@contextmanager
def unneeded_gradients() -> Iterator[list[torch.Size]]:
    """Lists the shapes of the gradients that autograd functions in Python return for inputs that need none.

    0-d gradients do not count, nor gradients that a function computes without returning them.
    """
    kind = torch.autograd.function.BackwardCFunction
    found: list[torch.Size] = []
    plain = kind.apply

    def apply(self: Any, *upstream: Any) -> Any:
        grads = plain(self, *upstream)
        several = grads if isinstance(grads, tuple) else (grads,)
        for grad, needed in zip(several, self.needs_input_grad, strict=False):
            if isinstance(grad, Tensor) and grad.dim() and not needed:
                found.append(grad.shape)
        return grads

    kind.apply = apply  # type: ignore[method-assign]
    try:
        yield found
    finally:
        kind.apply = plain  # type: ignore[method-assign]


def measure(
    suite: Suite,
    op: Op,
    case: Case,
    only: frozenset[str] | None = None,
    errors: bool = True,
    memory: bool = True,
    int8: bool = True,
    least_repeats: int | None = None,
    without: frozenset[str] = frozenset(),
) -> dict[Key, dict[str, Any]]:
    """Adds a row for each rival in `only` (None: all) that is not in `without`, and for torch.mm of the same shape.

    Returns the rows by rival and text. With frozen text and `int8`, ours has a second row for int8 text. A rival that
    fails (an unsupported shape, out of memory) gets a note and no row.
    """
    where = device()
    if suite.over():
        suite.note(f"out of time: not measured: {case}")
        return {}
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()  # each shape is compiled separately
    image, text = features(case, where)
    scalars = parameters(op, where)
    texts: dict[str, Tensor | QuantizedRows] = {case.text: text}
    if int8 and not case.trainable:
        texts["int8"] = quantized(text)
    steps: dict[Key, Step] = {}
    for what, loss in op.rivals(where, suite.note).items():
        for kind in texts if what == OURS else (case.text,):
            if (only is None or what in only) and what not in without:
                steps[what, kind] = step(loss, image, texts[kind], scalars)

    found: dict[Key, dict[str, float]] = {}
    seconds: dict[Key, float] = {}  # of the last call before the timing
    kernels: dict[Key, dict[str, dict[str, int]]] = {}
    extra: set[Key] = set()  # rivals that computed gradients that are not needed
    truths: dict[str, Truth] = {}
    sample = torch.arange(0, case.rows, -(-case.rows // SAMPLE), device=where)
    for (what, kind), call in list(steps.items()):
        if suite.over():
            suite.note(f"out of time: not measured: {what}, {kind} text: {case}")
            del steps[what, kind]
            continue
        try:
            figures: dict[str, float] = {}
            if what == COMPILED:
                call()
            begun = time.perf_counter()
            with unneeded_gradients() as gradients, launches() as kernels[what, kind]:
                result = call()
            seconds[what, kind] = time.perf_counter() - begun
            if gradients:
                extra.add((what, kind))
            if errors:
                if kind not in truths:
                    truths[kind] = _truth(op, image, texts[kind], sample)
                figures |= _errors(result, truths[kind], sample, case.trainable)
            del result
            if where == "cuda":  # in a second call, since the first compiles kernels
                figures["extra_mib"], seconds[what, kind] = _cuda_peak(call)
            elif memory:
                figures["extra_mib"] = cpu_peak(op, case, what, kind)
            found[what, kind] = figures
        except Exception as error:  # a rival may raise anything; the remaining ones are measured
            suite.note(f"{what}, {kind} text: {case}: {one_line(error)}")
            del steps[what, kind]
            seconds.pop((what, kind), None)
            if where == "cuda":
                torch.cuda.empty_cache()
    truths.clear()

    calls: dict[Key, Callable[[], object]] = dict(steps)
    product_key = GEMM, case.text
    left, right = image.detach(), text.detach().T
    # On a GPU torch.mm allocates its result, as rivals do: with torch's caching allocator that takes no time.
    product = torch.empty((case.rows, case.rows), dtype=image.dtype) if where == "cpu" else None
    calls[product_key] = lambda: torch.mm(left, right, out=product)
    try:
        seconds[product_key] = median_ms(calls[product_key], 1, 1, where) / 1e3
        timings, repeats = _timed(suite, calls, seconds, where, least_repeats or suite.least)
    except torch.OutOfMemoryError as error:
        suite.note(f"timing: {case}: {one_line(error)}")
        return {}
    added = {}
    gemm = timings[product_key]
    for (what, kind), (median, spread) in timings.items():
        flops = case.gemm_flops if what == GEMM else case.flops
        figures = found.get((what, kind), {})
        row = {
            "rows": case.rows,
            "dim": case.dim,
            "dtype": case.dtype,
            "text": kind,
            "what": what,
            "device": where,
            "threads": torch.get_num_threads() if where == "cpu" else None,
            "repeats": repeats[what, kind],
            "median_ms": median,
            "spread_ms": spread,
            "tflop_per_s": flops / median / 1e9,
            "of_gemm": flops / case.gemm_flops * gemm.median / median,
            "extra_mib": figures.get("extra_mib"),
            "loss_error": figures.get("loss_error"),
            "grad_error": figures.get("grad_error"),
        }
        if (what, kind) in extra:
            row["extra_gradients"] = True
        launched = kernels.get((what, kind), {})
        by = _settings(image, case) if what == OURS else {}
        suite.add(row, flops=flops, kernels=launched or None, registers=registers(launched), **by)
        added[what, kind] = row
    return added


def _timed(
    suite: Suite,
    calls: Mapping[Key, Callable[[], object]],
    seconds: Mapping[Key, float],
    where: str,
    least: int,
) -> tuple[dict[Key, Timing], dict[Key, int]]:
    """Interleaved timings of all calls and the number of repeats, as many as fit into the time for a case.

    A call that would alone use up that time is not repeated; the time of its last call counts.
    """
    spend, slow = (10.0, 120.0) if where == "cpu" else (2.0, 1.0)
    spend *= 1 if suite.quick else 4
    timings = {key: Timing(seconds[key] * 1e3, 0.0) for key in calls if seconds[key] > slow}
    repeats = dict.fromkeys(timings, 1)
    others = {key: call for key, call in calls.items() if key not in timings}
    if others:
        count = max(least, min(suite.repeats, int(spend / sum(seconds[key] for key in others))))
        timings |= interleaved_ms(others, count, 0, where)
        repeats |= dict.fromkeys(others, count)
    return timings, repeats


def _settings(image: Tensor, case: Case) -> dict[str, Any]:
    """The backend chosen for these features, and its settings for the score matrix."""
    backend, _, device = choose(image)
    found: dict[str, Any] = {"by": backend}
    facts = {"dim": case.dim, "itemsize": image.element_size(), "backend": backend, "trained": case.trainable}
    for setting in ("block", "band", "keep"):
        with suppress(LookupError):  # this backend does not have the setting
            found[setting] = tuned.lookup("pairs", device, setting, **facts)
    return found


def _truth(op: Op, image: Tensor, text: Tensor | QuantizedRows, sample: Tensor) -> Truth:
    wide = text.widen(torch.float64) if isinstance(text, QuantizedRows) else text.detach().double()
    return op.truth(image.detach().double(), wide, *op.parameters, sample)


def _errors(
    result: tuple[Tensor, tuple[Tensor | None, ...]], truth: Truth, sample: Tensor, trainable: bool
) -> dict[str, float]:
    """The loss's absolute error, and the larger of the image and text gradients' relative errors in norm."""
    loss, grads = result
    pairs = list(zip(grads, truth[1:], strict=False))[: 2 if trainable else 1]
    worst = max(relative_error(grad[sample], expected) for grad, expected in pairs if grad is not None)
    return {"loss_error": abs(float(loss.double() - truth.loss)), "grad_error": worst}


def relative_error(value: Tensor, expected: Tensor) -> float:
    """The norm of the difference over the norm of the expected value, in float64."""
    return float((value.double() - expected.double()).norm() / expected.double().norm())


def one_line(error: Exception) -> str:
    """The type of an error and the first line of its message, cut to 160 characters."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:160]}"


def _cuda_peak(call: Step) -> tuple[float, float]:
    """Peak MiB beyond what was allocated before one call, and its seconds."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    begun = time.perf_counter()
    call()
    torch.cuda.synchronize()
    elapsed = time.perf_counter() - begun
    return (torch.cuda.max_memory_allocated() - before) / 2**20, elapsed


def cpu_peak(op: Op, case: Case, what: str, kind: str) -> float:
    """MiB by which one call of a rival raises the peak resident set of a new process, gradients included.

    Raises RuntimeError with the last line of the process's stderr if it fails.
    """
    request = {"suite": op.suite, "case": case, "what": what, "kind": kind, "threads": torch.get_num_threads()}
    command = [sys.executable, "-m", "benchmarks.pairs", json.dumps(request)]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the memory probe failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return float(done.stdout.split()[-1])


def _probe(request: dict[str, Any]) -> float:
    torch.set_num_threads(request["threads"])
    op: Op = importlib.import_module(f"benchmarks.bench_{request['suite']}").OP
    loss = op.rivals("cpu", print)[request["what"]]

    def call(case: Case) -> Step:
        image, text = features(case, "cpu")
        return step(loss, image, quantized(text) if request["kind"] == "int8" else text, parameters(op, "cpu"))

    case = Case(*request["case"])
    # Starts thread pools and loads libraries before the measurement; torch.compile needs the same shape for that.
    call(case if request["what"] == COMPILED else case._replace(rows=64))()
    measured = call(case)
    ctypes.CDLL(None).malloc_trim(0)  # returns free memory to the system: reusing it would hide growth
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak (proc(5))
    measured()
    return (_status("VmHWM") - before) / 2**10


def _status(name: str) -> int:
    """A value of /proc/self/status, in KiB."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found, name
    return int(found.group(1))


if __name__ == "__main__":
    print(_probe(json.loads(sys.argv[1])))
