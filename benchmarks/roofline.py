"""python -m benchmarks.roofline [--write]: limits, counts and an estimated time of each GPU kernel on an H100.

No figure was measured on our kernels. Limits come from published figures and measurements of the hardware (`H100`),
instructions per score from the compiled code (a test checks them). An estimate is the sum of the times that do not
overlap. --write writes docs/roofline.md, whose last column is empty until the kernels are measured on a GPU.
"""

import argparse
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lift_fast.ops import tuned
from lift_fast.ops.pairs import policy

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs" / "roofline.md"


@dataclass(frozen=True)
class Gpu:
    """Rates per second.

    flops: bfloat16 FLOPs of a large product. memory, l2: bytes read and written. instructions: instructions of single
    lanes, with 4 schedulers of 32 lanes on each multiprocessor.
    """

    flops: float
    memory: float
    l2: float
    instructions: float


# H100 SXM: an 8 192³ product and a device-to-device copy, as others measured them; the published L2 rate for reads;
# 132 multiprocessors at 1.755 GHz.
H100 = Gpu(798e12, 3.0e12, 5.5e12, 132 * 4 * 32 * 1.755e9)


def instructions(file: str) -> list[float]:
    """Instructions per score of each epilogue in a CUDA file on sm_90a, as its header states and a test checks."""
    head = (ROOT / "csrc" / "pairs" / file).read_text().split("#include")[0].replace("\n//", "")
    found = re.search(r"Instructions a score: ([\d.]+)(?: and ([\d.]+))?", head)
    assert found, file
    return [float(number) for number in found.groups() if number]


STATISTICS, GRADIENT = instructions("contrastive.cu")
(SIGMOID,) = instructions("sigmoid.cu")


@dataclass(frozen=True)
class Estimate:
    """Times of a case in seconds.

    by_products, by_memory: lower bounds for any kernel, from `flops` and `bytes`. seconds: the estimate for the form of
    our kernels that the tables choose.
    """

    case: str
    form: str
    flops: float
    bytes: float
    by_products: float
    by_memory: float
    seconds: float


def _estimate(
    case: str, form: str, flops: float, moved: float, seconds: Callable[[Gpu], float] | None = None, gpu: Gpu = H100
) -> Estimate:
    by_products, by_memory = flops / gpu.flops, moved / gpu.memory
    taken = max(by_products, by_memory) if seconds is None else seconds(gpu)
    return Estimate(case, form, flops, moved, by_products, by_memory, taken)


def contrastive(rows: int, dim: int, trained: bool = False) -> Estimate:
    """Forward and backward in bfloat16 with the settings of sm_90's table and 80 GB of free memory."""
    scores, product, needed = rows * rows, 2.0 * rows * rows * dim, 2 + trained
    backend = tuned.lookup("pairs", "sm_90", "backend", dim=dim, itemsize=2)[0]
    kept = policy.plan(rows, rows, dim, 2, backend, None, True, "sm_90", lambda: 80 * 10**9).kept / rows

    def fused(gpu: Gpu) -> float:
        """Products of the second program on a multiprocessor hide the epilogues; G is written and read."""
        return (needed + 1) * product / gpu.flops + 2 * scores / gpu.memory

    def separate(gpu: Gpu) -> float:
        """Kept products are written while the next are computed; the kernels between products overlap with nothing."""
        statistics = max(STATISTICS * scores / gpu.instructions, 4 * scores / gpu.l2)
        gradient = max(GRADIENT * scores / gpu.instructions, (4 * kept + 2) * scores / gpu.memory)
        return (needed + 1 - kept) * product / gpu.flops + statistics + gradient

    form = "fused" if backend == "triton" else "cuBLAS, scores kept" if kept == 1 else "cuBLAS, scores recomputed"
    name = f"contrastive, B = {rows:,}, D = {dim:,}, {'trained' if trained else 'frozen'} text"
    return _estimate(
        name, form, needed * product, 4.0 * rows * dim * needed, fused if backend == "triton" else separate
    )


def sigmoid(rows: int, dim: int) -> Estimate:
    """Forward and backward in bfloat16, frozen text."""
    scores, product = rows * rows, 2.0 * rows * rows * dim
    backend = tuned.lookup("pairs", "sm_90", "backend", dim=dim, itemsize=2)[0]

    def taken(gpu: Gpu) -> float:
        epilogue = max(SIGMOID * scores / gpu.instructions, 4 * scores / gpu.l2, 2 * scores / gpu.memory)
        return 2 * product / gpu.flops + (2 * scores / gpu.memory if backend == "triton" else epilogue)

    form = "fused" if backend == "triton" else "cuBLAS"
    return _estimate(f"sigmoid, B = {rows:,}, D = {dim:,}, frozen text", form, 2 * product, 8.0 * rows * dim, taken)


