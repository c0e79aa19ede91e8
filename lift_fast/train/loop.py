"""The trainer: LIFT against cached text, or CLIP with a text tower, on the same images in the same order.

open and check everything, load the newest checkpoint                           setup.py
for each step from there on:
    the next batch: this rank's part of the global batch                        data/
    forward, loss, backward, optimizer                                          step.py
    the figures of the step before it go to the logs                            recorder.py
    the held-out sets, if they are due; the weights, if they are the best       held_out.py, best.py
    a checkpoint, if one is due; the end, if a signal asked for it              checkpoints.py, signals.py
the weights and run.json                                                        run_folder.py
"""

import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from typing import Any

import torch

from .. import run_folder
from ..data.reading import cpu_count
from ..data.skipped import merged
from ..devices import device_of_rank
from ..errors import Stopped, TrainingError
from ..measure.machine import machine, versions
from ..measure.time import quartile_distance
from ..nn import Clip, Lift
from ..ranks import Rank, answering, every, joined, together
from . import folder
from .best import Best
from .config import TrainConfig
from .parallel import sum_over_ranks, whole
from .recorder import HostCopy, Recorder, StepRecord, open_loggers
from .schedule import lr_factor
from .setup import Training, setup
from .signals import StopRequests
from .state import tensors_of

_WARM_UP = 3  # first steps that fill caches and allocate; their times are left out of the medians


def train(
    config: TrainConfig,
    *,
    progress: bool = True,
    opened: Callable[[Training], None] | None = None,
    warn: Callable[[str], object] = lambda warning: None,
) -> dict[str, Any]:
    """Trains one model and returns the content of run.json; started by torchrun, as one of its ranks.

    progress: whether to show a progress bar. opened: called when everything has been opened and checked, before the
    first file is written. warn: called with a warning for the user.

    Writes to config.out: started.json, metrics.jsonl, TensorBoard events, checkpoints, skipped.jsonl if there are bad
    samples, spikes.jsonl if there are spikes, weights/best if it evaluates, and at the end model.safetensors and
    run.json. Everything is checked before the first of these is written. When config.out holds this run, it goes on
    from its newest checkpoint, and returns at once if it is complete.

    Raises what `setup` raises; DataError while training when too many samples are bad; Stopped after SIGTERM, SIGINT or
    SIGUSR1, with a checkpoint written; TrainingError when the loss is not finite or jumps (the steps before it are in
    metrics.jsonl), and when the run cannot be written; RankLost when another rank has died or fallen behind.
    """
    rank = Rank.from_environment()
    device = device_of_rank(config.device, rank, config.threads or rank.share_of(cpu_count()))
    with joined(rank, device, config.timeout), answering(rank), ExitStack() as stack:
        training = setup(config, rank, device, stack, warn)
        if training is None:
            return run_folder.read_finished(config.out)
        if opened is not None:
            opened(training)
        # Within `writing`, since closing a log writes again what a full disk has not taken.
        with folder.writing(config.out), ExitStack() as files:
            return Run(training, files, progress and rank.is_first, warn).to_the_end()


