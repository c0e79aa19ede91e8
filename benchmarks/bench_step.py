"""A whole training step of LIFT, against its authors' and against torch's own modules compiled.

Tower, head, contrastive loss, backward, clipping, AdamW, from pictures and cached text that are on the device: ours
takes the text as int8 rows, the others as float32, as LIFT's authors cache it. "authors' step" is theirs: open_clip's
tower, eager, each block checkpointed, AdamW not fused. All take bfloat16 where it is native.

FLOPs are the model's: forward and backward of the tower and the head as ours dispatches them, and the two products of
the loss; what a rival computes again counts nothing, but for attention's scores in the backward, which torch counts
too. MFU is on those, against the datasheet's peak and against torch.mm of square matrices, timed in turn with the
rivals. At the end, what float8 does to the loss of a toy task.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lift_fast.losses import ClipLoss
from lift_fast.measure.flops import count
from lift_fast.measure.peaks import gemm, mfu, peak
from lift_fast.nn import PRESETS, Lift, Preset, Vit, VitConfig
from lift_fast.ops.transformer import float8
from lift_fast.train.step import Step

from .harness import Suite
from .pairs import GEMM, device, quantized
from .start import small
from .vit_peers import (
    AUTHORS,
    COMPILED,
    OURS,
    TORCH,
    Call,
    PeerLift,
    Tower,
    adamw,
    faster,
    fastest,
    measure,
    named,
    native_dtype,
    peer_step,
    peers_here,
)

GRAPH = " graph"  # after our name: replayed as a CUDA graph
# With --quick the first. All rivals' weights, and the graphs' activations, are on the device at once: in 80 GB.
GPU_CASES = small((("vit-b16", 256), ("vit-s16", 512), ("vit-l16", 64)), (("tiny", 8),))
CPU_CASES = (("tiny", 32), ("vit-b16", 8))
MFU_BAR, COMPILED_BAR, AUTHORS_BAR, CPU_BAR = 0.60, 1.25, 3.0, 0.97
GEMM_SIZE: int | None = None  # the device's, see measure/peaks.py


FLOAT8_VIT, FLOAT8_STEPS, FLOAT8_BAR = VitConfig(32, 8, 128, 4, 2), small(150, 2), 0.01


def run(suite: Suite) -> None:
    where = device()
    cases = GPU_CASES if where == "cuda" else CPU_CASES
    for name, batch in cases[:1] if suite.quick else cases:
        _case(suite, where, name, PRESETS[name], batch)
    _float8(suite, where)


def _float8(suite: Suite, where: str) -> None:
    """What multiplying in float8 does to the loss: a toy task, the same weights and batches."""
    if reason := float8.why_not(torch.device(where)):
        suite.note(f"the loss in float8: {reason}")
        return
    losses = {fp8: _toy_losses(where, fp8) for fp8 in (False, True)}
    for fp8, curve in losses.items():
        suite.add(
            {
                "what of": f"loss of a toy task, {FLOAT8_STEPS} steps",
                "what": "float8" if fp8 else "bf16",
                "device": where,
                "first 25 steps": sum(curve[:25]) / 25,
                "last 25 steps": sum(curve[-25:]) / 25,
            }
        )
    apart = sum(abs(a - b) for a, b in zip(*losses.values(), strict=True)) / FLOAT8_STEPS
    suite.bar("a toy task's loss: float8 from bf16, mean over the steps", apart, FLOAT8_BAR, at_most=True)


def _toy_losses(where: str, fp8: bool) -> list[float]:
    """Of a small tower under bf16 autocast that tells 20 patterns in noise apart."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randn(20, 3, 32, 32, generator=generator)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tower, head = Vit(FLOAT8_VIT).to(where), nn.Linear(FLOAT8_VIT.width, len(patterns)).to(where)
    tower.transformer.fp8 = fp8
    optimizer = torch.optim.AdamW([*tower.parameters(), *head.parameters()], lr=5e-4)
    losses = []
    for _ in range(FLOAT8_STEPS):
        labels = torch.randint(len(patterns), (32,), generator=generator)
        pixels = 0.5 * patterns[labels] + torch.randn(32, 3, 32, 32, generator=generator)
        with torch.autocast(where, torch.bfloat16):
            logits = head(tower(pixels.to(where)))
        loss = nn.functional.cross_entropy(logits.float(), labels.to(where))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def step_flops(preset: Preset, batch: int) -> int:
    with FakeTensorMode():
        model, pixels = Lift(preset), torch.empty(1, 3, preset.vit.image_size, preset.vit.image_size)
        towers = count(lambda: model.encode_image(pixels).sum().backward())
    return batch * towers + 2 * 2 * batch**2 * preset.text_dim


