"""Conditioned text: the rate of `tools.condition` against the GEMM rate, and what shorter vectors save in training.

part condition: an int8 cache of 10^6 rows of 4096 (--quick: 20 000) in shards of 10 000 rows is conditioned to 4096 and
to 1024 dims, as int8. The time includes all that the command does: reading files that are not in memory, checksums,
widening, the formula, encoding and writing. After every shard products of the same block shape are timed by themselves,
torch.mm of float32 [1024, 4096] x [4096, dim], and that time is taken off: "of the GEMM rate" is the mean of these
times, for as many rows, over the time of the command. The fit, statistics of 16 384 rows and the eigenvectors, is
measured separately. Codes are random, and those of all shards are the same but for their scales, as the time does not
depend on them. 10^6 rows need 8.3 GB of disk, in TMPDIR.

part dims: forward and backward of LIFT's head and loss, B = 4096, against the dims of the text, which is int8 rows. The
head begins with features of ViT-B/16 (768) and of tiny (192), whose gradient is computed too.
"""

import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from threading import Event, Thread
from types import TracebackType
from typing import Any
from unittest.mock import patch

import torch

from lift_fast.cache import Cache, CacheWriter, tools
from lift_fast.cache.conditioning import Conditioning, fit
from lift_fast.losses import contrastive
from lift_fast.measure.time import interleaved_ms
from lift_fast.nn.head import Head
from lift_fast.ops.rows.codecs import CODECS
from lift_fast.ops.rows.quantized import QuantizedRows

from .bench_cache import drop
from .bench_search import own_memory
from .harness import Suite

SOURCE_DIM, DIMS = 4096, (4096, 1024)
ROWS, QUICK_ROWS, SHARD = 1_000_000, 20_000, 10_000
FITTED = 16_384  # rows of the sample, as many as the commands take by default
BLOCK = 1024  # rows of a product
LEAST_PRODUCTS = 20  # that are timed in a run
B = 4096
TOWERS = {768: (4096, 2048, 1024), 192: (384, 192, 96)}  # width of the image tower's features -> dims of the text
MOST_MEMORY = 2048  # MiB


