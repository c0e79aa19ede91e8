"""Sets up a training run: everything is opened, checked and built before the first file is written."""

from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import run_folder
from ..cache import Cache
from ..data import dali
from ..data.host import HostPipeline
from ..data.loading import Batch, Loading, Pipeline
from ..data.open import open_sets
from ..data.options import DataOptions
from ..data.reading import cpu_count
from ..data.samples import Collection
from ..devices import gpu_index, pick_device, use_bf16
from ..errors import ConfigError, TrainingError
from ..files import free_bytes
from ..losses import ClipLoss, CosineLoss
from ..nn import Clip, Lift
from ..text.cached import CachedText
from ..text.tokenized import TokenizedText
from . import notices
from .config import TrainConfig
from .step import Step, Text

_LOGGED = 700  # bytes that a step adds to metrics.jsonl and to TensorBoard's events, rounded up


@dataclass
class Training:
    """A run that is ready to train. Its state while it trains is that of model, optimizer and pipeline.

    description: what run.json says of the model, its text and its data; see run_folder. notices: lines to
    print before the first step, see notices.py. batches: the pipeline's, endless.
    """

    config: TrainConfig
    description: dict[str, Any]
    device: torch.device
    data: Collection
    text: CachedText | TokenizedText
    model: Lift | Clip
    optimizer: torch.optim.Optimizer
    take_step: Step
    pipeline: Pipeline
    batches: Generator[Batch, None, None]
    notices: list[str]

    def next_inputs(self) -> tuple[Tensor, Text]:
        """The next batch, being copied to the device: pixels, and the text of the same samples; shapes as of Step."""
        batch = next(self.batches)
        pixels = batch.pixels.to(self.device, non_blocking=True)
        return pixels, self.text.rows(batch.rows).to(self.device, non_blocking=True)


def setup(config: TrainConfig) -> Training:
    """Opens the data and the text, seeds torch, builds the model, and decodes the first batch. Writes nothing.

    Raises ConfigError for settings that do not fit the data or this machine, and when config.out exists; DataError and
    CacheError for data and caches that cannot be read; CacheMismatch for a cache of other data or another text_dim;
    BackendError for loader dali when it is not installed; TrainingError when the disk has no space for the weights.
    """
    device = pick_device(config.device)
    if config.graph and device.type != "cuda":
        raise ConfigError("--graph captures the step as a CUDA graph and needs a CUDA device; leave it out")
    if config.out.exists():
        raise ConfigError(f"{config.out} exists already; remove it or name another --out")
    caches = [Cache(folder) for folder in config.cache]
    data, read = open_training_sets(config.data, config.pictures, config.options, caches)

    torch.manual_seed(config.seed)
    text = open_text(config, data, caches)
    data.leave_out(text.left_out)
    description = describe(config, text) | {
        "read": read,
        "problems": [problem._asdict() for samples in data.sets for problem in samples.problems],
        "left_out": notices.left_out(text),
    }
    model = run_folder.build(description).to(device)
    check_disk(config, model)
    model.set_checkpointing(config.checkpointing)
    model.set_fp8(config.fp8)
    optimizer = make_optimizer(model, config)
    loss: nn.Module = ClipLoss(normalize=True) if config.loss == "contrastive" else CosineLoss()
    take_step = Step(
        model,
        loss,
        optimizer,
        precision=torch.bfloat16 if use_bf16(config.precision, device) else None,
        clip_grad=config.clip_grad,
        compiled=config.compile,
        graphed=config.graph,
    )
    said = notices.lines(data, text, config.batch_size, config.seed, negatives=config.loss == "contrastive")
    pipeline = make_pipeline(config, data, model.visual.config.image_size, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    batches = decode_first(pipeline)
    return Training(config, description, device, data, text, model, optimizer, take_step, pipeline, batches, said)


def open_training_sets(
    paths: Sequence[Path], images: Sequence[Path], options: DataOptions, caches: Sequence[Cache] = ()
) -> tuple[Collection, dict[str, Any]]:
    """Opens the data sets of a run as one; with them the recorded options that all were read with, {} where they
    differ.

    caches: LIFT: the cache of each set. Raises DataError and ConfigError as open_sets and read_as_embedded do.
    """
    each = [read_as_embedded(options, cache) for cache in caches] or [options] * len(paths)
    recorded = [one.recorded() for one in each]
    return open_sets(paths, images, each), recorded[0] if all(one == recorded[0] for one in recorded) else {}


def read_as_embedded(options: DataOptions, cache: Cache) -> DataOptions:
    """How to open the data set that a cache was made from: as `embed` opened it.

    Bad samples are left out whatever `options` says: the cache has a row of every sample and knows the bad ones, and
    Cache.check_data compares sizes, keys and captions, so none can be lost unseen. Raises ConfigError as
    DataOptions.merged.
    """
    return replace(options.merged(cache.manifest.read), skip_bad=True)


def check_disk(config: TrainConfig, model: nn.Module) -> None:
    """Raises TrainingError when the disk of config.out has no space for the weights and the logs."""
    weights = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    needed, free = weights + _LOGGED * config.steps, free_bytes(config.out)
    if needed > free:
        raise TrainingError(
            f"the run needs {needed / 1e6:.1f} MB in {config.out} and its disk has {free / 1e6:.1f} MB free; free some "
            "space or name another --out"
        )


def open_text(config: TrainConfig, data: Collection, caches: Sequence[Cache]) -> CachedText | TokenizedText:
    """The text side: the caches of a LIFT run, the captions of a CLIP run.

    Raises CacheError, CacheMismatch (CachedText), DataError (TokenizedText).
    """
    if config.model == "lift":
        return CachedText(caches, data, config.text_dim)
    return TokenizedText(data, config.field, config.context, config.options.skip_bad)


def describe(config: TrainConfig, text: CachedText | TokenizedText) -> dict[str, Any]:
    """The first part of run.json: the config, and what run_folder needs to build the model and its text encoder."""
    description = {"model": config.model, "preset": config.preset, "config": asdict(config)}
    if isinstance(text, TokenizedText):
        return description | {"context": config.context}
    rotation = text.rotation.as_dict() if text.rotation else None
    return description | {"text_dim": text.dim, "encoder": text.encoder, "rotation": rotation}


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW. As in open_clip, gains, biases and the logit scale are not decayed.

    With config.graph the learning rate is a tensor on the device, because a captured step reads it from there.
    """
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    free = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": free, "weight_decay": 0.0}]
    lr = torch.tensor(config.lr, device=decayed[0].device) if config.graph else config.lr
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=config.eps, fused=True, capturable=config.graph)


def make_pipeline(config: TrainConfig, data: Collection, image_size: int, device: torch.device) -> Pipeline:
    """The pipeline that config.loader names, with image_size pixels a side.

    Raises ConfigError as Loading and Pipeline do; BackendError for DALI when it is not installed.
    """
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
        threads=cpu_count(),
        ahead=2 if on_gpu else 0,
    )
    if dali.wanted(config.loader, on_gpu):
        return dali.DaliPipeline(data, loading, gpu_index(device))
    return HostPipeline(data, loading)


def decode_first(pipeline: Pipeline) -> Generator[Batch, None, None]:
    """The pipeline's batches, with the first already decoded, so that unusable images raise their error here."""
    batches = iter(pipeline)
    first = [next(batches)]

    def all_batches() -> Generator[Batch, None, None]:
        with closing(batches):
            yield first.pop()
            yield from batches

    return all_batches()
