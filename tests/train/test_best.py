"""train/best.py: the weights with the best score, kept while a run trains, whatever stops, kills or fills a disk."""

import errno
import json
import math
import os
import random
import signal
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.evaluated import evaluated
from support.faults import Act, Base, run
from support.ranks import SMALL, in_group, on_ranks
from support.tiny_sets import make_set, png

import lift_fast
from lift_fast import run_folder
from lift_fast.cli.main import main, parse
from lift_fast.data.shards import ShardWriter
from lift_fast.errors import ConfigError, DataError, Stopped, TrainingError
from lift_fast.nn import PRESETS
from lift_fast.ranks import Rank
from lift_fast.sugarcrepe import TASKS
from lift_fast.train import best, held_out, setup
from lift_fast.train.best import Best, Criterion
from lift_fast.train.config import TrainConfig
from lift_fast.train.loop import train

STEPS, EVERY = 11, 2
EVALUATED = [1, 3, 5, 7, 9, 10]  # as metrics.jsonl counts


@pytest.fixture(autouse=True)
def small_preset(monkeypatch):
    monkeypatch.setitem(PRESETS, "small", SMALL)


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> Path:
    """A data set to train on, one to evaluate on with captions alone, and one with foils and classes, too."""
    root = tmp_path_factory.mktemp("best")
    make_set(root / "train", 31, per_shard=9, seed=1, broken={3})
    make_set(root / "plain", 23, seed=2, broken={5})
    rng = random.Random(3)
    with ShardWriter(root / "asked", 9) as writer:
        for i in range(17):
            foils = {task: {"caption": f"a {task} {i}", "foil": f"no {task} {i % 5}"} for task in TASKS}
            meta = {"composition": foils, "label": ["cat", "dog", "horse"][i % 3]}
            writer.write(f"asked-{i}", png(rng), f"caption {i // 2}", meta)
    return root


def config_of(root: Path, out: Path, **changes) -> TrainConfig:
    settings = {
        "preset": "small",
        "steps": STEPS,
        "batch_size": 6,
        "warmup": 2,
        "precision": "fp32",
        "max_skipped": 0.5,
    }
    settings |= {"context": 12, "save_minutes": None, "lr": 3e-3, "eval_every": EVERY}
    settings["eval_data"] = {name: root / name for name in ("plain", "asked")}
    return TrainConfig("clip", (root / "train",), out, **settings | changes)


def quiet(config: TrainConfig, **options) -> dict:
    return train(config, progress=False, **options)


