"""Compares two trained runs on this machine: FLOPs, memory, step time, and the time spent on text."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, TypedDict

import torch

from .. import foreign
from ..cache import Cache
from ..errors import CacheMismatch, ConfigError, DataError
from ..foreign import Count
from ..nn import PRESETS, Clip, preset
from ..text.cached import CachedText
from ..text.encoder import Encoder
from ..text.spec import EncoderSpec
from .compare import CONTEXTS, cost_against_length
from .flops import clip_flops, lift_flops
from .memory import peak_training_memory
from .time import clip_text_ms, lift_text_ms, median_ms

# Settings in which two runs must agree for their figures to be comparable.
_LARGEST_BATCH = 1 << 20
_SHARED = ("steps", "batch_size", "seed", "data")


class _PairConfig(TypedDict):
    steps: Count
    batch_size: Count
    seed: Count
    data: list[str]


class _OfPair(TypedDict):
    """What must be in a run.json to be compared with another one."""

    model: str
    preset: str
    precision: str
    device: str
    machine: dict[str, Any] | None
    config: _PairConfig


class _MeasuredConfig(_PairConfig):
    checkpointing: Literal["none", "mlp", "branches", "block"]
    cache: list[str]


class _Measured(TypedDict):
    """What must be in a run.json to be measured."""

    config: _MeasuredConfig
    step_ms: float
    peak_memory_bytes: Count | None


class _MeasuredLift(_Measured):
    text_dim: Count
    encoder: EncoderSpec


class _MeasuredClip(_Measured):
    context: Count


def check_run(run: dict[str, Any], of: type, name: str) -> None:
    """Raises DataError unless a run.json has what the TypedDict `of` needs. name: "lift" or "clip"."""
    try:
        foreign.check(run, of)
    except ValueError as error:
        raise DataError(
            f"the run.json of --{name} is not as training writes it ({error}); train again with: lift-fast train"
        ) from error


def check_pair(runs: Mapping[str, dict[str, Any]], measured: bool = False) -> None:
    """Raises ConfigError unless `runs` are a LIFT and a CLIP run that differ only on the text side, DataError where a
    run.json lacks what tells that. measured: also what `compare_runs` measures by."""
    for name, run in runs.items():
        check_run(run, _OfPair, name)
        if run["model"] != name:
            raise ConfigError(f"--{name} names a run of {run['model']}")
        if measured:
            check_run(run, _MeasuredLift if name == "lift" else _MeasuredClip, name)
            if not 1 <= run["config"]["batch_size"] <= _LARGEST_BATCH:
                raise ConfigError(f"--{name}: a batch of {run['config']['batch_size']} cannot be measured; train again")
    lift, clip = runs["lift"], runs["clip"]
    for key in ("preset", "precision", "device", "machine"):
        if lift[key] != clip[key]:
            raise ConfigError(f"the runs differ in {key}: {lift[key]} and {clip[key]}; train both alike")
    for key in _SHARED:
        ours, theirs = lift["config"][key], clip["config"][key]
        if ours != theirs:
            raise ConfigError(f"the runs differ in {key}: {ours} and {theirs}; train both alike")


def compare_runs(
    runs: Mapping[str, dict[str, Any]],
    training: CachedText,
    caches: Mapping[int, Cache],
    captions: Mapping[int, Sequence[str]],
    device: torch.device,
) -> dict[str, Any]:
    """Returns compare.json's "runs", "savings" and "cost_against_length".

    runs: by "lift" and "clip", the content of run.json. training: the text side that LIFT was trained with. caches,
    captions: by CLIP's context, a cache and captions of about that length, to time the text side with.

    FLOPs, and peak memory of runs without a GPU, are counted for the runs' settings; step times are the medians that
    the runs recorded; the time spent on text and the cost of embedding a caption once are measured here.

    Raises DataError as check_pair; ConfigError when the runs cannot be compared, or when `caches` lacks the context
    that CLIP was trained at; CacheMismatch when a cache's vectors are not as long as those that LIFT was trained on,
    and so take another time.
    """
    check_pair(runs, measured=True)
    lift, clip = runs["lift"], runs["clip"]
    own, batch = clip["context"], clip["config"]["batch_size"]
    if own not in caches:
        raise ConfigError(f"CLIP was trained at context {own}; name it in --context, not only {list(caches)}")
    like = f", with --condition {lift['config']['cache'][0]}" if lift.get("conditioning") else ""
    for cache in caches.values():
        if cache.dim != lift["text_dim"]:
            raise CacheMismatch(
                f"the vectors of {cache.folder} have length {cache.dim}, those of the LIFT run {lift['text_dim']}; "
                f"embed these captions as the run's were{like}"
            )
    sizes = preset(clip["preset"])

    timed: dict[int, Cache | CachedText] = {0: training, **caches}
    lift_ms = {n: timing.median for n, timing in lift_text_ms(timed, batch, device=device).items()}
    clip_ms = _clip_text_ms(clip, captions, own, batch, device)
    cost = cost_against_length(sizes, sorted({*CONTEXTS, *clip_ms}), lift["text_dim"])
    for row in cost:
        row["lift_text_ms"], row["clip_text_ms"] = lift_ms.get(row["context"]), clip_ms.get(row["context"])

    recompute = {name: run["config"]["checkpointing"] for name, run in runs.items()}
    flops = {
        "lift": lift_flops(sizes, lift["text_dim"], training=True, checkpointing=recompute["lift"]).total,
        "clip": clip_flops(sizes.with_context(own), training=True, checkpointing=recompute["clip"]).total,
    }
    compared: dict[str, dict[str, Any]] = {}
    for name, run in runs.items():
        ms = lift_ms if name == "lift" else clip_ms
        compared[name] = {
            "flops_per_sample": flops[name],
            "peak_memory_bytes": run["peak_memory_bytes"] or _counted_memory(run),
            "peak_memory_from": "measured" if run["peak_memory_bytes"] else "fake tensors",
            "step_ms": run["step_ms"],
            "text_ms_per_step": lift_ms[0] if name == "lift" else clip_ms[own],
            "text_ms_by_context": {str(n): ms[n] for n in caches},
        }
    compared["lift"]["embed_ms_per_caption"] = _embed_ms(lift["encoder"], captions[own][:batch], device)
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


def _clip_text_ms(
    clip: dict[str, Any], captions: Mapping[int, Sequence[str]], own: int, batch: int, device: torch.device
) -> dict[int, float]:
    """Milliseconds a step of CLIP spends on text, by context: each of `captions`, and the shorter of CONTEXTS."""
    # Only the text tower is timed, so the image tower is the smallest.
    sizes = replace(preset(clip["preset"]), vit=PRESETS["tiny"].vit)
    towers = {}
    for n in sorted({*captions, *(n for n in CONTEXTS if n < max(captions))}):
        tower = Clip(sizes.with_context(n)).to(device)
        tower.set_checkpointing(clip["config"]["checkpointing"])
        texts = captions.get(n, captions[own])
        towers[n] = (tower, [texts[i % len(texts)] for i in range(batch)])
    return {n: timing.median for n, timing in clip_text_ms(towers, clip["precision"], device, 3).items()}


def _embed_ms(encoder: dict[str, Any], captions: Sequence[str], device: torch.device) -> float | None:
    """Milliseconds to embed one caption with LIFT's encoder; None for trust_remote_code, which is not run here."""
    if encoder.get("trust_remote_code"):
        return None
    encode = Encoder(EncoderSpec.of_dict(encoder), device=device, download=False).encode
    return median_ms(lambda: encode(captions), repeats=3, warmup=1, device=device) / len(captions)


def _counted_memory(run: dict[str, Any]) -> int:
    """Peak bytes of a run on the CPU, where the peak is not measured."""
    config = run["config"]
    return peak_training_memory(
        "lift" if run["model"] == "lift" else "clip",
        preset(run["preset"]).with_context(run.get("context", 1)),
        config["batch_size"],
        text_dim=run.get("text_dim"),
        checkpointing=config["checkpointing"],
        precision=run["precision"],
    )