def _case(suite: Suite, where: str, name: str, preset: Preset, batch: int) -> None:
    dtype = native_dtype(where)
    pixels = torch.randn(batch, 3, preset.vit.image_size, preset.vit.image_size, device=where)
    text = torch.randn(batch, preset.text_dim, device=where)
    codes = quantized(text)

    def ours(**options: bool) -> Call:
        model = Lift(preset).to(where).train()
        graphed = options.get("graphed", False)
        lr = torch.tensor(1e-4, device=where) if graphed else 1e-4
        optimizer = adamw(model, lr, fused=True, capturable=graphed)
        wanted = None if dtype == torch.float32 else dtype
        step = Step(model, ClipLoss(normalize=True), optimizer, precision=wanted, clip_grad=1.0, **options)
        return lambda: step(pixels, codes, 1e-4)

    def peer(tower: Callable[[VitConfig], nn.Module], compile: bool, fused: bool = True) -> Call:
        model = PeerLift(tower(preset.vit), preset.vit.width, preset.text_dim).to(where).train()
        step = peer_step(model, adamw(model, fused=fused), where, dtype, compile)
        return lambda: step(pixels, text)

    product, product_flops = gemm(where, dtype, GEMM_SIZE)
    # In the order of what a bar needs, in case time is up.
    builds: dict[str, Callable[[], Call]] = {
        GEMM: lambda: product,
        OURS: ours,
        AUTHORS: partial(peer, partial(Tower, checkpointing=True), False, fused=False),
    }
    if where == "cuda":
        builds[OURS + GRAPH] = partial(ours, graphed=True)
    if where == "cuda" or not suite.quick:  # on the CPU compiling takes minutes
        builds[TORCH + COMPILED] = partial(peer, Tower, True)
        if where == "cuda":
            builds[OURS + COMPILED + GRAPH] = partial(ours, compiled=True, graphed=True)
        builds[OURS + COMPILED] = partial(ours, compiled=True)
    builds[TORCH] = partial(peer, Tower, False)
    if not suite.quick:
        for other, tower in peers_here(suite.note).items():
            if other != TORCH:
                builds[other + COMPILED] = partial(peer, tower, True)

    flops = step_flops(preset, batch)
    case: dict[str, Any] = {"preset": name, "batch": batch, "dtype": named(dtype)}
    rates = {"images_per_s": batch, "tflop_per_s": flops / 1e12}
    datasheet = peak(torch.cuda.get_device_name()) if where == "cuda" else None
    if where == "cuda" and datasheet is None:
        suite.note(f"no datasheet's peak is known here for {torch.cuda.get_device_name()}")

    def utilisation(what: str, rows: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
        seconds = rows[what]["median_ms"] / 1e3
        rate = product_flops / rows[GEMM]["median_ms"] * 1e3 if GEMM in rows else None
        done = product_flops if what == GEMM else flops
        others = {"images_per_s": None, "tflop_per_s": done / seconds / 1e12, "peak_mib": None} if what == GEMM else {}
        return {
            **others,
            "mfu_datasheet": mfu(done, seconds, datasheet) if datasheet else None,
            "mfu_gemm": mfu(done, seconds, rate) if rate else None,
        }

    rows = measure(suite, case, builds, where, rates, also=utilisation)
    _bars(suite, where, f"{name}, batch {batch}", rows)


def _bars(suite: Suite, where: str, case: str, rows: dict[str, dict[str, Any]]) -> None:
    best = fastest(rows, lambda what: what.startswith(OURS)) or OURS
    if where == "cpu":
        suite.bar(f"{case}: {best}: speed against {TORCH}' step", faster(rows, best, TORCH), CPU_BAR)
        return
    compiled = fastest(rows, lambda what: what.endswith(COMPILED) and not what.startswith(OURS)) or TORCH + COMPILED
    utilisation = rows[best]["mfu_gemm"] if best in rows else None
    suite.bar(f"{case}: {best}: MFU of the GEMM rate measured", utilisation, MFU_BAR)
    suite.bar(f"{case}: {best}: faster than {compiled}", faster(rows, best, compiled), COMPILED_BAR)
    suite.bar(f"{case}: {best}: faster than {AUTHORS}", faster(rows, best, AUTHORS), AUTHORS_BAR)
