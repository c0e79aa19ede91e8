"""Sets up a training run: everything is opened, checked and built before the first file is written."""

from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import run_folder
from ..cache import Cache, Conditioning
from ..data import dali
from ..data.host import HostPipeline
from ..data.loading import Batch, Loading, Pipeline
from ..data.open import open_sets
from ..data.options import DataOptions
from ..data.reading import cpu_count
from ..data.samples import Collection
from ..devices import gpu_index, use_bf16
from ..errors import ConfigError, TrainingError
from ..files import free_bytes
from ..losses import ClipLoss, CosineLoss
from ..nn import Clip, Lift, preset
from ..ranks import Rank, together
from ..text.cached import CachedText
from ..text.tokenized import TokenizedText
from . import folder, notices, parallel
from .checkpoints import Checkpoints, Found
from .config import TrainConfig
from .ema import Ema
from .held_out import HeldOut
from .identity import fingerprints, mathematics
from .initial import conventions, init_from, weights_digest
from .optimizer import lock, make_optimizer
from .patches import patches_kept
from .schedule import patch_dropout
from .state import tensors_of
from .step import Step, Text

_LOGGED = 700  # bytes that a step adds to metrics.jsonl and to TensorBoard's events, rounded up


@dataclass
class Training:
    """A run that is ready to train. Its state while it trains is that of model, optimizer, ema and pipeline.

    description: what run.json says of the model, its text and its data; see run_folder. notices: lines to print before
    the first step, see notices.py. settings: what started.json keeps. batches: the pipeline's, endless. found: the
    checkpoint that the run goes on from, None for a new run; step: number of steps that are done. loaded:
    a sentence on the weights that --init-from has loaded, "" for none.
    """

    config: TrainConfig
    rank: Rank
    device: torch.device
    description: dict[str, Any]
    settings: dict[str, Any]
    identity: str
    data: Collection
    text: CachedText | TokenizedText
    model: Lift | Clip
    optimizer: torch.optim.Optimizer
    ema: Ema | None
    take_step: Step
    pipeline: Pipeline
    batches: Generator[Batch, None, None]
    checkpoints: Checkpoints
    held_out: HeldOut | None
    found: Found | None
    loaded: str
    notices: list[str]

    @property
    def step(self) -> int:
        """Number of steps that were done when training was set up."""
        return self.found.step if self.found else 0

    @property
    def conditioning(self) -> Conditioning | None:
        """The conditioning of the text, None without one."""
        return _conditioning_of(self.text)

    def next_batch(self) -> tuple[Tensor, Text, Tensor]:
        """The next batch of this rank, being copied to the device: pixels, and the text of the same samples, shapes as
        of Step; and the samples' row numbers, on the CPU."""
        batch = next(self.batches)
        pixels = batch.pixels.to(self.device, non_blocking=True)
        return pixels, self.text.rows(batch.rows).to(self.device, non_blocking=True), batch.rows

    def check_text(self) -> None:
        """Raises CacheError when the text of earlier batches may have been wrong: before anything is written of it."""
        if isinstance(self.text, CachedText):
            self.text.check_unchanged()

    def kept(self, step: int) -> Tensor | None:
        """The patches that each image of this rank keeps in `step`, on the device; None: all."""
        rate = patch_dropout(step, self.config)
        if not rate:
            return None
        rows = self.config.batch_size // self.rank.world
        samples = range(self.rank.number * rows, (self.rank.number + 1) * rows)
        grid = self.model.visual.config.grid
        return patches_kept(self.config.seed, step, samples, grid**2, rate).to(self.device, non_blocking=True)


class Opened(NamedTuple):
    """What a rank opens and builds by itself."""

    caches: list[Cache]
    data: Collection
    text: CachedText | TokenizedText
    description: dict[str, Any]
    model: Lift | Clip


