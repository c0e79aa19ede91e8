"""The trainer: LIFT against cached text, or CLIP with a text tower, on the same images in the same order."""

import math
import statistics
import time
from collections.abc import Callable
from contextlib import closing
from typing import Any

import torch

from .. import run_folder
from ..measure.machine import machine, versions
from ..measure.time import quartile_distance
from .config import TrainConfig
from .recorder import HostCopy, Recorder, StepRecord, open_loggers
from .setup import Training, setup

_WARM_UP = 3  # first steps that fill caches and allocate; their times are left out of the medians


def train(
    config: TrainConfig, *, progress: bool = True, opened: Callable[[Training], None] | None = None
) -> dict[str, Any]:
    """Trains one model and returns the content of run.json. progress: whether to show a progress bar. opened: called
    when everything has been opened and checked, before the first file is written.

    Writes to config.out: metrics.jsonl, TensorBoard events, skipped.jsonl if there are bad samples, and at the end
    model.safetensors and run.json. Everything is checked before the first of these is written.

    Raises what `setup` raises; DataError while training when too many samples are bad; TrainingError when the loss is
    not finite (the steps before it are in metrics.jsonl) or the run cannot be written.
    """
    training = setup(config)
    if opened is not None:
        opened(training)
    config.out.mkdir(parents=True)
    training.pipeline.skipped.write_to(config.out / "skipped.jsonl")
    for row, error in training.text.left_out.items():
        training.pipeline.skipped.note(row, error)  # a short run may not come to them
    started = time.perf_counter()
    with Recorder(config, open_loggers(config, progress)) as recorder, closing(training.batches):
        for step in range(config.steps):
            begun = time.perf_counter()
            pixels, text = training.next_inputs()
            data_ms = 1e3 * (time.perf_counter() - begun)
            lr = config.lr * schedule(step, config.warmup, config.steps)
            stats = HostCopy(training.take_step(pixels, text, lr))
            record = StepRecord(step, stats, lr, data_ms, training.pipeline.skipped.causes.total())
            try:
                recorder.add(record)  # reads the previous step's stats, while the device computes this step
            finally:
                record.step_ms = 1e3 * (time.perf_counter() - begun)
        recorder.flush()
    run = summarise(training, recorder, time.perf_counter() - started)
    run_folder.save(config.out, training.model, run)
    return run


def schedule(step: int, warmup: int, steps: int) -> float:
    """The factor on the learning rate at `step`, counted from 0: a linear warm-up, then a cosine to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def summarise(training: Training, recorder: Recorder, seconds: float) -> dict[str, Any]:
    """The content of run.json for a run that took `seconds`: its description, cost, losses, data, machine."""
    config, device, pipeline = training.config, training.device, training.pipeline
    step_ms = recorder.step_ms[min(_WARM_UP, len(recorder.step_ms) - 1) :]
    on_gpu = device.type == "cuda"
    return training.description | {
        "field": training.text.field,
        "captions": len(training.data),
        "samples_seen": config.steps * config.batch_size,
        "params": sum(p.numel() for p in training.model.parameters()),
        "seconds": seconds,
        "step_ms": statistics.median(step_ms),
        "step_ms_spread": quartile_distance(step_ms),
        "images_per_s": 1e3 * config.batch_size / statistics.median(step_ms),
        "precision": "fp32" if training.take_step.precision is None else "bf16",
        "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
        "peak_memory_bytes": torch.cuda.max_memory_allocated(device) if on_gpu else None,
        "loss": recorder.losses,
        "loader": {"kind": type(pipeline).__name__, "state": pipeline.state_dict()},
        **pipeline.skipped.report(),
        "machine": machine(),
        "versions": versions(),
    }