class Run:
    """A run while it trains. to_the_end() trains and returns the content of run.json."""

    def __init__(self, training: Training, stack: ExitStack, progress: bool, warn: Callable[[str], object]):
        self.training, self.config, self.rank = training, training.config, training.rank
        self.warn = warn
        self.identity = training.identity
        history = together(lambda: self._open_folder(stack), only_first=True)
        best_by = None if training.held_out is None else training.held_out.best_by
        self.best = Best(self.config.out, best_by, warn)
        loggers = open_loggers(self.config, progress, training.step) if self.rank.is_first else []
        self.recorder = stack.enter_context(
            Recorder(self.config, loggers, losses=history.losses, step_ms=history.step_ms, where=training.data.where)
        )
        stack.enter_context(closing(training.batches))
        self.stop = stack.enter_context(StopRequests())
        self.seconds_before = training.found.state["seconds"] if training.found else 0.0
        self.started = self.saved_at = time.monotonic()
        self.votes: list[HostCopy] = []  # of the last two steps

    def _open_folder(self, stack: ExitStack) -> folder.History:
        """Makes the folder of a new run, or takes up that of one that goes on."""
        training, out = self.training, self.config.out
        if not (out / folder.STARTED).exists():
            stack.enter_context(folder.locked(out))
            about = {"config": training.description["config"], "versions": versions()}
            about["vit"] = training.description.get("vit", {})  # for inference while it trains
            self.identity = folder.start(out, training.settings, about, training.conditioning)["checksum"]
        history = folder.rewind(out, training.step)
        for warning in history.warnings:
            self.warn(warning)
        training.pipeline.skipped.write_to(out / "skipped.jsonl")
        for row, error in training.text.left_out.items():
            training.pipeline.skipped.note(row, error)  # a short run may not come to them
        return history

    def to_the_end(self) -> dict[str, Any]:
        """Trains the steps that are left; writes the weights and run.json, whose content it returns."""
        for step in range(self.training.step, self.config.steps):
            self._step(step)
            stopping, due = self._agreed(step)
            if (stopping or due) and step + 1 < self.config.steps:
                self.recorder.flush()  # a spike ends the run before its weights are saved
                self._save(step + 1)
                if stopping:
                    self.training.checkpoints.wait(raising=True)
                    why = self.stop.requested or "a signal to another rank"
                    stopped = Stopped(
                        f"stopped by {why} after step {step + 1} of {self.config.steps}; the same command goes on from "
                        f"there, with the checkpoint in {self.config.out}"
                    )
                    stopped.reported = not self.rank.is_first
                    raise stopped
        self.recorder.flush()
        self.training.checkpoints.wait()
        return self._finish()

    def _step(self, step: int) -> None:
        """Launches a step, and records the one before it."""
        training, config = self.training, self.config
        begun = time.perf_counter()
        pixels, text, rows = training.next_batch()
        data_ms = 1e3 * (time.perf_counter() - begun)
        lr, limit = config.lr * lr_factor(step, config), self.recorder.limit(step)
        stats = HostCopy(training.take_step(pixels, text, lr, training.kept(step), limit))
        if training.ema is not None:
            training.ema.update()
        votes = HostCopy(sum_over_ranks(self._vote(), self.rank, training.device))
        self.votes = [*self.votes[-1:], votes]
        record = StepRecord(step, stats, lr, votes, rows, limit, data_ms)
        if config.eval_every is not None and ((step + 1) % config.eval_every == 0 or step + 1 == config.steps):
            evaluated = time.perf_counter()
            record.evaluation = self._evaluate(step + 1)
            begun += time.perf_counter() - evaluated
        try:
            self.recorder.add(record)  # reads the previous step's stats, while the device computes this step
        finally:
            record.step_ms = 1e3 * (time.perf_counter() - begun)

    def _evaluate(self, step: int) -> dict[str, Any]:
        """The scores of the held-out sets after `step` steps. Weights that are better than all before are kept."""
        training = self.training
        assert training.held_out is not None
        with averaged(training):
            scores = training.held_out.scores(training.model, training.take_step.towers)
        score = math.nan if self.best.by is None else self.best.by.value(scores)
        if self.best.is_beaten(score):  # on all ranks or on none
            with final_weights(training) as model:
                self.best.replace(model, self._described(step), training.conditioning, score)
        return scores

    def _described(self, step: int) -> dict[str, Any]:
        """What run.json says of the weights after `step` steps, while the run goes on."""
        return self.training.description | {"field": self.training.text.field, "step": step}

    def _vote(self) -> list[float]:
        """[how often this rank has met bad samples, whether it was asked to stop, whether a checkpoint is due]."""
        minutes = self.config.save_minutes
        due = minutes is not None and self.rank.is_first and time.monotonic() - self.saved_at > 60 * minutes
        return [self.training.pipeline.skipped.met.total(), self.stop.requested is not None, due]

    def _agreed(self, step: int) -> tuple[bool, bool]:
        """Whether all ranks stop after this step, and whether they write a checkpoint: the same on each of them.

        Several ranks go by the votes of the step before, which are there without waiting for the device.
        """
        _, stopping, due = self.votes[0].read() if self.rank.world > 1 and len(self.votes) > 1 else self._vote()
        if self.rank.world > 1 and len(self.votes) < 2:
            stopping = due = False
        every_steps = self.config.save_every
        return bool(stopping), bool(due) or (every_steps is not None and (step + 1) % every_steps == 0)

    def _save(self, step: int) -> None:
        """Starts to write the checkpoint after `step` steps, and writes the weights alone where they are asked for."""
        training, config = self.training, self.config
        training.check_text()
        self.saved_at = time.monotonic()
        state = {
            "seconds": self.seconds,
            "samples_seen": step * config.batch_size,
            "loader": training.pipeline.state_dict(),
            "skipped": gathered(training),
            "ranks": self.rank.world,
            "run": self.identity,
        }
        training.checkpoints.save(step, tensors_of(training.model, training.optimizer, training.ema), state)
        if config.save_weights:
            with final_weights(training) as model:
                if self.rank.is_first:
                    self._save_weights(model, step)

    def _save_weights(self, model: Lift | Clip, step: int) -> None:
        """Writes a folder that `lift-fast eval` takes; where it cannot be written, the run goes on without it."""
        out = self.config.out / "weights" / f"step-{step:08d}"
        try:
            out.mkdir(parents=True, exist_ok=True)
            run_folder.save(out, model, self._described(step), self.training.conditioning)
        except (OSError, TrainingError) as error:
            self.warn(f"cannot write the weights of step {step} ({error}); the run goes on without them")

    @property
    def seconds(self) -> float:
        """Seconds of training so far, before and after stops."""
        return self.seconds_before + time.monotonic() - self.started

    def _finish(self) -> dict[str, Any]:
        """Writes the weights and run.json."""
        training = self.training
        training.check_text()
        run = summarise(training, self.recorder, self.seconds, gathered(training))
        if self.best.kept is not None:
            run["best"] = self.best.kept
        with final_weights(training) as model:
            together(lambda: run_folder.save(self.config.out, model, run, training.conditioning), only_first=True)
        return run