def source_cache(folder: Path, rows: int) -> Cache:
    """An int8 cache of random rows in shards of SHARD rows."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.empty((SHARD, SOURCE_DIM), dtype=torch.uint8).random_(1, 256, generator=generator) - 128
    sizes = [min(SHARD, rows - first) for first in range(0, rows, SHARD)]
    shards = [{"name": f"{k:05d}.tar", "samples": size} for k, size in enumerate(sizes)]
    writer = CacheWriter(folder, SOURCE_DIM, "int8", {"name": "none"}, shards, "txt")
    for number in writer.missing():
        count = sizes[number]
        scales = 0.1 + torch.rand(count, generator=generator)
        part = QuantizedRows(codes[:count].view(torch.int8), scales, "int8", SOURCE_DIM)
        writer.write_shard(number, part, range(number * SHARD, number * SHARD + count))
    writer.finish()
    return Cache(folder)


class Memory:
    """The most memory of this process inside a `with` block: resident, and without mapped files (every 20 ms)."""

    def __enter__(self) -> "Memory":
        self.anonymous, self._ended = own_memory(), Event()
        Path("/proc/self/clear_refs").write_text("5")  # sets the peak to what is resident now
        self._thread = Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._ended.wait(0.02):
            self.anonymous = max(self.anonymous, own_memory())

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._ended.set()
        self._thread.join()
        status = Path("/proc/self/status").read_text()
        self.resident = 1024 * int(status.partition("VmHWM:")[2].split()[0])

    def columns(self) -> dict[str, float]:
        return {"peak_mib": self.resident / 2**20, "without_mapped_files_mib": self.anonymous / 2**20}


def condition(suite: Suite) -> None:
    """The fit and the conditioning of a cache, for all dims and for a quarter of them."""
    rows = QUICK_ROWS if suite.quick else ROWS
    with tempfile.TemporaryDirectory(prefix="bench-conditioning-") as folder:
        source = source_cache(Path(folder) / "source", rows)
        case: dict[str, Any] = {"rows": rows, "source_dim": SOURCE_DIM, "threads": torch.get_num_threads()}
        with Memory() as memory:
            began = time.perf_counter()
            statistics = tools.statistics_of(source, FITTED, progress=False)
            case["statistics_s"] = time.perf_counter() - began
            fitted = []
            for dim in DIMS:
                began = time.perf_counter()
                conditioning = fit([statistics], power=0.5, dim=dim)
                fitted.append((conditioning, time.perf_counter() - began))
        suite.bar("fit: peak memory without mapped files, MiB", memory.anonymous / 2**20, MOST_MEMORY, at_most=True)
        del statistics
        for conditioning, seconds in fitted:
            drop(sorted(source.folder.iterdir()))
            _condition(suite, Cache(source.folder), Path(folder) / "out", conditioning, {**case, "fit_s": seconds})


def _condition(suite: Suite, source: Cache, out: Path, conditioning: Conditioning, case: dict[str, Any]) -> None:
    dim, rows = conditioning.dim, len(source)
    x, weight, y = torch.randn(BLOCK, SOURCE_DIM), torch.randn(dim, SOURCE_DIM), torch.empty(BLOCK, dim)
    products: list[float] = []

    def product() -> None:
        began = time.perf_counter()
        torch.mm(x, weight.T, out=y)
        products.append(time.perf_counter() - began)

    class Writer(CacheWriter):
        """Times products after each shard."""

        def write_shard(
            self, number: int, part: QuantizedRows, keys: Sequence[int], skipped: Sequence[int] = ()
        ) -> None:
            super().write_shard(number, part, keys, skipped)
            for _ in range(-(-LEAST_PRODUCTS // len(source.manifest.shards))):
                product()

    product()
    products.clear()
    with Memory() as memory, patch.object(tools, "CacheWriter", Writer):
        began = time.perf_counter()
        tools.condition(source, out, conditioning, progress=False)
        seconds = time.perf_counter() - began - sum(products)
    gemm = sum(products) / len(products) * rows / BLOCK
    made = tools.info(Cache(out))
    suite.add(
        {
            **case,
            "dim": dim,
            "condition_s": seconds,
            "rows_per_s": rows / seconds,
            "gemm_s": gemm,
            "of_gemm": gemm / seconds,
            "in_all_s": case["statistics_s"] + case["fit_s"] + seconds,
            **memory.columns(),
            "bytes a row": sum(path.stat().st_size for path in out.glob("text-*")) / made["rows"],
        }
    )
    suite.bar(f"condition to {dim} dims: of the GEMM rate", gemm / seconds, 0.6)
    most = memory.anonymous / 2**20
    suite.bar(f"condition to {dim} dims: peak memory without mapped files, MiB", most, MOST_MEMORY, at_most=True)
    shutil.rmtree(out)


def dims(suite: Suite) -> None:
    """Time of head and loss, and bytes of a cached row, against the dims of the text."""
    for width, lengths in TOWERS.items():
        for dtype in ("fp32", "bf16"):
            calls = {dim: step(width, dim, dtype == "bf16") for dim in lengths}
            timings = interleaved_ms(calls, min(suite.repeats, 9), warmup=suite.least - 2)
            case = {"rows": B, "width": width, "dtype": dtype, "threads": torch.get_num_threads()}
            for dim in lengths:
                row = CODECS["int8"].row_bytes(dim) + 4 + 8  # codes, scale, key hash
                median, spread = timings[dim]
                suite.add({**case, "dim": dim, "median_ms": median, "spread_ms": spread, "bytes a row": row})
            for dim in lengths[1:]:
                share = lengths[0] / dim
                faster = timings[lengths[0]].median / timings[dim].median / share
                name = f"head and loss, width {width}, {dtype}, {dim} of {lengths[0]} dims"
                suite.bar(f"{name}: ratio of times over ratio of dims", faster, 1)
                if dtype == "fp32":
                    full, short = (CODECS["int8"].row_bytes(d) + 12 for d in (lengths[0], dim))
                    suite.bar(f"{name}: ratio of bytes over ratio of dims", full / short / share, 1, 0.1)


def step(width: int, dim: int, bf16: bool) -> Callable[[], None]:
    """Forward and backward of a head and the contrastive loss, with gradients of the head and of the features."""
    torch.manual_seed(0)
    head, features = Head(width, dim), torch.randn(B, width, requires_grad=True)
    scale = torch.tensor(14.3, requires_grad=True)
    codes = torch.randint(-127, 128, (B, dim), dtype=torch.int8)
    text = QuantizedRows(codes, codes.float().norm(dim=1).reciprocal(), "int8", dim)
    inputs = [features, scale, *head.parameters()]

    def call() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16) if bf16 else nullcontext():
            loss = contrastive(head(features), text, scale, normalize=True)
        torch.autograd.grad(loss, inputs)

    return call


PARTS: dict[str, Callable[[Suite], None]] = {"dims": dims, "condition": condition}


def run(suite: Suite) -> None:
    for name, part in PARTS.items():
        if suite.over():
            suite.note(f"{name} was not measured: out of time")
            continue
        part(suite)


def test_head_and_loss(benchmark):
    benchmark(step(192, 96, False))
