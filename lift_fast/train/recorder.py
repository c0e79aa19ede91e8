"""Records a run while it trains: metrics.jsonl, TensorBoard events, a progress bar.

Reading a step's loss makes the host wait until the device has finished the step. The recorder therefore reads the
figures of a step only after the next step has been launched, so that a GPU never runs out of work.
"""

import json
import math
import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from ..errors import TrainingError
from ..files import for_appending
from ..progress import bar
from ..ranks import every
from .config import TrainConfig

_MEDIAN_OF, _MEDIAN_FROM = 100, 20  # losses whose median a spike is compared with, at most and at least


class HostCopy:
    """A tensor on its way to the host: on a GPU an asynchronous copy into pinned memory, started at once. A list of
    numbers is there already."""

    def __init__(self, tensor: Tensor | list[float]):
        self.host, self.done = tensor, None
        if isinstance(tensor, Tensor) and tensor.is_cuda:
            self.host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self.host.copy_(tensor, non_blocking=True)
            self.done = torch.cuda.Event()
            self.done.record()

    def read(self) -> list[float]:
        """The values, after waiting for the copy."""
        if self.done is not None:
            self.done.synchronize()
        return self.host if isinstance(self.host, list) else self.host.tolist()


@dataclass
class StepRecord:
    """The figures of one step, counted from 0.

    stats: what Step returned, float32 [3]: loss, norm of the gradient, scale. skipped: how often bad samples came up
    until then, on all ranks: the first of the sums on their way to the host. rows: the row numbers of this rank's
    samples. limit: the loss above which it is a spike. data_ms: milliseconds until the batch was on its way to the
    device. evaluation: scores of the held-out sets after this step, if it was evaluated. step_ms: milliseconds of the
    whole iteration without the evaluation; set when it ends.
    """

    step: int
    stats: HostCopy
    lr: float
    skipped: HostCopy
    rows: Tensor
    limit: float
    data_ms: float
    evaluation: dict[str, Any] | None = None
    step_ms: float = math.nan


class Logger(Protocol):
    """Writes the records of a run to one place."""

    def log(self, record: dict[str, Any]) -> None:
        """Writes one step: step, samples (seen so far), loss, lr, logit_scale (the factor on the cosines, at most
        100), grad_norm (before clipping), data_ms, step_ms, skipped_met (how often bad samples came up so far);
        evaluation, the scores of the held-out sets, where it was evaluated; skipped_step, true, where a spike changed
        no weights. A loss or norm that is not finite is None."""

    def close(self) -> None:
        """Ends the log; called once, whether or not the run succeeds."""


class JsonLines:
    """A JSON object a step, each on a line of its own, written at once."""

    def __init__(self, path: Path):
        self.file = open(path, "a", opener=for_appending)

    def log(self, record: dict[str, Any]) -> None:
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


class TensorBoard:
    """TensorBoard events in a folder."""

    SCALARS = ("loss", "lr", "logit_scale", "grad_norm", "step_ms")

    def __init__(self, folder: Path, step: int):
        self.writer = SummaryWriter(str(folder), purge_step=step)  # also 0: a run may begin anew

    def log(self, record: dict[str, Any]) -> None:
        for name in self.SCALARS:
            if record[name] is not None:
                self.writer.add_scalar(name, record[name], record["step"])
        for name, scores in record.get("evaluation", {}).items():
            for score, value in scores.items():
                self.writer.add_scalar(f"{name}/{score}", value, record["step"])

    def close(self) -> None:
        self.writer.close()


class ProgressBar:
    """On stderr: steps, loss, images per second."""

    def __init__(self, config: TrainConfig, shown: bool, step: int):
        self.batch_size = config.batch_size
        title = f"train {config.model}"
        self.bar = bar(total=config.steps, desc=title, unit="step", initial=step, disable=not shown)

    def log(self, record: dict[str, Any]) -> None:
        rate = 1e3 * self.batch_size / record["step_ms"]
        loss = "none" if record["loss"] is None else f"{record['loss']:.3f}"
        self.bar.set_postfix_str(f"loss {loss}, {rate:.0f} images/s", refresh=False)
        self.bar.update()

    def close(self) -> None:
        self.bar.close()


