"""Options of training together: each pair of them trains and goes on exactly, or is refused in one sentence."""

import itertools
import json
import math
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.ranks import SMALL, in_group, on_ranks
from support.tiny_caches import cache_of
from support.tiny_sets import make_set
from support.tiny_text import TinyEncoder

from lift_fast import run_folder
from lift_fast.errors import ConfigError, LiftFastError, Stopped
from lift_fast.nn import PRESETS
from lift_fast.ranks import Rank
from lift_fast.train.config import TrainConfig
from lift_fast.train.loop import train

Options = dict[str, Any]

# Each choice of each factor, as changes of the config.
FACTORS: dict[str, list[Options]] = {
    "model": [{"model": "lift"}, {"model": "clip"}],
    "loss": [{}, {"loss": "cosine"}],
    "ema": [{}, {"ema": 0.7}],
    "decay": [{}, {"layer_decay": 0.6}],
    "schedule": [{}, {"schedule": "constant"}, {"schedule": "constant", "cooldown": 2}],
    "patches": [{}, {"patch_dropout": 0.5}, {"patch_dropout": 0.25, "patch_dropout_steps": 2}],
    "lock": [{}, {"lock": "tower"}, {"lock": "tower", "unlocked_blocks": 1}],
    "pieces": [{}, {"micro_batch": 4}],
    "recomputed": [{}, {"checkpointing": "mlp"}, {"checkpointing": "branches"}, {"checkpointing": "block"}],
    "fp8": [{}, {"fp8": True}],
    "parallel": [{}, {"parallel": "fsdp"}],
    "precision": [{"precision": "fp32"}, {"precision": "bf16"}],
    "evaluated": [{}, {"eval_every": 2}],
    "from": [{}, {"init_from": "weights"}],
    "spikes": [{}, {"spike": 50.0, "on_spike": "skip"}],
}


def works(chosen: dict[str, int]) -> bool:
    """Whether the choices go together; the only two that do not are CLIP and the cosine loss."""
    return not (chosen.get("model") == 1 and chosen.get("loss") == 1)


def pairwise() -> list[dict[str, int]]:
    """Choices of all factors in which every two choices of two factors that go together meet: greedily."""
    levels = {name: range(len(choices)) for name, choices in FACTORS.items()}
    left = {
        ((a, i), (b, j))
        for a, b in itertools.combinations(levels, 2)
        for i, j in itertools.product(levels[a], levels[b])
        if works({a: i, b: j})
    }
    rows = []
    while left:
        row = dict(min(left))
        for name in levels:
            if name not in row:
                fits = [i for i in levels[name] if works(row | {name: i})]
                row[name] = max(
                    fits, key=lambda i: (sum({x, (name, i)} <= {*pair} for pair in left for x in row.items()), -i)
                )
        left -= {pair for pair in left if all(row[name] == i for name, i in pair)}
        rows.append(row)
    return rows


ROWS = pairwise()


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> Path:
    """A data set with its cache, one to evaluate on, and the weights of a run."""
    root = tmp_path_factory.mktemp("sets")
    cache_of(root / "cache", make_set(root / "data", 20, per_shard=7, broken={11}))
    make_set(root / "held", 7, seed=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "small", SMALL)
        train(config_of(root, root / "weights", model="clip", steps=1), progress=False)
    return root


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """The preset "small", and an encoder for the captions of held-out sets that takes no time."""
    monkeypatch.setitem(PRESETS, "small", SMALL)
    text_encoder = run_folder.text_encoder

    def encoder(model, run, device, conditioning=None):
        return TinyEncoder(mixed=False).encode if run["model"] == "lift" else text_encoder(model, run, device)

    monkeypatch.setattr(run_folder, "text_encoder", encoder)


def config_of(root: Path, out: Path, **options) -> TrainConfig:
    """A config with these options; paths among them are names in `root`."""
    settings = {"model": "lift", "preset": "small", "steps": 4, "batch_size": 6, "warmup": 1, "precision": "fp32"}
    settings |= {"data": (root / "data",), "out": out, "context": 12, "max_skipped": 0.5} | options
    if settings["model"] == "lift":
        settings["cache"] = (root / "cache",)
    if "init_from" in settings:
        settings["init_from"] = root / settings["init_from"]
    if "eval_every" in settings:
        settings["eval_data"] = {"held": root / "held"}
    return TrainConfig(**settings)