def evaluations(out: Path) -> dict[int, dict]:
    """The evaluations in metrics.jsonl, by the number of steps that were done."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {line["step"] + 1: line["evaluation"] for line in lines if "evaluation" in line}


def first_best(scores: dict[int, float]) -> int:
    """The step of the best score; of equal ones the first."""
    return min(scores, key=lambda step: (-scores[step], step))


def weights_of(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


# ---- the score


SCORES = {"a": ["t2i_r1", "i2t_r1"], "b": ["t2i_r1", "i2t_r1", "composition"], "c": ["zero_shot_top1"]}
FOUND = {
    "a": {"n": 9, "left_out": 0, "t2i_r1": 0.5, "i2t_r1": 0.25},
    "b": {"n": 7, "left_out": 1, "t2i_r1": 1.0, "i2t_r1": 0.75, "composition": 0.125},
    "c": {"n": 5, "left_out": 0, "zero_shot_top1": 0.375},
}


@pytest.mark.parametrize(("keep_best", "of", "value"), [
    ("auto", "mean of a/r1, b/r1", 0.625),
    ("r1", "mean of a/r1, b/r1", 0.625),
    ("a/r1", "a/r1", 0.375),
    ("t2i_r1", "mean of a/t2i_r1, b/t2i_r1", 0.75),
    ("b/i2t_r1", "b/i2t_r1", 0.75),
    ("composition", "b/composition", 0.125),
    ("zero_shot_top1", "c/zero_shot_top1", 0.375),
])  # fmt: skip
def test_the_score(keep_best, of, value):
    by = Criterion.named(keep_best, SCORES)
    assert (by.of, by.value(FOUND)) == (of, value)


def test_the_score_where_there_are_few():
    assert Criterion.named("none", SCORES) is None and Criterion.named("auto", {"x": []}) is None
    classes = {"c": ["zero_shot_top1"], "d": ["composition", "zero_shot_top1"]}
    assert Criterion.named("auto", classes).of == "mean of c/zero_shot_top1, d/zero_shot_top1"
    assert Criterion.named("auto", {"d": ["composition"]}).of == "d/composition"
    with pytest.raises(
        ConfigError, match="--keep-best a/composition: the sets of --eval-data have no such score, but a/t2i"
    ):
        Criterion.named("a/composition", SCORES)
    with pytest.raises(ConfigError, match="--keep-best r1: the sets .* have no such score, but c/zero_shot_top1$"):
        Criterion.named("r1", {"c": ["zero_shot_top1"]})
    # A score that an evaluation lacks is no number, whatever the others are.
    assert math.isnan(Criterion.named("r1", SCORES).value(FOUND | {"b": {"n": 0}}))


def test_better_is_strictly_better(tmp_path):
    by = Criterion("a/r1", (), "asked")
    kept = Best(tmp_path, by, print)
    assert kept.is_beaten(0.0) and not kept.is_beaten(math.nan) and kept.kept is None
    model, description = run_folder_of()
    kept.replace(model, description | {"step": 4}, None, 0.5)
    assert kept.kept == {"step": 4, "score": 0.5, "of": "a/r1"}
    warnings = []
    for each in (kept, Best(tmp_path, by, warnings.append)):
        assert each.kept == kept.kept
        assert each.is_beaten(0.5 + 1e-12)
        assert not any(each.is_beaten(score) for score in (0.5, 0.4, math.nan, math.inf, -math.inf))
    assert warnings == []
    for other in (by._replace(of="b/r1"), by._replace(asked="others")):  # their scores are not compared
        each = Best(tmp_path, other, warnings.append)
        assert each.is_beaten(0.1) and not each.is_beaten(math.nan) and each.kept == kept.kept
        assert "has the best weights by a/r1, or of other sets" in warnings.pop() and not warnings
    assert not Best(tmp_path, None, warnings.append).is_beaten(0.9) and not warnings


@pytest.mark.parametrize(("changes", "why"), [
    ({"keep_best": "recall"}, "--keep-best is auto, none, SCORE or SET/SCORE, where SCORE is r1, t2i_r1"),
    ({"keep_best": "plain/auto"}, "--keep-best is auto, none, SCORE or SET/SCORE"),
    ({"keep_best": "plain/"}, "--keep-best is auto, none, SCORE or SET/SCORE"),
    ({"keep_best": "other/r1"}, "--keep-best other/r1: no set of --eval-data is called 'other'"),
    ({"keep_best": "r1", "eval_data": {}, "eval_every": None}, "add --eval-data and --eval-every"),
    ({"keep_best": "plain/composition"}, "--keep-best plain/composition: the sets of --eval-data have no such"),
    ({"eval_pictures": (Path("one"),)}, "one --eval-pictures for each --eval-data, or none: got 1 for 2"),
    ({"eval_data": (Path("plain"),)}, "eval_data names the held-out sets: {name: path}"),
])  # fmt: skip
def test_what_cannot_be_is_refused_before_anything_is_written(sets, tmp_path, changes, why):
    with pytest.raises(ConfigError) as error:
        quiet(config_of(sets, tmp_path / "run", **changes))
    assert why in str(error.value) and not (tmp_path / "run").exists()


# ---- a replacement

BY = Criterion("a/r1", ())


def run_folder_of(seed: int = 0):
    """A model with random weights, and what run.json says of it."""
    torch.manual_seed(seed)
    description = {"model": "clip", "preset": "small", "context": 12, "field": "txt"}
    return run_folder.build(description), description


class Counted:
    """Counts the calls of what changes files. `act` is called before the call number `moment`, or after it."""

    def __init__(self, patch: pytest.MonkeyPatch, moment: int, after: bool, act):
        self.calls, self.moment, self.after, self.act = 0, moment, after, act
        for owner, name in ((os, "replace"), (os, "fsync"), (os, "mkdir"), (os, "unlink"), (os, "rmdir")):
            patch.setattr(owner, name, self.counting(getattr(owner, name)))
        patch.setattr("builtins.open", self.counting(open))

    def counting(self, original):
        def call(*args, **options):
            self.calls += 1
            now = self.calls == self.moment
            if now and not self.after:
                self.act()
            try:
                return original(*args, **options)
            finally:
                if now and self.after:
                    self.act()

        return call


def replaced_in_a_fork(out: Path, moment: int, after: bool) -> int:
    """Replaces the best weights in a process that is killed at a call; the number of calls where there is none."""
    model, description = run_folder_of(seed=2)
    torch.set_num_threads(1)
    pid = os.fork()
    if pid:
        _, status = os.waitpid(pid, 0)
        return status
    try:
        counted = Counted(pytest.MonkeyPatch(), moment, after, lambda: os.kill(os.getpid(), signal.SIGKILL))
        Best(out, BY, print).replace(model, description | {"step": 2}, None, 0.75)
        os._exit(counted.calls)
    finally:
        os._exit(255)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("before", [True, False])
def test_a_replacement_that_is_killed_leaves_the_old_or_the_new_weights(tmp_path, before):
    """At each call that changes a file, before and after it: `load` finds one of the two whole at once, and the next
    start puts the folder in order."""
    model, description = run_folder_of(seed=1)

    def start(name: str) -> Path:
        out = tmp_path / name
        if before:
            Best(out, BY, print).replace(model, description | {"step": 1}, None, 0.5)
        return out

    calls = os.waitstatus_to_exitcode(replaced_in_a_fork(start("whole"), 0, False))
    assert 8 < calls < 40
    want = {step: state_of(run_folder_of(seed=step)[0]) for step in (1, 2)}
    seen = []
    for moment in range(1, calls + 1):
        for after in (False, True):
            out = start(f"{moment}-{after}")
            assert os.waitstatus_to_exitcode(replaced_in_a_fork(out, moment, after)) == -signal.SIGKILL
            place = out / "weights" / "best"
            if not before and not place.exists():
                with pytest.raises(DataError, match="no model at"):
                    lift_fast.load(place)
                steps = [None]
            else:
                found = lift_fast.load(place, device="cpu")
                steps = [found.description["step"]]
                assert same(state_of(found.module), want[steps[0]])
            warnings = []
            kept = Best(out, BY, warnings.append)
            steps.append(kept.kept and kept.kept["step"])
            assert steps[0] == steps[1] and warnings == []
            entries = sorted(path.name for path in (out / "weights").iterdir()) if (out / "weights").exists() else []
            assert entries == ["best"] * (steps[1] is not None)
            if steps[1]:
                assert same(load_file(place / "model.safetensors"), want[steps[1]])
            seen.append(steps[1])
    assert set(seen) == {1 if before else None, 2} and seen == sorted(seen, key=lambda step: step or 0)


def state_of(model) -> dict:
    return dict(model.state_dict())


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("before", [True, False])
def test_a_disk_that_fails_leaves_the_old_weights(tmp_path, monkeypatch, before):
    """At each call; the next replacement succeeds."""
    (old, description), (new, _) = (run_folder_of(seed) for seed in (1, 2))
    failed = 0
    for moment in range(1, 40):
        out, warnings = tmp_path / str(moment), []
        kept = Best(out, BY, warnings.append)
        if before:
            kept.replace(old, description | {"step": 1}, None, 0.5)

        def full() -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            counted = Counted(patch, moment, False, full)
            kept.replace(new, description | {"step": 2}, None, 0.75)
        place = out / "weights" / "best"
        if counted.calls < moment:
            assert warnings == []
            break
        if warnings:
            [warning] = warnings
            assert "cannot keep the weights of step 2, the best so far" in warning and "No space left" in warning
            assert ("those of step 1 stay" if before else "the run goes on without them") in warning
            assert (kept.kept and kept.kept["step"]) == (1 if before else None)
            assert [*(out / "weights").glob("*")] == [place] * before or counted.calls == moment
            if before:
                assert same(load_file(place / "model.safetensors"), state_of(old))
            failed += 1
            kept.replace(new, description | {"step": 2}, None, 0.75)
        assert kept.kept == Best(out, BY, warnings.append).kept == {"step": 2, "score": 0.75, "of": "a/r1"}
        assert same(load_file(place / "model.safetensors"), state_of(new))
        assert [path.name for path in (out / "weights").iterdir()] == ["best"]
    assert failed > 5


@pytest.mark.parametrize("damage", ["{", "{}", '{"step": "1", "score": 0.5, "of": "a", "asked": ""}', None])
def test_a_folder_that_cannot_be_read_is_replaced(tmp_path, damage):
    model, description = run_folder_of()
    place, warnings = tmp_path / "weights" / "best", []
    if damage is None:
        place.parent.mkdir()
        place.write_text("no folder")
    else:
        Best(tmp_path, BY, print).replace(model, description | {"step": 1}, None, 0.9)
        (place / "run.json").write_text(damage)
    kept = Best(tmp_path, BY, warnings.append)
    [warning] = warnings
    assert "cannot read which weights" in warning and kept.kept is None and kept.is_beaten(0.1)
    kept.replace(model, description | {"step": 3}, None, 0.1)
    assert Best(tmp_path, BY, warnings.append).kept["step"] == 3 and len(warnings) == 1


# ---- runs


@pytest.mark.parametrize(
    ("changes", "of"),
    [
        ({}, "mean of plain/r1, asked/r1"),
        ({"ema": 0.6, "keep_best": "plain/t2i_r1"}, "plain/t2i_r1"),
        ({"keep_best": "zero_shot_top1"}, "asked/zero_shot_top1"),
        ({"keep_best": "composition", "ema": 0.3}, "asked/composition"),
    ],
)
def test_the_score_is_that_of_eval(sets, tmp_path, changes, of):
    """Exactly; of equal scores the first, and of no weights but those."""
    config = config_of(sets, tmp_path / "run", save_every=1, save_weights=True, keep_last=1, **changes)
    about = quiet(config)
    found = evaluations(config.out)
    assert [step - 1 for step in found] == EVALUATED
    by = Criterion.named(config.keep_best, {name: [*scores] for name, scores in found[2].items()})
    values = {step: by.value(scores) for step, scores in found.items()}
    step = first_best(values)
    assert about["best"] == {"step": step, "score": values[step], "of": of}
    assert json.loads((config.out / "run.json").read_text())["best"] == about["best"]
    place = config.out / "weights" / "best"
    same_step = config.out if step == STEPS else config.out / "weights" / f"step-{step:08d}"
    assert weights_of(place) == weights_of(same_step)
    description = json.loads((place / "run.json").read_text())
    assert {name: description[name] for name in ("step", "score", "of")} == about["best"]

    result = evaluated(place, config.eval_data)
    r1 = [[result["retrieval"][name][way]["r1"] for way in ("t2i", "i2t")] for name in ("plain", "asked")]
    assert (
        about["best"]["score"]
        == {
            "mean of plain/r1, asked/r1": math.fsum(r1[0] + r1[1]) / 4,
            "plain/t2i_r1": r1[0][0],
            "asked/zero_shot_top1": result["zero_shot"]["asked"]["top1"],
            "asked/composition": result["composition"]["asked"]["mean"],
        }[of]
    )


def test_the_last_weights_are_evaluated(sets, tmp_path):
    """Also where the number of steps is no multiple, or the first evaluation would come after them."""
    config = config_of(sets, tmp_path / "run", steps=5, eval_every=100)
    about = quiet(config)
    [(step, scores)] = evaluations(config.out).items()
    assert step == 5 == about["best"]["step"] and weights_of(config.out) == weights_of(config.out / "weights/best")
    result = evaluated(config.out, config.eval_data)
    for name in config.eval_data:
        assert scores[name]["t2i_r1"] == result["retrieval"][name]["t2i"]["r1"]
        assert scores[name]["i2t_r1"] == result["retrieval"][name]["i2t"]["r1"]
    for each in (config_of(sets, tmp_path / "b", steps=4), config_of(sets, tmp_path / "c", steps=1, eval_every=1)):
        quiet(each)
        assert [*evaluations(each.out)] == ([2, 4] if each.steps == 4 else [1])


def test_the_best_is_a_run_that_commands_take(sets, tmp_path, capfd, monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", SMALL)
    out, held = tmp_path / "run", sets / "plain"
    command = f"train --model clip --data {sets / 'train'} --out {out} --steps 5 --batch-size 6 --warmup 1 --context 12"
    command += f" --precision fp32 --max-skipped 0.5 --eval-data {held} --eval-every 2 --keep-best plain/i2t_r1"
    main(command.split())
    about = json.loads((out / "run.json").read_text())["best"]
    assert about["of"] == "plain/i2t_r1"
    line = f"best: step {about['step']}, plain/i2t_r1 {about['score']:.1%}, in {out}/weights/best\n"
    assert line in capfd.readouterr().out
    main(command.split())
    assert line in capfd.readouterr().out  # of a complete run, too
    main(["eval", "--run", f"{out}/weights/best", "--data", "held", str(held), "--json", str(tmp_path / "eval.json")])
    assert json.loads((tmp_path / "eval.json").read_text())["retrieval"]["held"]["i2t"]["r1"] == about["score"]
    main(["export", f"{out}/weights/best", "--to", "safetensors", "--out", str(tmp_path / "exported")])
    exported = lift_fast.load(tmp_path / "exported", device="cpu")
    assert same(state_of(exported.module), load_file(out / "weights/best/model.safetensors"))


def test_sets_are_named_as_eval_names_them():
    parsed = parse(
        "train --model clip --data a --out o --eval-every 5 --eval-data coco some/where/captions.json own b/val "
        "--eval-pictures images b/val --eval-field short long --eval-templates t.txt --eval-classnames imagenet".split()
    ).config
    assert parsed.eval_data == {"coco": Path("some/where/captions.json"), "own": Path("b/val")}
    assert parsed.eval_pictures == (Path("images"), Path("b/val")) and parsed.eval_field == ("short", "long")
    assert (parsed.eval_templates, parsed.eval_classnames) == (Path("t.txt"), Path("imagenet"))
    alone = parse("train --model clip --data a --out o --eval-every 5 --eval-data x/one y/two".split()).config
    assert alone.eval_data == {"one": Path("x/one"), "two": Path("y/two")}
    assert json.loads(json.dumps(asdict(parsed), default=str))["eval_data"]["own"] == "b/val"


def scripted(monkeypatch, values: dict[int, float]) -> None:
    """Evaluations with these scores, by the number of steps that were done, in place of the models' own."""
    scores = held_out.HeldOut.scores
    steps = {}
    take = best.Criterion.value

    def value(self, found):
        assert take(self, found) == pytest.approx(found["plain"]["t2i_r1"])
        return values[steps["now"]]

    def scored(self, model, towers=None):
        return scores(self, model, towers)

    evaluate = lift_fast.train.loop.Run._evaluate

    def evaluating(self, step):
        steps["now"] = step
        return evaluate(self, step)

    monkeypatch.setattr(best.Criterion, "value", value)
    monkeypatch.setattr(held_out.HeldOut, "scores", scored)
    monkeypatch.setattr(lift_fast.train.loop.Run, "_evaluate", evaluating)


