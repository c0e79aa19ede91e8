"""The trainer: LIFT against cached text, or CLIP with a text tower, over the same pictures in the same order."""

import json
import math
import os
import statistics
import time
from contextlib import closing
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from .. import run_folder
from ..cache import Cache
from ..data import dali
from ..data.host import HostPipeline
from ..data.loading import Loading, Pipeline
from ..data.open import open_sets
from ..data.samples import Collection
from ..devices import gpu_index, pick_device, use_bf16
from ..errors import ConfigError, TrainingError
from ..losses import ClipLoss, CosineLoss
from ..measure.machine import machine, versions
from ..measure.time import quartile_distance
from ..text.cached import CachedText
from ..text.tokenized import TokenizedText
from .config import TrainConfig
from .step import Step


def train(config: TrainConfig, *, progress: bool = True) -> dict[str, Any]:
    """Trains one model and writes config.out: metrics.jsonl, TensorBoard events, model.safetensors, run.json.

    Everything is checked before the first file is written. Returns run.json's content.
    Raises LiftFastError's kinds for bad input, TrainingError when the loss is no longer finite.
    """
    device = pick_device(config.device)
    if config.graph and device.type != "cuda":
        raise ConfigError("--graph captures the step as a CUDA graph, and there is no CUDA device here; leave it out")
    if config.out.exists():
        raise ConfigError(f"{config.out} exists already; remove it or name another --out")
    data = open_sets(config.data, config.pictures)
    run: dict[str, Any] = {"model": config.model, "preset": config.preset, "config": asdict(config)}

    torch.manual_seed(config.seed)
    text: CachedText | TokenizedText
    if config.model == "lift":
        text = CachedText([Cache(folder) for folder in config.cache], data, config.text_dim)
        rotation = text.rotation.as_dict() if text.rotation else None
        run |= {"text_dim": text.dim, "encoder": text.encoder, "rotation": rotation}
    else:
        text = TokenizedText(data, config.field, config.context)
        run |= {"context": config.context}
    model = run_folder.build(run).to(device)
    model.set_checkpointing(config.checkpointing)
    model.set_fp8(config.fp8)
    loss_of: nn.Module = ClipLoss(normalize=True) if config.loss == "contrastive" else CosineLoss()
    take_step = Step(
        model,
        loss_of,
        make_optimizer(model, config),
        precision=torch.bfloat16 if use_bf16(config.precision, device) else None,
        clip_grad=config.clip_grad,
        compiled=config.compile,
        graphed=config.graph,
    )
    pipeline = make_pipeline(config, data, model.visual.config.image_size, device)

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    batches = iter(pipeline)
    first = next(batches)  # whatever is wrong with the pictures shows here

    losses: list[float] = []
    step_ms: list[float] = []
    config.out.mkdir(parents=True)
    pipeline.skipped.write_to(config.out / "skipped.jsonl")
    started = time.perf_counter()
    with (
        open(config.out / "metrics.jsonl", "w") as metrics,
        SummaryWriter(str(config.out)) as board,
        tqdm(total=config.steps, desc=f"train {config.model}", unit="step", disable=not progress) as bar,
        closing(batches),
    ):

        def report(step: int, stats: "Figures", lr: float, data_ms: float, skipped: int) -> None:
            """Writes down a step; raises TrainingError if its loss is not finite."""
            loss, grad_norm, logit_scale = stats.read()
            losses.append(loss)
            if not math.isfinite(loss):
                raise TrainingError(
                    f"the loss is {loss} at step {step}; lower --lr (now {config.lr}) or use --precision fp32. "
                    f"The steps until then are in {config.out / 'metrics.jsonl'}"
                )
            record = {
                "step": step,
                "samples": (step + 1) * config.batch_size,
                "loss": loss,
                "lr": lr,
                "logit_scale": logit_scale,
                "grad_norm": grad_norm,
                "data_ms": data_ms,
                "step_ms": step_ms[step],
                "skipped_pictures": skipped,
            }
            metrics.write(json.dumps(record) + "\n")
            metrics.flush()
            for name in ("loss", "lr", "logit_scale", "grad_norm", "step_ms"):
                board.add_scalar(name, record[name], step)
            bar.set_postfix_str(f"loss {loss:.3f}, {1e3 * config.batch_size / step_ms[step]:.0f} images/s")
            bar.update()

        # A step's figures are read when the next one has been started: a GPU never waits for the host.
        unread: tuple[int, Figures, float, float, int] | None = None
        for step in range(config.steps):
            begun = time.perf_counter()
            batch = next(batches) if step else first
            pixels = batch.pixels.to(device, non_blocking=True)
            other = text.rows(batch.rows).to(device, non_blocking=True)
            data_ms = 1e3 * (time.perf_counter() - begun)
            lr = config.lr * schedule(step, config.warmup, config.steps)
            stats = Figures(take_step(pixels, other, lr))
            if unread:
                report(*unread)
            unread = step, stats, lr, data_ms, pipeline.skipped.causes.total()
            step_ms.append(1e3 * (time.perf_counter() - begun))
        if unread:
            report(*unread)

    # The first steps fill caches and allocate: they are no measure of the others.
    settled = step_ms[min(3, len(step_ms) - 1) :]
    run |= {
        "field": text.field,
        "captions": len(data),
        "samples_seen": config.steps * config.batch_size,
        "params": sum(p.numel() for p in model.parameters()),
        "seconds": time.perf_counter() - started,
        "step_ms": statistics.median(settled),
        "step_ms_spread": quartile_distance(settled),
        "images_per_s": 1e3 * config.batch_size / statistics.median(settled),
        "precision": "bf16" if use_bf16(config.precision, device) else "fp32",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "peak_memory_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        "loss": losses,
        "loader": {"kind": type(pipeline).__name__, "state": pipeline.state_dict()},
        **pipeline.skipped.report(),
        "machine": machine(),
        "versions": versions(),
    }
    run_folder.save(config.out, model, run)
    return run