def gathered(training: Training) -> dict[str, Any]:
    """The bad samples that all ranks have met, of which rank 0 lists those that are not listed yet. A collective."""
    skipped = training.pipeline.skipped
    lines = every([] if training.rank.is_first else skipped.take_lines())
    if training.rank.is_first:
        skipped.write_lines([line for part in lines for line in part])
    return merged(every(skipped.state_dict()))


def averaged(training: Training) -> AbstractContextManager:
    """A context in which the model has the averaged weights, if there are any."""
    return nullcontext() if training.ema is None else training.ema.swapped()


@contextmanager
def final_weights(training: Training) -> Iterator[Lift | Clip]:
    """The model as the run would end with: with the averaged weights, if there are any, and on each rank whole.

    A collective with FSDP2, where it is a second model, in the memory that takes.
    """
    with averaged(training):
        if not training.take_step.sharded:
            yield training.model
            return
        model = run_folder.build(training.description).to(training.device)
        model.load_state_dict(whole(training.model.state_dict()))
        yield model


def summarise(training: Training, recorder: Recorder, seconds: float, skipped: dict[str, Any]) -> dict[str, Any]:
    """The content of run.json for a run that took `seconds`: its description, cost, losses, data, machine.

    skipped: the bad samples of all ranks.
    """
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
        "ranks": training.rank.world,
        "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
        "peak_memory_bytes": torch.cuda.max_memory_allocated(device) if on_gpu else None,
        "loss": [None if math.isnan(loss) else loss for loss in recorder.losses],
        "skipped_steps": recorder.spikes,
        "loader": {"kind": type(pipeline).__name__, "state": pipeline.state_dict()},
        **pipeline.skipped.report(skipped),
        "machine": machine(),
        "versions": versions(),
    }