def stop(training) -> None:
    """For `opened`: SIGTERM in the second step."""
    kept = training.kept

    def signalled(step):
        if step == 1:
            signal.raise_signal(signal.SIGTERM)
        return kept(step)

    training.kept = signalled


def options_of(row: dict[str, int]) -> Options:
    found: Options = {}
    for name, choice in row.items():
        found |= FACTORS[name][choice]
    return found


@pytest.mark.parametrize("number", range(len(ROWS)))
def test_every_two_options_train_and_go_on_exactly(sets, tmp_path, number):
    options = options_of(ROWS[number])
    config = config_of(sets, tmp_path / "whole", **options)
    run = train(config, progress=False)
    assert all(loss is not None and math.isfinite(loss) for loss in run["loss"]) and len(run["loss"]) == 4
    lines = [json.loads(line) for line in (config.out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "evaluation" in line] == [1, 3] * ("eval_every" in options)

    begun = {}

    def opened(training):
        begun.update({name: tensor.clone() for name, tensor in training.model.state_dict().items()})
        stop(training)

    again = replace(config, out=tmp_path / "stopped")
    with pytest.raises(Stopped):
        train(again, progress=False, opened=opened)
    assert train(again, progress=False)["loss"] == run["loss"]
    one, other = (load_file(folder / "model.safetensors") for folder in (config.out, again.out))
    assert [name for name in one if not torch.equal(one[name], other[name])] == []

    moved = {name for name in one if not torch.equal(one[name], begun[name])}
    trained = {name for name in one if not name.startswith("visual.") or options.get("lock") != "tower"}
    if options.get("unlocked_blocks"):
        trained |= {name for name in one if name.startswith(("visual.transformer.blocks.1.", "visual.ln_post."))}
    if options.get("loss") == "cosine":
        trained -= {"logit_scale"}
    assert moved == trained


def test_the_pairs_are_few_enough():
    assert len(ROWS) <= 20


# ---- what does not go together

REFUSED = [
    ({"model": "clip", "loss": "cosine"}, "the cosine loss has no negatives, so it collapses with a trained text"),
    ({"cooldown": 2}, "--cooldown ends a constant schedule; add --schedule constant, or leave it out"),
    ({"schedule": "constant", "cooldown": 4}, "warmup 1 and cooldown 4 take more than the 4 steps"),
    ({"unlocked_blocks": 1}, "--unlocked-blocks are the blocks that --lock tower leaves; add it, or leave them out"),
    ({"lock": "tower", "unlocked_blocks": 3}, "--unlocked-blocks 3: the image tower of small has 2 blocks"),
    ({"patch_dropout_steps": 2}, "--patch-dropout-steps needs --patch-dropout"),
    ({"graph": True, "micro_batch": 2}, "--graph captures a step of one piece; leave out --micro-batch or --graph"),
    ({"graph": True, "patch_dropout": 0.5, "patch_dropout_steps": 2}, "--graph captures one shape, and"),
    ({"graph": True, "parallel": "fsdp"}, "--graph works in one process, --parallel fsdp in several; leave one out"),
    ({"eval_data": {"held": Path("held")}}, "--eval-data and --eval-every go together: give both, or neither"),
    ({"batch_size": 1}, "the contrastive loss of a batch of 1 is always 0"),
    ({"init_from": "nothing"}, "nothing"),
    ({"fp8": True, "parallel": "fsdp", "compile": True}, "--fp8 with --parallel fsdp is not compiled"),
]  # fmt: skip
if not torch.cuda.is_available():
    REFUSED += [({"graph": True}, "--graph captures the step as a CUDA graph and needs a CUDA device; leave it out")]


@pytest.mark.parametrize(("options", "why"), REFUSED, ids=["-".join(options) for options, _ in REFUSED])
def test_what_does_not_go_together_is_refused(sets, tmp_path, options, why):
    with pytest.raises(ConfigError) as error:
        train(config_of(sets, tmp_path / "a/b", **options), progress=False)
    assert why in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "a").exists()


# ---- compiled


COMPILED = [
    {"patch_dropout": 0.5, "patch_dropout_steps": 2, "ema": 0.7},
    {"micro_batch": 4},  # the last piece is smaller
    {"model": "clip", "lock": "tower", "unlocked_blocks": 1, "eval_every": 2},
    {"lock": "tower", "loss": "cosine"},
    {"checkpointing": "block", "patch_dropout": 0.25},
    {"parallel": "fsdp", "ema": 0.7},
    {"fp8": True},
    {"precision": "bf16"},
]