def make_pipeline(config: TrainConfig, data: Collection, image_size: int, device: torch.device) -> Pipeline:
    """The pipeline that config.loader names. Raises BackendError for DALI where it is not installed."""
    on_gpu = device.type == "cuda"
    loading = Loading(
        batch_size=config.batch_size,
        image_size=image_size,
        seed=config.seed,
        min_crop_area=config.min_crop_area,
        flip=config.flip,
        colour=config.colour,
        shuffle_buffer=config.shuffle_buffer,
        max_skipped=config.max_skipped,
        checked=config.checked,
        threads=len(os.sched_getaffinity(0)),
        ahead=2 if on_gpu else 0,
    )
    if dali.wanted(config.loader, on_gpu):
        return dali.DaliPipeline(data, loading, gpu_index(device))
    return HostPipeline(data, loading)


class Figures:
    """A step's loss, gradient norm and logit scale, on their way to the host."""

    def __init__(self, stats: Tensor):
        self.host, self.done = stats, None
        if stats.is_cuda:
            self.host = torch.empty(stats.shape, dtype=stats.dtype, pin_memory=True)
            self.host.copy_(stats, non_blocking=True)
            self.done = torch.cuda.Event()
            self.done.record()

    def read(self) -> list[float]:
        if self.done is not None:
            self.done.synchronize()
        return self.host.tolist()


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW; gains, biases and the logit scale are not decayed, as in open_clip. For a graph its lr is a tensor."""
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    free = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": free, "weight_decay": 0.0}]
    lr = torch.tensor(config.lr, device=decayed[0].device) if config.graph else config.lr
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=config.eps, fused=True, capturable=config.graph)


def schedule(step: int, warmup: int, steps: int) -> float:
    """Factor on the learning rate: linear warm-up, then a cosine to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