def setup(
    config: TrainConfig,
    rank: Rank,
    device: torch.device,
    open_until: ExitStack,
    warn: Callable[[str], object],
) -> Training | None:
    """Opens the data and the text, seeds torch, builds the model, loads the newest checkpoint, and decodes the first
    batch. None when config.out holds this run, complete. A new run has written nothing yet. A collective of all ranks.

    open_until: keeps the lock on the folder of a run that goes on, and the checkpoints open. warn: called with a
    warning for the user, from then on also when a checkpoint cannot be written.

    Raises ConfigError for settings that do not fit the data, this machine or the run in config.out; DataError and
    CacheError for data and caches that cannot be read; CacheMismatch for a cache of other data or another text_dim;
    BackendError for loader dali when it is not installed; TrainingError when the disk has no space for the weights, and
    when no checkpoint can be read.
    """
    started = together(lambda: folder.read_started(config.out, config.resume), only_first=True)
    if started is not None:
        together(lambda: open_until.enter_context(folder.locked(config.out)), only_first=True)
    opened = together(lambda: open_run(config, rank, device))
    _, data, text, description, model = opened
    settings = together(lambda: identity(config, opened, device), only_first=True)
    state = together(lambda: folder.open_folder(config.out, settings, config.resume), only_first=True)
    if state == "complete":
        return None
    if started is not None and started["fingerprints"]["stamps"] != settings["fingerprints"]["stamps"]:
        for cache in opened.caches:  # written to since, or copied
            together(cache.verify, only_first=True)

    said = notices.lines(data, text, config.batch_size, config.seed, negatives=config.loss == "contrastive")
    checkpoints = Checkpoints(
        config.out / "checkpoints",
        rank,
        keep_last=config.keep_last,
        keep_every=config.keep_every,
        timeout=config.timeout,
        warn=warn,
    )
    open_until.enter_context(closing(checkpoints))
    with folder.writing(config.out):
        found = checkpoints.newest(warn) if state == "begun" else None
    run = started["checksum"] if started else ""
    together(lambda: check_same_run(found, run))

    weights, loaded = config.init_from, ""
    if weights is not None and found is None:
        loaded = together(lambda: init_from(model, weights))
    together(lambda: lock(model, config))
    if config.loss == "cosine":
        model.logit_scale.requires_grad_(False)  # that loss has none, and DDP waits for every gradient
    towers = parallel.spread(model, config.parallel, rank, device, config.compile)
    optimizer = make_optimizer(model, config)
    ema = Ema(model, config.ema) if config.ema else None
    take_step = Step(
        model,
        make_loss(config, rank),
        optimizer,
        towers=towers,
        rank=rank,
        precision=torch.bfloat16 if use_bf16(config.precision, device) else None,
        clip_grad=config.clip_grad,
        micro_batch=config.micro_batch,
        graphed=config.graph,
    )
    pipeline = together(lambda: make_pipeline(config, data, model.visual.config.image_size, device, rank))
    if found is not None:
        checkpoints.load(found, tensors_of(model, optimizer, ema))
        pipeline.load_state_dict(found.state["loader"])
        pipeline.skipped.load_state_dict(found.state["skipped"])
    held_out = None
    if config.eval_data:
        held_out = HeldOut(config, description | {"field": text.field}, device, rank, _conditioning_of(text))
        said += held_out.notices
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    batches = together(lambda: decode_first(pipeline))
    return Training(
        config,
        rank,
        device,
        description,
        settings,
        run,
        data,
        text,
        model,
        optimizer,
        ema,
        take_step,
        pipeline,
        batches,
        checkpoints,
        held_out,
        found,
        loaded,
        said,
    )


def check_same_run(found: Found | None, run: str) -> None:
    """Raises TrainingError for a checkpoint of another run than the one whose started.json has the checksum `run`."""
    if found is not None and found.state["run"] != run:
        raise TrainingError(f"{found.folder} is a checkpoint of another run; remove it")