CURVE = {2: 0.25, 4: 0.5, 6: 0.5, 8: math.nan, 10: 0.375, 11: 0.5}


def stopping(step: int):
    def opened(training: setup.Training) -> None:
        kept = training.kept

        def interrupted(now: int):
            if now == step:
                signal.raise_signal(signal.SIGTERM)
            return kept(now)

        training.kept = interrupted

    return opened


@pytest.mark.parametrize("stop", [0, 2, 3, 5, 6, 9])
def test_the_best_so_far_is_remembered(sets, tmp_path, monkeypatch, stop):
    """Whether a stop comes before the best, with it, or after it."""
    scripted(monkeypatch, CURVE)
    settings = {"keep_best": "plain/t2i_r1", "ema": 0.7}
    whole = config_of(sets, tmp_path / "whole", save_weights=True, save_every=1, keep_last=1, **settings)
    about = quiet(whole)
    assert about["best"] == {"step": 4, "score": 0.5, "of": "plain/t2i_r1"}
    place = whole.out / "weights" / "best"
    assert weights_of(place) == weights_of(whole.out / "weights" / "step-00000004")

    config = replace(whole, out=tmp_path / "stopped", save_weights=False, save_every=None)
    with pytest.raises(Stopped):
        quiet(config, opened=stopping(stop))
    assert quiet(config)["best"] == about["best"]
    assert weights_of(config.out / "weights" / "best") == weights_of(place)
    assert evaluations(config.out) == evaluations(whole.out)


