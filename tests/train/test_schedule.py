"""train/schedule.py: what a step's number decides."""

import math
from pathlib import Path

import pytest

from lift_fast.train.config import TrainConfig
from lift_fast.train.schedule import lr_factor, patch_dropout


def config(**settings):
    return TrainConfig("clip", (Path("data"),), Path("out"), **settings)


def factors(**settings):
    run = config(**settings)
    return [lr_factor(step, run) for step in range(run.steps)]


def test_warm_up_and_cosine():
    got = factors(steps=9, warmup=4)
    assert got == [0.25, 0.5, 0.75, 1.0] + [0.5 * (1 + math.cos(math.pi * i / 5)) for i in range(5)]
    assert got[4] == 1 and 0 < got[-1] < 0.1
    assert factors(steps=1, warmup=0) == factors(steps=1, warmup=1) == [1.0]
    assert factors(steps=2, warmup=2) == [0.5, 1.0]
    assert factors(steps=2, warmup=8) == [1 / 8, 2 / 8]  # shorter than its warm-up


def test_constant_and_cool_down():
    assert factors(schedule="constant", steps=4, warmup=2) == [0.5, 1.0, 1.0, 1.0]
    assert factors(schedule="constant", steps=8, warmup=2, cooldown=4) == [0.5, 1, 1, 1, 1, 0.75, 0.5, 0.25]
    assert factors(schedule="constant", steps=4, warmup=2, cooldown=2) == [0.5, 1, 1, 0.5]
    assert factors(schedule="constant", steps=3, warmup=0, cooldown=3) == pytest.approx([1, 2 / 3, 1 / 3])


def test_patch_dropout_ends():
    run = config(steps=5, patch_dropout=0.5, patch_dropout_steps=2)
    assert [patch_dropout(step, run) for step in range(5)] == [0.5, 0.5, 0, 0, 0]
    assert {patch_dropout(step, config(steps=5, patch_dropout=0.5)) for step in range(5)} == {0.5}
    assert patch_dropout(0, config()) == 0
