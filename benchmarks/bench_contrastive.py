"""Symmetric InfoNCE, forward and backward: ours against open_clip's formula and the fused peers that are installed.

TFLOP/s and the fraction of the GEMM rate (of torch.mm of B x D x B, timed in turn with the rivals) count the fewest
FLOPs possible: two GEMMs with frozen text, three with trainable text. Peak extra memory is what a call allocates beyond
its inputs, gradients included. Errors are differences from float64 on the same features.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lift_fast.ops.pairs.contrastive import contrastive

from .harness import Suite
from .pairs import (
    COMPILED,
    GEMM,
    LEAN,
    LOGIT_SCALE,
    OURS,
    Case,
    Key,
    Loss,
    Op,
    Truth,
    compiled,
    device,
    features,
    fits,
    measure,
    parameters,
    quantized,
    relative_error,
    step,
)
from .start import small

SIZES = 1024, 4096, 16384, 65536
DIMS = 512, 768, 4096
SPEED_ROWS, MEMORY_ROWS, MEMORY_DIM = small(4096, 512), 16384, 512
FROZEN_TARGETS = {(4096, "fp32"): 2.3, (4096, "bf16"): 2.5, (512, "fp32"): 3.0, (512, "bf16"): 2.3}
TRAINABLE_TARGET = 1.7
GPU_SIZES, GPU_DIMS = small((16384, 32768, 65536), (1024,)), small((768, 4096), (768,))

Rows = Mapping[Key, Mapping[str, Any]]


def open_clip(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    """open_clip 3.3's ClipLoss on one device: two GEMMs and two dense cross entropies in the features' dtype."""
    per_image = logit_scale * image @ text.T
    per_text = logit_scale * text @ image.T
    labels = torch.arange(len(image), device=image.device)
    return (F.cross_entropy(per_image, labels) + F.cross_entropy(per_text, labels)) / 2


def rivals(where: str, note: Callable[[str], None]) -> dict[str, Loss]:
    """The implementations that run on a device; a note for each that does not."""
    losses: dict[str, Loss] = {
        OURS: contrastive,
        LEAN: lambda image, text, scale: contrastive(image, text, scale, budget=0),
        "open_clip": open_clip,
        COMPILED: compiled(open_clip),
    }
    for name, build in {"inf_cl": _inf_cl, "memeff": _memeff, "liger_kernel": _liger}.items():
        if where != "cuda":
            note(f"{name}: runs on CUDA only")
            continue
        try:
            losses[name] = build()
        except ImportError as error:
            note(f"{name}: {error}")
    return losses


def _inf_cl() -> Loss:
    from inf_cl import cal_flash_loss

    def loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        both = cal_flash_loss(image, text, scale=scale), cal_flash_loss(text, image, scale=scale)
        return (both[0] + both[1]).mean() / 2

    return loss


def _memeff() -> Loss:
    from memeff import MemoryEfficientCLIPLoss

    # Its temperature is a number without a gradient; `stable=True` would scale the features' gradients.
    module = MemoryEfficientCLIPLoss(temperature=1 / LOGIT_SCALE, normalized_inputs=True, stable=False)
    return lambda image, text, scale: module(image, text)


def _liger() -> Loss:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    module = LigerFusedLinearCrossEntropyLoss()

    def loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        """The cross entropy of a linear layer (weight, input, target), in both directions."""
        labels = torch.arange(len(image), device=image.device)
        return (module(text, scale * image, labels) + module(image, scale * text, labels)) / 2

    return loss


def truth(image: Tensor, text: Tensor, scale: float, sample: Tensor) -> Truth:
    """The definition in float64, over chunks of rows."""
    n = len(image)
    row = torch.empty(n, dtype=image.dtype, device=image.device)
    col = torch.full_like(row, -torch.inf)
    for part in torch.arange(n, device=image.device).split(1024):
        z = scale * image[part] @ text.T
        row[part] = z.logsumexp(1)
        col = torch.logaddexp(col, z.logsumexp(0))
    loss = ((row + col) / 2 - scale * (image * text).sum(1)).mean()

    def grads(x: Tensor, other: Tensor, lse: Tensor, other_lse: Tensor) -> Tensor:
        z = scale * x[sample] @ other.T
        g = (z - lse[sample, None]).exp() + (z - other_lse).exp()
        g[torch.arange(len(sample), device=sample.device), sample] -= 2
        return scale / (2 * n) * g @ other

    return Truth(loss, grads(image, text, row, col), grads(text, image, col, row))


OP = Op("contrastive", (LOGIT_SCALE,), rivals, truth)


def run(suite: Suite) -> None:
    if device() == "cuda":
        _on_gpu(suite)
    else:
        _on_cpu(suite)


def _on_cpu(suite: Suite) -> None:
    eager = frozenset({OURS, LEAN, "open_clip"})
    for trainable in (False, True):
        for dim in (4096, 512):
            for dtype in ("fp32", "bf16"):
                case = Case(SPEED_ROWS, dim, dtype, trainable)
                quick = frozenset({OURS, "open_clip"}) if trainable else eager
                rows = measure(suite, OP, case, quick if suite.quick else None, memory=not suite.quick)
                target = TRAINABLE_TARGET if trainable else FROZEN_TARGETS[dim, dtype]
                suite.bar(f"{case}: faster than open_clip's formula", _faster(rows, OURS, "open_clip"), target)
                suite.bar(f"{case}: fraction of the GEMM rate (aim)", _of_gemm(rows), 0.85)
                if not trainable and dtype == "bf16":
                    suite.bar(f"{case}: int8 text, speed against bf16 text", _int8(rows), 1.0)
    _int8_error(suite)
    for dtype in ("fp32", "bf16"):
        case = Case(MEMORY_ROWS, MEMORY_DIM, dtype, False)
        if not fits(case.rows):
            suite.note(f"not enough memory for open_clip's formula: {case}")
            continue
        full = not suite.quick
        rows = measure(suite, OP, case, None if full else eager, errors=full, int8=full, least_repeats=2)
        for what, most in ((LEAN, 0.05), (OURS, 0.25)):
            part = _memory(rows, what)
            suite.bar(f"{case}: {what}: peak extra memory over open_clip's", part, most, at_most=True)
        suite.bar(f"{case}: {LEAN}: faster than open_clip's formula", _faster(rows, LEAN, "open_clip"), 1.3)
    if not suite.quick:
        _remaining_cases(suite)


def _on_gpu(suite: Suite) -> None:
    # All sizes of the smaller dim come first: a quick run may run out of time before the larger one.
    for dim in GPU_DIMS:
        for rows_ in GPU_SIZES[::2] if suite.quick else GPU_SIZES:
            case = Case(rows_, dim, "bf16", False)
            # Compiling takes seconds per shape, so a quick run compiles the first one only.
            later = suite.quick and (rows_, dim) != (GPU_SIZES[0], GPU_DIMS[0])
            rows = measure(suite, OP, case, without=frozenset({COMPILED} if later else ()))
            if not rows:
                continue
            peers = [what for what, _ in rows if what not in (OURS, LEAN, GEMM)]
            fastest = min(peers, key=lambda what: rows[what, "frozen"]["median_ms"], default="open_clip")
            suite.bar(f"{case}: fraction of the GEMM rate", _of_gemm(rows), 0.85)
            suite.bar(f"{case}: faster than the fastest peer ({fastest})", _faster(rows, OURS, fastest), 2)
            suite.bar(f"{case}: int8 text, speed against bf16 text", _int8(rows), 1.2)
            if ("open_clip", "frozen") in rows:
                part = _memory(rows, LEAN)
                suite.bar(f"{case}: {LEAN}: peak extra memory over open_clip's", part, 0.02, at_most=True)
    _int8_error(suite)
    if suite.quick:
        for dtype, trainable in (("bf16", True), ("fp32", False)):
            measure(suite, OP, Case(GPU_SIZES[0], 768, dtype, trainable), without=frozenset({COMPILED}))
    else:
        _remaining_cases(suite)


def _remaining_cases(suite: Suite) -> None:
    """Measures every case of the grid that has no row yet."""
    done = {(row["rows"], row["dim"], row["dtype"], row["text"]) for row in suite.rows}
    for rows in SIZES:
        for dim in DIMS:
            for dtype in ("fp32", "bf16"):
                for trainable in (False, True):
                    case = Case(rows, dim, dtype, trainable)
                    if device() == "cpu" and not fits(rows):
                        suite.note(f"not enough memory for open_clip's formula: B = {rows}")
                    elif (rows, dim, dtype, case.text) not in done:
                        measure(suite, OP, case)


def _int8_error(suite: Suite) -> None:
    """Compares the images' gradient for int8 text with the gradient for the same rows widened to float32."""
    for dim in (4096, 512):
        image, text = features(Case(SPEED_ROWS, dim, "fp32", False), device())
        codes = quantized(text)
        grads = [step(contrastive, image, t, parameters(OP, device()))()[1][0] for t in (codes, codes.widen())]
        error = relative_error(grads[0], grads[1])
        name = f"B = {SPEED_ROWS}, D = {dim}, fp32: int8 text: gradient's relative error against the widened text"
        suite.bar(name, error, 1e-3, at_most=True)


# Ratios of two rows of a case; None if either was not measured, for lack of time or because of an error.
def _faster(rows: Rows, what: str, than: str) -> float | None:
    found = {key: row["median_ms"] for (key, text), row in rows.items() if text != "int8"}
    return found[than] / found[what] if what in found and than in found else None


def _of_gemm(rows: Rows) -> float | None:
    row = rows.get((OURS, "frozen")) or rows.get((OURS, "trainable"))
    return row["of_gemm"] if row else None


def _int8(rows: Rows) -> float | None:
    frozen, int8 = rows.get((OURS, "frozen")), rows.get((OURS, "int8"))
    return frozen["median_ms"] / int8["median_ms"] if frozen and int8 else None


def _memory(rows: Rows, what: str) -> float | None:
    ours, theirs = rows.get((what, "frozen")), rows.get(("open_clip", "frozen"))
    return ours["extra_mib"] / theirs["extra_mib"] if ours and theirs else None