def test_other_scores_are_another_competition(sets, tmp_path, monkeypatch):
    """A command that goes on with another score keeps the weights that it finds best by it; with none, it leaves those
    that are there."""
    scripted(monkeypatch, CURVE)
    config = config_of(sets, tmp_path / "run", keep_best="plain/t2i_r1")
    with pytest.raises(Stopped):
        quiet(config, opened=stopping(6))
    copy = tmp_path / "copy"
    os.system(f"cp -r {config.out} {copy}")
    assert quiet(replace(config, out=copy, keep_best="none"))["best"] == {"step": 4, "score": 0.5, "of": "plain/t2i_r1"}
    warnings = []
    monkeypatch.setattr(best.Criterion, "value", lambda self, found: CURVE[11] / 2)
    about = quiet(replace(config, keep_best="plain/i2t_r1"), warn=warnings.append)
    assert about["best"] == {"step": 8, "score": 0.25, "of": "plain/i2t_r1"}
    assert any("has the best weights by plain/t2i_r1" in warning for warning in warnings)


def test_none_is_kept_where_none_is_asked_for(sets, tmp_path):
    about = quiet(config_of(sets, tmp_path / "run", keep_best="none"))
    assert "best" not in about and not (tmp_path / "run" / "weights").exists()
    assert len(evaluations(tmp_path / "run")) == len(EVALUATED)


