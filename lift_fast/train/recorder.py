"""Records a run while it trains: metrics.jsonl, TensorBoard events, a progress bar.

Reading a step's loss makes the host wait until the device has finished the step. The recorder therefore reads the
figures of a step only after the next step has been launched, so that a GPU never runs out of work.
"""

import json
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from ..errors import TrainingError
from ..progress import bar
from .config import TrainConfig


class HostCopy:
    """A tensor on its way to the host: on a GPU an asynchronous copy into pinned memory, started at once."""

    def __init__(self, tensor: Tensor):
        self.host, self.done = tensor, None
        if tensor.is_cuda:
            self.host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self.host.copy_(tensor, non_blocking=True)
            self.done = torch.cuda.Event()
            self.done.record()

    def read(self) -> list[float]:
        """The values, after waiting for the copy."""
        if self.done is not None:
            self.done.synchronize()
        return self.host.tolist()


@dataclass
class StepRecord:
    """The figures of one step, counted from 0.

    stats: what Step returned, float32 [3]: loss, norm of the gradient, scale. data_ms: milliseconds until the batch
    was on its way to the device. skipped: bad samples until then. step_ms: milliseconds of the whole iteration; set
    when it ends.
    """

    step: int
    stats: HostCopy
    lr: float
    data_ms: float
    skipped: int
    step_ms: float = math.nan


class Logger(Protocol):
    """Writes the records of a run to one place."""

    def log(self, record: dict[str, Any]) -> None:
        """Writes one step: step, samples (seen so far), loss, lr, logit_scale (the factor on the cosines, at most
        100), grad_norm (before clipping), data_ms, step_ms, skipped_pictures (so far)."""

    def close(self) -> None:
        """Ends the log; called once, whether or not the run succeeds."""


class JsonLines:
    """A JSON object a step, each on a line of its own, written at once."""

    def __init__(self, path: Path):
        self.file = open(path, "w")

    def log(self, record: dict[str, Any]) -> None:
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


class TensorBoard:
    """TensorBoard events in a folder."""

    SCALARS = ("loss", "lr", "logit_scale", "grad_norm", "step_ms")

    def __init__(self, folder: Path):
        self.writer = SummaryWriter(str(folder))

    def log(self, record: dict[str, Any]) -> None:
        for name in self.SCALARS:
            self.writer.add_scalar(name, record[name], record["step"])

    def close(self) -> None:
        self.writer.close()


class ProgressBar:
    """On stderr: steps, loss, images per second."""

    def __init__(self, config: TrainConfig, shown: bool):
        self.batch_size = config.batch_size
        self.bar = bar(total=config.steps, desc=f"train {config.model}", unit="step", disable=not shown)

    def log(self, record: dict[str, Any]) -> None:
        rate = 1e3 * self.batch_size / record["step_ms"]
        self.bar.set_postfix_str(f"loss {record['loss']:.3f}, {rate:.0f} images/s", refresh=False)
        self.bar.update()

    def close(self) -> None:
        self.bar.close()


def open_loggers(config: TrainConfig, progress: bool) -> list[Logger]:
    """The logs of a run. They write to config.out, which must exist; progress: whether to show a progress bar.

    When one cannot be opened, those before it are closed."""
    makers: list[Callable[[], Logger]] = [
        lambda: JsonLines(config.out / "metrics.jsonl"),
        lambda: TensorBoard(config.out),
        lambda: ProgressBar(config, progress),
    ]
    with ExitStack() as opened:
        loggers = []
        for make in makers:
            loggers.append(make())
            opened.callback(loggers[-1].close)
        opened.pop_all()
    return loggers


class Recorder:
    """Hands the record of each step to the loggers, one step late. As a context manager it closes the loggers, after
    it has handed them the last step where an error or Ctrl-C ended the run.

    losses, step_ms: of every step that has been written, in order.
    """

    def __init__(self, config: TrainConfig, loggers: Sequence[Logger]):
        self.config, self.loggers = config, loggers
        self.losses: list[float] = []
        self.step_ms: list[float] = []
        self._pending: list[StepRecord] = []
        self._closing = ExitStack()
        for logger in loggers:
            self._closing.callback(logger.close)

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        with self._closing:
            if kind is not None:
                with suppress(Exception):  # the error that ended the run is the one to raise
                    self.flush()

    def add(self, record: StepRecord) -> None:
        """Takes the record of a step that has been launched, and writes the previous one. Raises as `flush` does."""
        self._pending.append(record)
        while len(self._pending) > 1:
            self._write_first()

    def flush(self) -> None:
        """Writes the records that are not written yet. Raises TrainingError when a loss is not finite."""
        while self._pending:
            self._write_first()

    def _write_first(self) -> None:
        pending = self._pending[0]
        loss, grad_norm, logit_scale = pending.stats.read()
        del self._pending[0]  # only now: Ctrl-C may end the wait for the device
        if not math.isfinite(loss):
            self._pending.clear()
            raise TrainingError(
                f"the loss is {loss} at step {pending.step}; lower --lr (now {self.config.lr}) or use "
                f"--precision fp32. The steps before it are in {self.config.out / 'metrics.jsonl'}"
            )
        self.losses.append(loss)
        self.step_ms.append(pending.step_ms)
        record = {
            "step": pending.step,
            "samples": (pending.step + 1) * self.config.batch_size,
            "loss": loss,
            "lr": pending.lr,
            "logit_scale": logit_scale,
            "grad_norm": grad_norm,
            "data_ms": pending.data_ms,
            "step_ms": pending.step_ms,
            "skipped_pictures": pending.skipped,
        }
        for logger in self.loggers:
            logger.log(record)
