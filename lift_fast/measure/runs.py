"""Two trained runs side by side on this machine: FLOPs, memory, step time, and the time a step spends on text."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..cache import Cache
from ..errors import ConfigError
from ..nn import Clip, preset
from .compare import CONTEXTS, cost_against_length
from .flops import clip_flops, lift_flops
from .memory import peak_training_memory
from .time import clip_text_ms, lift_text_ms


def compare_runs(
    runs: Mapping[str, dict[str, Any]],
    caches: Mapping[int, Cache],
    captions: Mapping[int, Sequence[str]],
    device: torch.device,
) -> dict[str, Any]:
    """runs: "lift" and "clip" -> run.json; caches and captions: CLIP's context -> texts of about that length.

    FLOPs and, without a GPU, peak memory are counted for the runs' own settings; step time is the runs' own
    median; text time is measured here, at each context. Returns {"runs", "savings", "cost_against_length"}.
    Raises ConfigError when CLIP's own context is not among the contexts, or a set is smaller than a batch.
    """
    lift, clip = runs["lift"], runs["clip"]
    own, batch = clip["context"], clip["config"]["batch_size"]
    if own not in caches:
        raise ConfigError(f"CLIP was trained at context {own}; name it in --context, not only {list(caches)}")
    for context, texts in captions.items():
        if len(texts) < batch:
            raise ConfigError(f"{len(texts)} captions for context {context} are fewer than a batch of {batch}")
    sizes = preset(clip["preset"])

    lift_ms = {n: timing.median for n, timing in lift_text_ms(caches, batch, device=device).items()}
    towers = {
        n: (Clip(sizes.with_context(n)).to(device), captions.get(n, captions[own])[:batch])
        for n in sorted({*CONTEXTS, *captions})
    }
    clip_ms = {n: timing.median for n, timing in clip_text_ms(towers, clip["precision"], device, 3).items()}

    cost = cost_against_length(sizes, sorted(towers), lift["text_dim"])
    for row in cost:
        row["lift_text_ms"], row["clip_text_ms"] = lift_ms.get(row["context"]), clip_ms[row["context"]]
    recompute = {name: runs[name]["config"]["checkpointing"] for name in runs}
    flops = {
        "lift": lift_flops(sizes, lift["text_dim"], training=True, checkpointing=recompute["lift"]).total,
        "clip": clip_flops(sizes.with_context(own), training=True, checkpointing=recompute["clip"]).total,
    }
    compared = {}
    for name, run, ms in (("lift", lift, lift_ms), ("clip", clip, clip_ms)):
        compared[name] = {
            "flops_per_sample": flops[name],
            "peak_memory_bytes": run["peak_memory_bytes"] or _counted_memory(name, run),
            "peak_memory_from": "measured" if run["peak_memory_bytes"] else "fake tensors",
            "step_ms": run["step_ms"],
            "text_ms_per_step": ms[own],
            "text_ms_by_context": {str(n): ms[n] for n in caches},
        }
    savings = {
        saving: 1 - compared["lift"][figure] / compared["clip"][figure]
        for saving, figure in (
            ("flops", "flops_per_sample"),
            ("memory", "peak_memory_bytes"),
            ("step_time", "step_ms"),
            ("text_time", "text_ms_per_step"),
        )
    }
    return {"runs": compared, "savings": savings, "cost_against_length": cost}


def _counted_memory(name: str, run: dict[str, Any]) -> int:
    config = run["config"]
    return peak_training_memory(
        "lift" if name == "lift" else "clip",
        preset(run["preset"]).with_context(run.get("context", 1)),
        config["batch_size"],
        text_dim=run.get("text_dim"),
        checkpointing=config["checkpointing"],
        precision=run["precision"],
    )