def test_training_is_the_same_with_and_without(sets, tmp_path):
    with_best, without = (quiet(config_of(sets, tmp_path / name, keep_best=name, ema=0.5)) for name in ("auto", "none"))
    assert with_best["loss"] == without["loss"]
    assert weights_of(tmp_path / "auto") == weights_of(tmp_path / "none")
    assert evaluations(tmp_path / "auto") == evaluations(tmp_path / "none")


def test_a_full_disk_does_not_end_the_run(sets, tmp_path, monkeypatch):
    """The second best cannot be written: the first one stays, and the third is written."""
    scripted(monkeypatch, {2: 0.1, 4: 0.2, 6: 0.15, 8: 0.3, 10: 0.3, 11: 0.0})
    save, calls, warnings = run_folder.save, [], []

    def failing(folder, *args):
        if folder.name.startswith(".best"):
            calls.append(folder)
            if len(calls) == 2:
                (folder / "model.safetensors").write_bytes(b"half")
                raise TrainingError(f"cannot write the run to {folder}: [Errno 28] No space left on device")
        save(folder, *args)

    monkeypatch.setattr(run_folder, "save", failing)
    config = config_of(sets, tmp_path / "run", keep_best="plain/t2i_r1", save_weights=True, save_every=2, keep_last=1)
    about = quiet(config, warn=warnings.append)
    # 0.15 is better than the 0.1 that is there.
    assert about["best"] == {"step": 8, "score": 0.3, "of": "plain/t2i_r1"} and len(calls) == 4
    [warning] = warnings
    assert "cannot keep the weights of step 4, the best so far" in warning and "those of step 2 stay" in warning
    assert weights_of(config.out / "weights" / "best") == weights_of(config.out / "weights" / "step-00000008")
    assert not [path for path in (config.out / "weights").iterdir() if path.name.startswith(".")]


