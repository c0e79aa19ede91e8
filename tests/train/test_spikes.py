"""Spikes of the loss: the run ends or leaves the step out, names its samples, and its weights stay what they were."""

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.ranks import SMALL, in_group, on_ranks
from support.tiny_caches import cache_of
from support.tiny_sets import make_set

from lift_fast.errors import TrainingError
from lift_fast.measure.report import page
from lift_fast.nn import PRESETS
from lift_fast.ranks import Rank
from lift_fast.train.config import TrainConfig
from lift_fast.train.loop import train
from lift_fast.train.setup import Training
from lift_fast.train.state import tensors_of


@pytest.fixture(autouse=True)
def small_preset(monkeypatch):
    monkeypatch.setitem(PRESETS, "small", SMALL)


@pytest.fixture
def config(tmp_path) -> TrainConfig:
    cache = cache_of(tmp_path / "cache", make_set(tmp_path / "data", 23, per_shard=7, broken={3}))
    return TrainConfig(
        "lift", (tmp_path / "data",), tmp_path / "run", (cache,),
        preset="small", steps=9, batch_size=6, warmup=2, precision="fp32", save_every=3, ema=0.8,
    )  # fmt: skip


class Spiking:
    """For `opened`: the images of these steps are NaN. samples: of each step, where they stand. states: of each step,
    the tensors before it."""

    def __init__(self, *steps: int, only_rank: int | None = None):
        self.steps, self.only_rank = steps, only_rank
        self.samples: list[list[str]] = []
        self.states: list[dict[str, dict[str, torch.Tensor]]] = []

    def __call__(self, training: Training) -> None:
        numbers, next_batch = itertools.count(training.step), training.next_batch

        def spiking():
            pixels, text, rows = next_batch()
            self.samples.append([training.data.where(row) for row in rows.tolist()])
            state = tensors_of(training.model, training.optimizer, training.ema)
            flat = {"model": state["model"], "ema": state["ema"]} | state["optimizer"]
            self.states.append({kind: {k: v.clone() for k, v in part.items()} for kind, part in flat.items()})
            if next(numbers) in self.steps and self.only_rank in (None, training.rank.number):
                pixels = torch.full((len(rows), 3, 16, 16), torch.nan)
            return pixels, text, rows

        training.next_batch = spiking  # type: ignore[method-assign]


