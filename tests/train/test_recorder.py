"""train/recorder.py: what a run records, and when it reads a step's figures."""

import json
import math

import pytest
import torch

from lift_fast.errors import TrainingError
from lift_fast.train.config import TrainConfig
from lift_fast.train.recorder import HostCopy, JsonLines, Recorder, StepRecord, open_loggers


class Log:
    """Keeps the records it is given."""

    def __init__(self):
        self.records, self.closed = [], 0

    def log(self, record):
        self.records.append(record)

    def close(self):
        self.closed += 1


def config(tmp_path, **changes):
    (tmp_path / "out").mkdir(exist_ok=True)
    return TrainConfig("clip", (tmp_path / "data",), tmp_path / "out", batch_size=8, **changes)


def record(step, loss=1.0, limit=math.inf):
    stats = HostCopy(torch.tensor([loss, 2.0, 3.0]))
    return StepRecord(step, stats, 0.1, HostCopy([5.0, 0.0, 0.0]), torch.tensor([7, 9]), limit, 4.0)


def test_a_step_is_written_when_the_next_one_has_been_launched(tmp_path):
    log = Log()
    with Recorder(config(tmp_path), [log]) as recorder:
        for step in range(3):
            added = record(step, loss=float(step))
            recorder.add(added)
            assert len(log.records) == step
            added.step_ms = 10.0 + step
        recorder.flush()
        recorder.flush()
    assert [written["step"] for written in log.records] == [0, 1, 2]
    assert recorder.losses == [0.0, 1.0, 2.0]
    assert recorder.step_ms == [10.0, 11.0, 12.0]
    assert log.records[1] == {
        "step": 1,
        "samples": 16,
        "loss": 1.0,
        "lr": 0.1,
        "logit_scale": 3.0,
        "grad_norm": 2.0,
        "data_ms": 4.0,
        "step_ms": 11.0,
        "skipped_met": 5,
    }


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_ends_the_run_after_the_steps_before_it(tmp_path, loss):
    log = Log()
    with pytest.raises(TrainingError, match=f"the loss is {loss} at step 1; that step changed no weights"):
        with Recorder(config(tmp_path), [log]) as recorder:
            recorder.add(record(0))
            recorder.add(record(1, loss))
            recorder.add(record(2))
    assert [written["step"] for written in log.records] == [0]
    assert log.closed == 1


def test_loggers_are_closed_once_and_all_of_them(tmp_path):
    class Broken(Log):
        def close(self):
            raise OSError("full")

    first, last = Log(), Log()
    with pytest.raises(OSError, match="full"):
        with Recorder(config(tmp_path), [first, Broken(), last]):
            pass
    assert first.closed == last.closed == 1


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_the_step_before_an_error_is_written(tmp_path, error):
    """It was lost when the next batch failed, or on Ctrl-C."""
    log = Log()
    with pytest.raises(error):
        with Recorder(config(tmp_path), [log]) as recorder:
            recorder.add(record(0))
            recorder.add(record(1))
            raise error
    assert [written["step"] for written in log.records] == [0, 1] and log.closed == 1
    assert recorder.losses == [1.0, 1.0]


def test_an_error_is_not_hidden_by_the_last_step_s(tmp_path):
    log = Log()
    with pytest.raises(ValueError, match="the batch"):
        with Recorder(config(tmp_path), [log]) as recorder:
            recorder.add(record(0, math.nan))
            raise ValueError("the batch")
    assert log.records == [] and log.closed == 1


def test_ctrl_c_while_waiting_for_the_device_loses_no_step(tmp_path):
    class Slow(HostCopy):
        asked = 0

        def read(self):
            self.asked += 1
            if self.asked == 1:
                raise KeyboardInterrupt
            return super().read()

    log, first = Log(), record(0)
    first.stats = Slow(torch.tensor([1.0, 2.0, 3.0]))
    with pytest.raises(KeyboardInterrupt):
        with Recorder(config(tmp_path), [log]) as recorder:
            recorder.add(first)
            recorder.add(record(1))
    assert [written["step"] for written in log.records] == [0, 1]


def test_loggers_are_closed_when_a_later_one_cannot_be_opened(tmp_path, monkeypatch):
    """open_loggers leaked those before it."""
    opened = []

    class Open(Log):
        def __init__(self, path):
            super().__init__()
            opened.append(self)

    def full(path, step):
        raise OSError("no space")

    monkeypatch.setattr("lift_fast.train.recorder.JsonLines", Open)
    monkeypatch.setattr("lift_fast.train.recorder.TensorBoard", full)
    with pytest.raises(OSError, match="no space"):
        open_loggers(config(tmp_path), progress=False)
    assert [logger.closed for logger in opened] == [1]


def test_json_lines_are_on_disk_at_once(tmp_path):
    log = JsonLines(tmp_path / "metrics.jsonl")
    log.log({"step": 0, "loss": 0.5})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 0, "loss": 0.5}
    log.close()


@pytest.mark.gpu
def test_a_copy_from_a_gpu_does_not_wait():
    values = torch.tensor([1.0, 2.0, 3.0], device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        copy = HostCopy(values)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert copy.read() == [1.0, 2.0, 3.0]