NEW = {"eval_pictures", "eval_field", "eval_templates", "eval_classnames", "keep_best"}


def test_a_run_of_an_earlier_version_goes_on(sets, tmp_path, monkeypatch):
    """Its started.json lacks the settings that came later, it has paths in place of names, and it kept no best."""
    whole = config_of(sets, tmp_path / "whole", ema=0.5)
    quiet(whole)
    config = replace(whole, out=tmp_path / "earlier")

    def earlier(config: TrainConfig) -> dict:
        found = {name: value for name, value in asdict(config).items() if name not in NEW}
        return found | {"eval_data": [*found["eval_data"].values()]}

    with monkeypatch.context() as patch:
        patch.setattr(setup, "asdict", earlier)
        with pytest.raises(Stopped):
            quiet(replace(config, keep_best="none"), opened=stopping(4))
    started = json.loads((config.out / "started.json").read_text())
    assert not NEW & started["about"]["config"].keys() and len(started["about"]["config"]["eval_data"]) == 2
    about = quiet(config)
    assert weights_of(config.out) == weights_of(whole.out) and evaluations(config.out) == evaluations(whole.out)
    by = Criterion.named("auto", {name: [*scores] for name, scores in evaluations(config.out)[2].items()})
    later = {step: by.value(scores) for step, scores in evaluations(config.out).items() if step > 5}
    assert about["best"]["step"] == first_best(later) and about["best"]["score"] == max(later.values())