def lines_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("step", [0, 2, 3, 8])
def test_a_spike_ends_the_run_with_the_checkpoint_before_it(config, step):
    """Also where a checkpoint is due after that step. Without the spike the same command goes on as if there had been
    none."""
    whole = train(replace(config, out=config.out.with_name("whole")), progress=False)
    spiking = Spiking(step)
    with pytest.raises(TrainingError) as error:
        train(config, progress=False, opened=spiking)
    file = config.out / "spikes.jsonl"
    assert str(error.value).startswith(f"the loss is nan at step {step}; that step changed no weights, and its samples")
    assert str(file) in str(error.value) and "--on-spike skip" in str(error.value) and "\n" not in str(error.value)
    assert lines_of(file) == [{"step": step, "loss": "nan", "grad_norm": "nan", "samples": spiking.samples[step]}]
    assert [line["step"] for line in lines_of(config.out / "metrics.jsonl")] == list(range(step))
    found = sorted(path.name for path in (config.out / "checkpoints").glob("*"))
    assert found == [f"step-{done:08d}" for done in range(3, step + 1, 3)][-2:]
    assert not (config.out / "run.json").exists()

    went_on = []
    run = train(config, progress=False, opened=lambda training: went_on.append(training.step))
    assert went_on == [step // 3 * 3] and run["loss"] == whole["loss"] and lines_of(file) == []
    weights = [load_file(out / "model.safetensors") for out in (config.out, config.out.with_name("whole"))]
    assert equal(*weights)


@pytest.mark.parametrize("steps", [(0,), (4,), (4, 5), (8,)])
def test_a_spike_is_left_out_and_counted(config, steps):
    """The weights and AdamW's state stay those before it; averages approach the weights as in any step."""
    spiking = Spiking(*steps)
    run = train(replace(config, on_spike="skip"), progress=False, opened=spiking)
    assert [step for step, loss in enumerate(run["loss"]) if loss is None] == list(steps)
    assert run["skipped_steps"] == len(steps) and len(run["loss"]) == 9
    assert all(loss is None or math.isfinite(loss) for loss in run["loss"])
    lines = lines_of(config.out / "metrics.jsonl")
    assert [line["step"] for line in lines if line.get("skipped_step")] == list(steps)
    assert [(line["step"], line["samples"]) for line in lines_of(config.out / "spikes.jsonl")] == [
        (step, spiking.samples[step]) for step in steps
    ]
    for step in range(8):
        before, after = spiking.states[step : step + 2]
        for kind in ("model", "step", "exp_avg", "exp_avg_sq"):
            assert equal(before[kind], after[kind]) == (step in steps), (step, kind)
        for name, average in before["ema"].items():
            torch.testing.assert_close(after["ema"][name], torch.lerp(average, after["model"][name], 0.2))


def test_a_run_that_a_spike_has_ended_goes_on_without_that_step(config):
    """With --on-spike skip, to the weights of a run that had it from its start."""
    skipping = replace(config, on_spike="skip", out=config.out.with_name("skipping"))
    whole = train(skipping, progress=False, opened=Spiking(4))
    with pytest.raises(TrainingError, match="the loss is nan at step 4"):
        train(config, progress=False, opened=Spiking(4))
    run = train(replace(config, on_spike="skip"), progress=False, opened=Spiking(4))
    assert run["loss"] == whole["loss"] and run["skipped_steps"] == 1
    assert lines_of(config.out / "spikes.jsonl") == lines_of(skipping.out / "spikes.jsonl")
    assert equal(*(load_file(out / "model.safetensors") for out in (config.out, skipping.out)))


def test_a_loss_that_jumps(config):
    """Losses of about the same size: some are above so small a multiple of their median."""
    calm = replace(config, steps=40, lr=1e-6, spike=1.01, save_every=None)
    with pytest.raises(TrainingError, match=r"the loss jumps to \d\.\d+ at step \d+, above \d\.\d+; that step changed"):
        train(calm, progress=False)
    [spike] = lines_of(calm.out / "spikes.jsonl")
    losses = [line["loss"] for line in lines_of(calm.out / "metrics.jsonl")]
    assert spike["step"] == len(losses) >= 21 and len(spike["samples"]) == 6
    known = sorted(losses[:-1])  # the last one is not known when the step is launched
    median = (known[(len(known) - 1) // 2] + known[len(known) // 2]) / 2
    assert float(spike["loss"]) > 1.01 * median


def test_a_gradient_that_is_not_finite(config):
    """The loss alone would not show it."""

    def opened(training: Training) -> None:
        calls = itertools.count()
        weight = training.model.head.fc_1.weight  # type: ignore[union-attr]
        weight.register_hook(lambda gradient: gradient / 0 if next(calls) == 4 else gradient)

    with pytest.raises(
        TrainingError, match=r"the gradient's norm is (nan|inf) at step 4; that step changed no weights"
    ):
        train(config, progress=False, opened=opened)
    assert [line["step"] for line in lines_of(config.out / "spikes.jsonl")] == [4]


def on_a_rank(rank: Rank, config: TrainConfig) -> list:
    """Spikes in the second rank's images: run.json's losses with skip, then the error with stop; each with the samples
    of this rank."""
    found: list = []
    skipping = Spiking(4, only_rank=1)
    run = train(replace(config, on_spike="skip", out=config.out / "skip"), progress=False, opened=skipping)
    found.append((run["loss"], skipping.samples[4]))
    stopping = Spiking(4, only_rank=1)
    try:
        train(replace(config, out=config.out / "stop"), progress=False, opened=stopping)
    except TrainingError as error:
        found.append((str(error), error.reported, stopping.samples[4]))
    return found


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_ranks_decide_alike(config, parallel):
    config = replace(config, parallel=parallel, timeout=60.0)
    first, second = on_ranks(2, in_group, on_a_rank, config)
    assert first[0][0] == second[0][0] and [loss is None for loss in first[0][0]] == [step == 4 for step in range(9)]
    samples = first[0][1] + second[0][1]
    assert len(set(samples)) == 6
    for name in ("skip", "stop"):
        [spike] = lines_of(config.out / name / "spikes.jsonl")
        assert (spike["step"], spike["samples"]) == (4, samples)
    assert first[1][0] == second[1][0] and first[1][0].startswith("the loss is nan at step 4; that step changed no")
    assert (first[1][1], second[1][1]) == (False, True)  # said once
    assert [path.name for path in (config.out / "stop/checkpoints").iterdir()] == ["step-00000003"]


@pytest.mark.parametrize("losses", [[None, 2.0, None, 1.0], [None, None], [None], []])
def test_the_report_has_a_chart_of_such_a_run(losses):
    chart = page._training({"lift": {"loss": losses}, "clip": {"loss": [3.0, None]}})["chart"]
    assert chart.startswith("<svg") and "nan" not in chart
