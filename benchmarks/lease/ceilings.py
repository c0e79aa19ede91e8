"""python -m benchmarks.lease.ceilings: measures the device's ceilings, and times the matrix products of our ops.

The ceilings are a copy and a large product. Each result is a line. The losses' products have float32 results, as in
the losses: the scores of a block of rows and columns, x @ tᵀ; the images' gradient of a band of rows, k @ t for weights
k [rows, texts]; and the texts' gradient, kᵀ @ x. The products of ViT-B/16 at batch 256 have bfloat16 results, as in
torch.
"""

import sys
from collections.abc import Callable, Iterator
from functools import partial

from .. import lines
from ..start import begin, rehearsing, small

TOKENS = 256 * 197
BLOCKS = [(2048, 4096, dim) for dim in (768, 4096)] + [(4096, 8192, dim) for dim in (768, 4096)]
BANDS = [(2048, 16384, dim) for dim in (768, 4096)] + [(2048, 65536, 768)]  # rows, texts, dim
VIT = {
    "qkv": (TOKENS, 768, 2304),
    "projection": (TOKENS, 768, 768),
    "up": (TOKENS, 768, 3072),
    "down": (TOKENS, 3072, 768),
    "up's weight": (3072, TOKENS, 768),
}
COPY = 1 << 30  # bytes


def measure() -> None:
    """Times every product; each has its rate as a share of the large product's."""
    import torch

    from lift_fast.measure.time import interleaved_ms

    repeats = 1 if rehearsing() else 15

    def timed(case: str, call: Callable[[], object], ceiling: float | None, **work: int) -> float:
        median, spread = interleaved_ms({"": call}, repeats, 3, "cuda")[""]
        (amount,) = work.values()
        rate = amount / median * 1e3
        unit = "gb_per_s" if "bytes" in work else "tflop_per_s"
        figures = {"median_ms": median, "spread_ms": spread, unit: rate / (1e9 if "bytes" in work else 1e12), **work}
        lines.write(
            {"phase": "ceilings", "case": case, "backend": "torch", **figures, "of_ceiling": ceiling and rate / ceiling}
        )
        print(f"{case}: {median:.3f} ms")
        return rate

    size = small(COPY // 4, 1 << 20)
    source = torch.randn(size, device="cuda")
    target = torch.empty_like(source)
    timed("stream copy", partial(target.copy_, source), None, bytes=8 * size)
    del source, target

    def product(case: str, m: int, k: int, n: int, float32: bool, ceiling: float | None) -> float:
        m, k, n = (small(one, min(one, 256)) for one in (m, k, n))
        left, right = (torch.randn(shape, device="cuda").bfloat16() for shape in ((m, k), (n, k)))
        if not float32:
            return timed(case, lambda: torch.mm(left, right.T), ceiling, flops=2 * m * k * n)
        out = torch.empty((m, n), device="cuda")
        call = lambda: torch.mm(left, right.T, out_dtype=torch.float32, out=out)  # noqa: E731
        return timed(case, call, ceiling, flops=2 * m * k * n)

    ceiling = product("gemm 8192^3", 8192, 8192, 8192, False, None)
    for case, (m, k, n), float32 in _our_products():
        product(case, m, k, n, float32, ceiling)


def _our_products() -> Iterator[tuple[str, tuple[int, int, int], bool]]:
    """Yields (case, (m, k, n), whether the result is float32)."""
    for rows, cols, dim in BLOCKS:
        yield f"scores {rows} x {cols}, D = {dim}", (rows, dim, cols), True
    for rows, cols, dim in BANDS:
        yield f"images' gradient {rows} x {dim}, of {cols}", (rows, cols, dim), True
        yield f"texts' gradient {cols} x {dim}, of {rows}", (cols, rows, dim), True
    for name, shape in VIT.items():
        yield f"vit-b16 {name}", shape, False


if __name__ == "__main__":
    begin()
    sys.exit(measure())
