"""A whole training step of LIFT, against its authors' step and against torch's own modules, also compiled.

A step is tower, head, contrastive loss, backward, clipping and AdamW, from images and cached text on the device. Ours
takes the text as int8 rows, the others as float32, as LIFT's authors cache it. "authors' step" is theirs: open_clip's
tower, eager, with every block checkpointed and AdamW not fused. All use bfloat16 if the device multiplies it natively.

FLOPs are those of the model: forward and backward of the tower and the head as our code dispatches them, and the two
products of the loss. Recomputed activations do not count, except attention's scores in the backward, which torch counts
too. MFU is relative to the datasheet's peak and to torch.mm of square matrices, which is timed in turn with the rivals.
The last part measures how float8 changes the loss of a toy task.
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
from lift_fast.train.parallel import Towers
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
    dtype_name,
    faster,
    fastest,
    installed_peers,
    measure,
    native_dtype,
    peer_step,
)

GRAPH = " graph"  # after our name: replayed as a CUDA graph
# --quick measures the first. The weights of all rivals and the activations of the graphs fit into 80 GB together.
GPU_CASES = small((("vit-b16", 256), ("vit-s16", 512), ("vit-l16", 64)), (("tiny", 8),))
CPU_CASES = (("tiny", 32), ("vit-b16", 8))
MFU_TARGET, COMPILED_TARGET, AUTHORS_TARGET, CPU_TARGET = 0.60, 1.25, 3.0, 0.97
GEMM_SIZE: int | None = None  # None: that of the device in measure/peaks.py
FLOAT8_VIT, FLOAT8_STEPS, FLOAT8_TARGET = VitConfig(32, 8, 128, 4, 2), small(150, 2), 0.01


def run(suite: Suite) -> None:
    where = device()
    cases = GPU_CASES if where == "cuda" else CPU_CASES
    for name, batch in cases[:1] if suite.quick else cases:
        _case(suite, where, name, PRESETS[name], batch)
    _float8(suite, where)


def _float8(suite: Suite, where: str) -> None:
    """Losses of a toy task with products in float8 and in bfloat16, from the same weights and batches."""
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
    suite.bar("a toy task's loss: float8 from bf16, mean over the steps", apart, FLOAT8_TARGET, at_most=True)


def _toy_losses(where: str, fp8: bool) -> list[float]:
    """Loss of each step of a small tower that learns, under bf16 autocast, to classify 20 patterns in noise."""
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
    """FLOPs of a step: towers and heads of a batch, and the loss's two products."""
    with FakeTensorMode():
        model, pixels = Lift(preset), torch.empty(1, 3, preset.vit.image_size, preset.vit.image_size)
        towers = count(lambda: model.encode_image(pixels).sum().backward())
    return batch * towers + 2 * 2 * batch**2 * preset.text_dim


def _case(suite: Suite, where: str, name: str, preset: Preset, batch: int) -> None:
    dtype = native_dtype(where)
    pixels = torch.randn(batch, 3, preset.vit.image_size, preset.vit.image_size, device=where)
    text = torch.randn(batch, preset.text_dim, device=where)
    codes = quantized(text)

    def ours(compiled: bool = False, graphed: bool = False) -> Call:
        model = Lift(preset).to(where).train()
        towers = Towers(model, compiled)
        lr = torch.tensor(1e-4, device=where) if graphed else 1e-4
        optimizer = adamw(model, lr, fused=True, capturable=graphed)
        precision = None if dtype == torch.float32 else dtype
        step = Step(model, ClipLoss(normalize=True), optimizer, towers=towers, precision=precision, graphed=graphed)
        return lambda: step(pixels, codes, 1e-4)

    def peer(tower: Callable[[VitConfig], nn.Module], compile: bool, fused: bool = True) -> Call:
        model = PeerLift(tower(preset.vit), preset.vit.width, preset.text_dim).to(where).train()
        step = peer_step(model, adamw(model, fused=fused), where, dtype, compile)
        return lambda: step(pixels, text)

    product, product_flops = gemm(where, dtype, GEMM_SIZE)
    # Rivals that targets need come first, in case time runs out.
    builds: dict[str, Callable[[], Call]] = {
        GEMM: lambda: product,
        OURS: ours,
        AUTHORS: partial(peer, partial(Tower, checkpointing=True), False, fused=False),
    }
    if where == "cuda":
        builds[OURS + GRAPH] = partial(ours, graphed=True)
    if where == "cuda" or not suite.quick:  # compiling takes minutes on the CPU
        builds[TORCH + COMPILED] = partial(peer, Tower, True)
        if where == "cuda":
            builds[OURS + COMPILED + GRAPH] = partial(ours, compiled=True, graphed=True)
        builds[OURS + COMPILED] = partial(ours, compiled=True)
    builds[TORCH] = partial(peer, Tower, False)
    if not suite.quick:
        for other, tower in installed_peers(suite.note).items():
            if other != TORCH:
                builds[other + COMPILED] = partial(peer, tower, True)

    flops = step_flops(preset, batch)
    case: dict[str, Any] = {"preset": name, "batch": batch, "dtype": dtype_name(dtype)}
    rates = {"images_per_s": batch, "tflop_per_s": flops / 1e12}
    datasheet = peak(torch.cuda.get_device_name()) if where == "cuda" else None
    if where == "cuda" and datasheet is None:
        suite.note(f"measure/peaks.py has no datasheet's peak for {torch.cuda.get_device_name()}")

    def utilisation(what: str, rows: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
        """MFU columns; for torch.mm also its own TFLOP/s and no images."""
        seconds = rows[what]["median_ms"] / 1e3
        rate = product_flops / rows[GEMM]["median_ms"] * 1e3 if GEMM in rows else None
        done = product_flops if what == GEMM else flops
        replaced = {"images_per_s": None, "tflop_per_s": done / seconds / 1e12, "peak_mib": None}
        return {
            **(replaced if what == GEMM else {}),
            "mfu_datasheet": mfu(done, seconds, datasheet) if datasheet else None,
            "mfu_gemm": mfu(done, seconds, rate) if rate else None,
        }

    rows = measure(suite, case, builds, where, rates, also=utilisation)
    _targets(suite, where, f"{name}, batch {batch}", rows)


def _targets(suite: Suite, where: str, case: str, rows: dict[str, dict[str, Any]]) -> None:
    best = fastest(rows, lambda what: what.startswith(OURS)) or OURS
    if where == "cpu":
        suite.bar(f"{case}: {best}: speed against {TORCH}' step", faster(rows, best, TORCH), CPU_TARGET)
        return
    compiled = fastest(rows, lambda what: what.endswith(COMPILED) and not what.startswith(OURS)) or TORCH + COMPILED
    utilisation = rows[best]["mfu_gemm"] if best in rows else None
    suite.bar(f"{case}: {best}: MFU of the GEMM rate measured", utilisation, MFU_TARGET)
    suite.bar(f"{case}: {best}: faster than {compiled}", faster(rows, best, compiled), COMPILED_TARGET)
    suite.bar(f"{case}: {best}: faster than {AUTHORS}", faster(rows, best, AUTHORS), AUTHORS_TARGET)