# ---- ranks


def on_a_rank(rank: Rank, config: TrainConfig, curve: list[float] | None):
    """Trains. With a curve the evaluations have these scores, and rank 0 cannot write the first best weights."""
    save, warnings = run_folder.save, []

    def failing(folder, *args):
        if curve and folder.name.startswith(".best") and not warnings:
            raise TrainingError("no space")
        save(folder, *args)

    run_folder.save = failing
    if curve:
        scores = iter(curve)
        Criterion.value = lambda self, found: next(scores)
    about = quiet(config, warn=warnings.append)
    return about["best"], evaluations(config.out), warnings


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_ranks_keep_the_same_weights(sets, tmp_path, how):
    """The score is that which one process finds."""
    config = config_of(sets, tmp_path / "run", parallel=how, ema=0.6, timeout=60.0)
    results = on_ranks(2, in_group, on_a_rank, config, None)
    for result in results:
        assert not isinstance(result, BaseException), result
    (about, found, warnings), other = results
    assert (about, found, warnings) == other and warnings == []
    by = Criterion.named("auto", {name: [*scores] for name, scores in found[2].items()})
    values = {step: by.value(scores) for step, scores in found.items()}
    assert about["step"] == first_best(values) and about["score"] == values[about["step"]]
    result = evaluated(config.out / "weights" / "best", config.eval_data)
    r1 = [result["retrieval"][name][way]["r1"] for name in ("plain", "asked") for way in ("t2i", "i2t")]
    assert about["score"] == math.fsum(r1) / 4


def test_ranks_agree_on_what_could_be_written(sets, tmp_path):
    """Weights that rank 0 could not write are the best on no rank: lower scores after them are kept, by all ranks
    together, which FSDP2 needs to gather them."""
    config = config_of(sets, tmp_path / "run", parallel="fsdp", timeout=20.0)
    results = on_ranks(2, in_group, on_a_rank, config, [0.5, 0.25, 0.375, math.nan, 0.375, 0.125])
    for result in results:
        assert not isinstance(result, BaseException), result
        assert result[0] == {"step": 6, "score": 0.375, "of": "mean of plain/r1, asked/r1"}
    [warning], nothing = (result[2] for result in results)
    assert "cannot keep the weights of step 2" in warning and nothing == []
    assert json.loads((config.out / "weights" / "best" / "run.json").read_text())["step"] == 6


@pytest.mark.parametrize("action", ["kill", pytest.param("raise RuntimeError", marks=pytest.mark.campaign)])
def test_a_run_that_is_killed_with_its_best_weights_goes_on(tmp_path, action):
    base = Base(tmp_path)
    changes = {"parallel": "fsdp", "ema": 0.7}
    for name, fault in (("whole", None), ("struck", Act("best", 1, action, rank=0))):
        config = replace(base.config("clip eval", tmp_path / name), **changes, timeout=10.0)
        ended = run(config, 2, fault)
        if fault is not None:
            assert all(rank.error is not None for rank in ended)
            ended = run(config, 2)
        assert all(rank.error is None for rank in ended), [(rank.error, rank.trace) for rank in ended]
    whole, struck = (json.loads((tmp_path / name / "run.json").read_text()) for name in ("whole", "struck"))
    assert whole["best"] == struck["best"] and whole["best"]["of"] == "held out/r1"
    for place in (".", "weights/best"):
        assert weights_of(tmp_path / "whole" / place) == weights_of(tmp_path / "struck" / place)
    PRESETS.pop("small", None)
