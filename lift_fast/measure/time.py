"""Milliseconds: medians of repeated calls, of alternatives in turn, and of the part of a step spent on text.

Kept by hand for a reason: torch.utils.benchmark times one alternative after the other, so that a machine which slows
down in between favours the first. Here they are interleaved, and a drift affects all of them alike.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import median, quantiles
from time import perf_counter
from typing import Literal, NamedTuple, Protocol, TypeVar

import torch

from ..nn import Clip
from ..ops.rows.quantized import QuantizedRows

K = TypeVar("K", bound=Hashable)


class Timing(NamedTuple):
    """Milliseconds a call: the median, and the interquartile range."""

    median: float
    spread: float


class Rows(Protocol):
    """The part of cache.Cache that lift_text_ms uses."""

    def __len__(self) -> int: ...

    def rows(self, rows: torch.Tensor) -> QuantizedRows: ...


def median_ms(
    fn: Callable[[], object], repeats: int = 20, warmup: int = 3, device: str | torch.device = "cpu"
) -> float:
    """Median milliseconds of `fn()`, on a CUDA device with a sync before and after."""
    return interleaved_ms({"": fn}, repeats, warmup, device)[""].median


def interleaved_ms(
    fns: Mapping[K, Callable[[], object]],
    repeats: int = 20,
    warmup: int = 3,
    device: str | torch.device = "cpu",
) -> dict[K, Timing]:
    """Times each of `fns`, called in turn `repeats` times after `warmup` rounds that are not timed.

    Each round starts with the next of them, so that none always runs right after the same one and finds its data in
    the caches.
    """
    cuda = torch.device(device).type == "cuda"
    names = list(fns)
    samples: dict[K, list[float]] = {name: [] for name in names}
    for turn in range(-warmup, repeats):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            if cuda:
                torch.cuda.synchronize(device)
            start = perf_counter()
            fns[name]()
            if cuda:
                torch.cuda.synchronize(device)
            elapsed = perf_counter() - start
            if turn >= 0:
                samples[name].append(elapsed * 1e3)
    return {name: Timing(median(times), quartile_distance(times)) for name, times in samples.items()}


def quartile_distance(times: list[float]) -> float:
    """The interquartile range; 0 for fewer than two times."""
    if len(times) < 2:
        return 0.0
    low, _, high = quantiles(times, n=4, method="inclusive")
    return high - low


def lift_text_ms(
    caches: Mapping[K, Rows],
    batch_size: int,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    repeats: int = 300,
    seed: int = 0,
) -> dict[K, Timing]:
    """The time a step of LIFT spends on text, for each cache: gather the batch's rows, move them, widen them.

    Each call takes other rows, drawn with replacement before the clock starts (in training they come with the
    batch). dtype: the one that the loss computes in. The CPU's part runs on one thread: a call is so short that on
    a busy machine two threads would mostly wait for each other.
    """
    warmup = 20
    generator = torch.Generator().manual_seed(seed)

    def step(cache: Rows) -> Callable[[], object]:
        batches = iter(torch.randint(len(cache), (warmup + repeats, batch_size), generator=generator))
        return lambda: cache.rows(next(batches)).to(device).widen(dtype)

    with _one_thread():
        return interleaved_ms({name: step(cache) for name, cache in caches.items()}, repeats, warmup, device)


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def clip_text_ms(
    models: Mapping[K, tuple[Clip, Sequence[str]]],
    precision: Literal["bf16", "fp32"] = "fp32",
    device: str | torch.device = "cpu",
    repeats: int = 5,
    seed: int = 0,
) -> dict[K, Timing]:
    """The time a step of CLIP spends on text, for each model and its batch of captions: tokenise to the model's
    context, text tower and projection forward, and backward from a fixed random gradient.

    The models must be on `device`; the gradients of their text parameters are cleared.
    """
    # Not at the top: the benchmarks of the ops run where the tokenizer is not installed.
    from ..text.tokenizer import ClipTokenizer

    warmup = 1
    kind = torch.device(device).type
    generator = torch.Generator().manual_seed(seed)

    def step(model: Clip, captions: Sequence[str]) -> Callable[[], None]:
        tokenize = ClipTokenizer(model.text.config.context)
        shape = len(captions), model.text_projection.out_features
        upstream = torch.randn(shape, generator=generator).to(device)

        def run() -> None:
            tokens = tokenize(captions).to(device)
            with torch.autocast(kind, torch.bfloat16, enabled=precision == "bf16"):
                features = model.encode_text(tokens)
            features.backward(upstream.to(features.dtype))
            model.text.zero_grad()
            model.text_projection.zero_grad()

        return run

    steps = {name: step(model, captions) for name, (model, captions) in models.items()}
    return interleaved_ms(steps, repeats, warmup, device)