def compiles(sets, tmp_path, options) -> None:
    within = 0.05 if {"fp8", "precision"} & options.keys() else 1e-4
    plain = train(config_of(sets, tmp_path / "plain", **options), progress=False)["loss"]
    torch._dynamo.reset()
    compiled = config_of(sets, tmp_path / "compiled", compile=True, **options)
    with pytest.raises(Stopped):
        train(compiled, progress=False, opened=stop)
    assert train(compiled, progress=False)["loss"] == pytest.approx(plain, rel=within)


@pytest.mark.parametrize("options", COMPILED, ids=["-".join(options) for options in COMPILED])
def test_compiling_goes_with_the_others(sets, tmp_path, monkeypatch, options):
    """Traced and differentiated as by Inductor, without its code generation, which takes long."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    compiles(sets, tmp_path, options)


@pytest.mark.soak
@pytest.mark.parametrize("options", COMPILED, ids=["-".join(options) for options in COMPILED])
def test_inductor_goes_with_the_others(sets, tmp_path, options):
    compiles(sets, tmp_path, options)


# ---- on two ranks

ON_RANKS = [
    {"parallel": "fsdp", "checkpointing": "block", "ema": 0.7, "model": "clip"},
    {"parallel": "fsdp", "fp8": True},
    {"parallel": "fsdp", "lock": "tower", "unlocked_blocks": 1, "ema": 0.7, "layer_decay": 0.6},
    {"parallel": "fsdp", "lock": "tower", "loss": "cosine"},
    {"parallel": "fsdp", "micro_batch": 2, "patch_dropout": 0.5, "patch_dropout_steps": 2},
    {"parallel": "fsdp", "compile": True, "patch_dropout": 0.5},
    {"parallel": "fsdp", "model": "clip", "eval_every": 2, "ema": 0.7, "precision": "bf16"},
    {"lock": "tower", "checkpointing": "mlp", "ema": 0.7},
    {"lock": "tower", "unlocked_blocks": 1, "fp8": True, "micro_batch": 2},
    {"compile": True, "micro_batch": 2, "model": "clip"},
    {"compile": True, "patch_dropout": 0.5, "patch_dropout_steps": 2},
]  # fmt: skip
REFUSED_ON_RANKS = [
    ({"parallel": "fsdp", "fp8": True, "compile": True}, "--fp8 with --parallel fsdp is not compiled"),
    ({"batch_size": 7}, "batch_size 7 is not a multiple of the 2 ranks"),
]


def on_a_rank(rank: Rank, root: Path, out: Path) -> list[dict[str, Any] | str]:
    """Trains with each of ON_RANKS, stopping and going on, and tries what is refused; for each its run.json, or the
    error."""
    torch.compile = partial(torch.compile, backend="aot_eager")  # type: ignore[assignment]
    found: list[dict[str, Any] | str] = []
    for number, options in enumerate([*ON_RANKS, *(options for options, _ in REFUSED_ON_RANKS)]):
        config = config_of(root, out / str(number), timeout=60.0, **options)
        try:
            try:
                train(config, progress=False, opened=stop)
            except Stopped:
                pass
            found.append(train(config, progress=False))
        except LiftFastError as error:
            found.append(f"{type(error).__name__}: {error}")
    return found


def test_ranks_train_with_the_options_of_one_process(sets, tmp_path):
    first, second = on_ranks(2, in_group, on_a_rank, sets, tmp_path)
    assert not isinstance(first, BaseException) and not isinstance(second, BaseException)
    for number, options in enumerate(ON_RANKS):
        assert isinstance(first[number], dict), (options, first[number])
        alone = train(config_of(sets, tmp_path / f"alone-{number}", **options | {"compile": False}), progress=False)
        within = 0.05 if {"fp8", "precision"} & options.keys() else 1e-4
        assert first[number]["loss"] == second[number]["loss"] == pytest.approx(alone["loss"], rel=within), options
    for (options, why), one, other in zip(
        REFUSED_ON_RANKS, first[len(ON_RANKS) :], second[len(ON_RANKS) :], strict=True
    ):
        assert isinstance(one, str) and one.startswith("ConfigError: ") and why in one, options
        assert one == other