def open_loggers(config: TrainConfig, progress: bool, step: int = 0) -> list[Logger]:
    """The logs of a run. They write to config.out, which must exist; progress: whether to show a progress bar; step:
    the number of steps that are logged already.

    When one cannot be opened, those before it are closed."""
    makers: list[Callable[[], Logger]] = [
        lambda: JsonLines(config.out / "metrics.jsonl"),
        lambda: TensorBoard(config.out, step),
        lambda: ProgressBar(config, progress, step),
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

    losses, step_ms: of every step that has been written, in order, those before a stop (the arguments) included; the
    loss of a step that was skipped is NaN. where: names the sample of a row number. spikes: number of steps that were
    skipped.
    """

    def __init__(
        self,
        config: TrainConfig,
        loggers: Sequence[Logger],
        *,
        losses: Sequence[float] = (),
        step_ms: Sequence[float] = (),
        where: Callable[[int], str] = str,
    ):
        self.config, self.loggers, self.where = config, loggers, where
        self.losses, self.step_ms = list(losses), list(step_ms)
        self.spikes = sum(map(math.isnan, self.losses))
        self._pending: list[StepRecord] = []
        self._alone = False  # an error has ended the run on this rank: the others will not answer
        self._closing = ExitStack()
        for logger in loggers:
            self._closing.callback(logger.close)

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        with self._closing:
            if kind is not None:
                self._alone = True
                with suppress(Exception):  # the error that ended the run is the one to raise
                    self.flush()

    def limit(self, step: int) -> float:
        """The loss above which `step` is a spike: from the losses until two steps before it, which are known when a
        step is launched; infinity while they are few, or where config.spike is not set."""
        known = [loss for loss in self.losses[max(0, step - 1 - _MEDIAN_OF) : max(0, step - 1)] if math.isfinite(loss)]
        if self.config.spike is None or len(known) < _MEDIAN_FROM:
            return math.inf
        return self.config.spike * statistics.median(known)

    def add(self, record: StepRecord) -> None:
        """Takes the record of a step that has been launched, and writes the previous one. Raises as `flush` does."""
        self._pending.append(record)
        while len(self._pending) > 1:
            self._write_first()

    def flush(self) -> None:
        """Writes the records that are not written yet.

        Raises TrainingError for a spike, unless config.on_spike is "skip". Ranks call it together.
        """
        while self._pending:
            self._write_first()

    def _write_first(self) -> None:
        pending = self._pending[0]
        loss, grad_norm, logit_scale = pending.stats.read()
        skipped = pending.skipped.read()[0]
        del self._pending[0]  # only now: Ctrl-C may end the wait for the device
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        spike = not finite or loss > pending.limit
        if spike:
            self._spiked(pending, loss, grad_norm)
        self.losses.append(math.nan if spike else loss)
        self.step_ms.append(pending.step_ms)
        record: dict[str, Any] = {
            "step": pending.step,
            "samples": (pending.step + 1) * self.config.batch_size,
            "loss": loss if math.isfinite(loss) else None,
            "lr": pending.lr,
            "logit_scale": logit_scale,
            "grad_norm": grad_norm if math.isfinite(grad_norm) else None,
            "data_ms": pending.data_ms,
            "step_ms": pending.step_ms,
            "skipped_met": int(skipped),
        }
        if spike:
            record["skipped_step"] = True
        if pending.evaluation is not None:
            record["evaluation"] = pending.evaluation
        for logger in self.loggers:
            logger.log(record)

    def _spiked(self, pending: StepRecord, loss: float, grad_norm: float) -> None:
        """Lists the samples of a spike in spikes.jsonl; raises TrainingError where it ends the run."""
        mine = [self.where(row) for row in pending.rows.tolist()]
        samples = [name for names in ([mine] if self._alone else every(mine)) for name in names]
        file = self.config.out / "spikes.jsonl"
        if self.loggers:
            line = {"step": pending.step, "loss": repr(loss), "grad_norm": repr(grad_norm), "samples": samples}
            with open(file, "a", opener=for_appending) as lines:
                lines.write(json.dumps(line) + "\n")
        if self.config.on_spike == "skip":
            self.spikes += 1
            return
        self._pending.clear()
        what = (
            f"the loss is {loss} at step {pending.step}"
            if not math.isfinite(loss)
            else f"the gradient's norm is {grad_norm} at step {pending.step}"
            if not math.isfinite(grad_norm)
            else f"the loss jumps to {loss:.4g} at step {pending.step}, above {pending.limit:.4g}"
        )
        error = TrainingError(
            f"{what}; that step changed no weights, and its samples are in {file}. Lower --lr (now {self.config.lr}), "
            "use --precision fp32, or leave such steps out with --on-spike skip. The steps before it are in "
            f"{self.config.out / 'metrics.jsonl'}"
        )
        error.reported = not self.loggers  # rank 0 has them, and says it
        raise error