def epilogues() -> list[Estimate]:
    """The CUDA kernels between the products, for one block of scores in the L2 cache."""
    high, wide = tuned.lookup("pairs", "sm_90", "block", dim=4096)
    found = []
    for name, instructions, written in (
        ("statistics", STATISTICS, 0),
        ("gradient", GRADIENT, 2),
        ("sigmoid", SIGMOID, 2),
    ):
        scores = high * wide
        counted = f"CUDA, {instructions:g} instructions per score"

        def taken(gpu: Gpu, instructions=instructions, written=written, scores=scores) -> float:
            return scores * max(instructions / gpu.instructions, 4 / gpu.l2, written / gpu.memory)

        found.append(_estimate(f"{name} of {high:,} x {wide:,} scores", counted, 0, scores * (4.0 + written), taken))
    return found


def elementwise(tokens: int = 256 * 197, width: int = 768) -> list[Estimate]:
    """The operations of a ViT-B/16 block between its products, batch 256, bfloat16, if every byte moves once."""
    residual = f"{tokens:,} x {width:,}"
    hidden = f"{tokens:,} x {4 * width:,}"
    return [
        _estimate(f"layernorm with residual, {residual}", "memory", 0, 8.0 * tokens * width),
        _estimate(f"layernorm backward with y again, {residual}", "memory", 0, 10.0 * tokens * width),
        _estimate(f"bias and GELU, {hidden}", "memory", 0, 4.0 * tokens * 4 * width),
        _estimate(f"bias and GELU backward with a again, {hidden}", "memory", 0, 8.0 * tokens * 4 * width),
    ]


def attention(tokens: int = 197, heads: int = 12, head_dim: int = 64, batch: int = 256) -> list[Estimate]:
    """The Triton kernels in bfloat16. The limits count the tokens, the estimate counts padded tiles."""
    each, case = batch * heads, f"{tokens} x {heads} x {head_dim}, batch {batch}"
    size, product = 2.0 * each * tokens * head_dim, 2.0 * each * tokens**2 * head_dim
    rows, other = -(-tokens // 64) * 64, -(-tokens // 16) * 16
    padded = 2.0 * each * rows * other * head_dim  # FLOPs of one product of padded tiles
    return [
        _estimate(f"attention forward, {case}", "Triton", 2 * product, 4 * size),
        _estimate(f"attention backward with out again, {case}", "Triton, two passes", 6 * product, 8 * size,
                  lambda gpu: 9 * padded / (0.8 * gpu.flops)),  # a fifth of the time does not overlap
    ]  # fmt: skip


def gathers(rows: int = 4096, dim: int = 4096) -> list[Estimate]:
    """Cached rows decoded to bfloat16: reads codes, writes two bytes per element."""
    return [
        _estimate(f"{codec} to bf16, {rows:,} rows of {dim:,}", "memory", 0, rows * dim * (bits / 8 + 2))
        for codec, bits in (("int8", 8), ("int4r", 4), ("int2r", 2), ("bf16", 16))
    ]


def losses() -> list[Estimate]:
    """The cases of both losses on the page."""
    sizes = [(16384, 768), (16384, 4096), (65536, 768), (65536, 4096)]
    return [
        *(contrastive(*size) for size in sizes),
        contrastive(16384, 768, trained=True),
        contrastive(65536, 4096, trained=True),
        *(sigmoid(*size) for size in sizes),
    ]


INTRODUCTION = """# Limits, counts and estimates of the GPU kernels

Written by `python -m benchmarks.roofline --write`; a test checks that it is up to date. **No figure on this page was
measured on a GPU.** The limits are those of an H100 SXM: {flops:.0f} TFLOP/s in bfloat16 and {memory:.1f} TB/s of
memory, read and written, as others measured them; {l2:.1f} TB/s of L2 cache, as published; 132 multiprocessors of
4 × 32 lanes at 1.755 GHz. "By products" is the FLOPs that every method needs, "by memory" the bytes of inputs and
outputs, each divided by its rate. The estimate is the sum of the times that cannot overlap in the form that the tables
choose ([tuned.md](tuned.md)). For "fused" it assumes that Triton's products are as fast as cuBLAS's and that products
hide every epilogue; a measurement may disprove this. Instructions per score are counted in the compiled code by
test_pairs_sass.py. Times are in milliseconds: forward and backward for the losses, one launch for the kernels.
"""


def page() -> str:
    """The text of docs/roofline.md."""
    lines = [INTRODUCTION.format(flops=H100.flops / 1e12, memory=H100.memory / 1e12, l2=H100.l2 / 1e12)]
    parts = [
        ("The losses", losses()),
        ("Kernels between their products", epilogues()),
        ("Attention", attention()),
        ("Layer norm and activation", elementwise()),
        ("Cached rows", gathers()),
    ]
    for title, estimates in parts:
        lines.append(f"## {title}\n")
        lines.append("| case | form | GFLOP | MB | by products | by memory | estimate | measured |")
        lines.append("|-|-|-|-|-|-|-|-|")
        lines += [
            f"| {one.case} | {one.form} | {one.flops / 1e9:,.0f} | {one.bytes / 1e6:,.0f} | {_ms(one.by_products)} "
            f"| {_ms(one.by_memory)} | {_ms(one.seconds)} | |"
            for one in estimates
        ]
        lines.append("")
    return "\n".join(lines)


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.roofline")
    parser.add_argument("--write", action="store_true", help=f"write {DOCS.name} instead of printing it")
    if parser.parse_args().write:
        DOCS.write_text(page())
    else:
        print(page())


if __name__ == "__main__":
    main()
