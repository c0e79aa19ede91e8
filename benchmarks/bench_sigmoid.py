"""SigLIP's loss, forward and backward: ours against open_clip's formula and siglip-kernel.

bench_contrastive.py explains the columns.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from lift_fast.ops.pairs.sigmoid import sigmoid

from .harness import Suite
from .pairs import COMPILED, LEAN, OURS, Case, Loss, Op, Truth, compiled, device, fits, measure
from .start import small

SIZES = small((1024, 4096, 16384, 65536), (256, 512, 1024, 1024))
DIMS = 512, 768, 4096
QUICK_ROWS, QUICK_DIMS = 4096, (512, 4096)
PARAMETERS = 10.0, -10.0  # SigLIP's initial logit_scale and logit_bias


def open_clip(image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> Tensor:
    """open_clip 3.3's SigLipLoss on one device: dense logits and labels in the features' dtype."""
    logits = logit_scale * image @ text.T
    logits += logit_bias
    kind = {"device": image.device, "dtype": image.dtype}
    labels = 2 * torch.eye(len(image), **kind) - torch.ones((len(image), len(image)), **kind)
    return -F.logsigmoid(labels * logits).sum() / len(image)


def rivals(where: str, note: Callable[[str], None]) -> dict[str, Loss]:
    """The implementations that run on a device; a note for each that does not."""
    losses: dict[str, Loss] = {
        OURS: sigmoid,
        LEAN: lambda image, text, scale, bias: sigmoid(image, text, scale, bias, budget=0),
        "open_clip": open_clip,
        COMPILED: compiled(open_clip),
    }
    if where != "cuda":
        note("siglip_kernel: runs on CUDA only")
        return losses
    try:
        from siglip_kernel import fused_siglip_loss
    except ImportError as error:
        note(f"siglip_kernel: {error}")
        return losses
    losses["siglip_kernel"] = lambda image, text, scale, bias: fused_siglip_loss(image, text, scale.log(), bias)
    return losses


def truth(image: Tensor, text: Tensor, scale: float, bias: float, sample: Tensor) -> Truth:
    """The definition in float64, over chunks of rows."""
    n = len(image)

    def signs(rows: Tensor) -> Tensor:
        y = torch.full((len(rows), n), -1.0, dtype=image.dtype, device=image.device)
        y[torch.arange(len(rows), device=rows.device), rows] = 1
        return y

    loss = torch.zeros((), dtype=image.dtype, device=image.device)
    for part in torch.arange(n, device=image.device).split(1024):
        loss -= F.logsigmoid(signs(part) * (scale * image[part] @ text.T + bias)).sum() / n

    def grads(x: Tensor, other: Tensor) -> Tensor:
        y = signs(sample)
        g = -y * torch.sigmoid(-y * (scale * x[sample] @ other.T + bias))
        return scale / n * g @ other

    return Truth(loss, grads(image, text), grads(text, image))


OP = Op("sigmoid", PARAMETERS, rivals, truth)


def run(suite: Suite) -> None:
    on_cpu = device() == "cpu"
    if suite.quick:
        only = frozenset({OURS, LEAN, "open_clip"}) if on_cpu else None
        rows = QUICK_ROWS if on_cpu else SIZES[2]
        cases = [Case(rows, dim, dtype, False) for dim in QUICK_DIMS for dtype in ("bf16", "fp32")]
        if not on_cpu:  # starts with siglip-kernel's own case
            cases.insert(0, Case(SIZES[3], 768, "bf16", True))
        for number, case in enumerate([*cases, Case(rows, QUICK_DIMS[0], "bf16", True)]):
            without = frozenset({COMPILED} if number else ())  # compiling takes seconds per shape
            measure(suite, OP, case, only, memory=not on_cpu, without=without)
        return
    for n in SIZES:
        if on_cpu and not fits(n):
            suite.note(f"not enough memory for open_clip's formula: B = {n}")
            continue
        for dim in DIMS:
            for dtype in ("fp32", "bf16"):
                for trainable in (False, True):
                    measure(suite, OP, Case(n, dim, dtype, trainable))