def open_run(config: TrainConfig, rank: Rank, device: torch.device) -> Opened:
    """Opens the data sets and the caches, and builds the model on the device: what each rank does by itself.

    Raises as `setup`.
    """
    if config.graph and device.type != "cuda":
        raise ConfigError("--graph captures the step as a CUDA graph and needs a CUDA device; leave it out")
    if config.graph and rank.world > 1:
        raise ConfigError(f"--graph works in one process, and there are {rank.world} ranks; leave it out")
    if config.batch_size % rank.world:
        raise ConfigError(
            f"batch_size {config.batch_size} is not a multiple of the {rank.world} ranks, which each take a part of "
            f"it; use {config.batch_size // rank.world * rank.world or rank.world}"
        )
    if config.fp8 and config.parallel == "fsdp" and config.compile:
        raise ConfigError("--fp8 with --parallel fsdp is not compiled; leave out --compile")
    caches = [Cache(path) for path in config.cache]
    data, read = open_training_sets(config.data, config.pictures, config.options, caches)

    torch.manual_seed(config.seed)
    text = open_text(config, data, caches)
    data.leave_out(text.left_out)
    description = describe(config, text) | {
        "read": read,
        "problems": [problem._asdict() for samples in data.sets for problem in samples.problems],
        "left_out": notices.left_out(text),
    }
    if config.init_from is not None:
        description["vit"] = conventions(config.init_from, preset(config.preset).vit)
    model = run_folder.build(description).to(device)
    check_disk(config, model, _conditioning_of(text))
    model.set_checkpointing(config.checkpointing)
    model.set_fp8(config.fp8)
    return Opened(caches, data, text, description, model)


def make_loss(config: TrainConfig, rank: Rank) -> nn.Module:
    """The loss of the global batch, from a rank's features."""
    if config.loss == "cosine":
        return CosineLoss()
    return ClipLoss(gather_with_grad=True, rank=rank.number, world_size=rank.world, normalize=True)


def identity(config: TrainConfig, opened: Opened, device: torch.device) -> dict[str, Any]:
    """What started.json keeps of a run, and must be the same when it goes on. Raises ConfigError, for --init-from."""
    captions = opened.text.digests if isinstance(opened.text, TokenizedText) else ()
    return {
        "mathematics": mathematics(
            config,
            precision="bf16" if use_bf16(config.precision, device) else "fp32",
            text_dim=opened.description.get("text_dim"),
            read=opened.description["read"],
            init_from=None if config.init_from is None else weights_digest(config.init_from),
        ),
        "fingerprints": fingerprints(opened.data, opened.caches, captions, opened.text.left_out),
    }


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


def check_disk(config: TrainConfig, model: nn.Module, conditioning: Conditioning | None) -> None:
    """Raises TrainingError when the disk of config.out has no space for the weights, the text's conditioning and the
    logs."""
    needed = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    needed += len(conditioning.to_bytes()) if conditioning else 0
    needed, free = needed + _LOGGED * config.steps, free_bytes(config.out)
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
    return description | {
        "text_dim": text.dim,
        "encoder": text.encoder,
        "conditioning": text.conditioning.as_dict() if text.conditioning else None,
        "rotation": text.rotation.as_dict() if text.rotation else None,
        "codec": text.caches[0].manifest.codec,
    }


def _conditioning_of(text: CachedText | TokenizedText) -> Conditioning | None:
    return text.conditioning if isinstance(text, CachedText) else None


def make_pipeline(config: TrainConfig, data: Collection, image_size: int, device: torch.device, rank: Rank) -> Pipeline:
    """The pipeline that config.loader names, with image_size pixels a side.

    Raises ConfigError as Loading and Pipeline do; BackendError for DALI when it is not installed.
    """
    on_gpu = device.type == "cuda"
    loading = Loading(
        batch_size=config.batch_size // rank.world,
        image_size=image_size,
        seed=config.seed,
        min_crop_area=config.min_crop_area,
        flip=config.flip,
        colour=config.colour,
        shuffle_buffer=config.shuffle_buffer,
        max_skipped=config.max_skipped,
        checked=config.checked,
        rank=rank.number,
        world=rank.world,
        threads=config.threads or rank.share_of(cpu_count()) or cpu_count(),
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
