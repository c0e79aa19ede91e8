"""A run that is stopped and goes on equals the uninterrupted one, bit for bit; what may change meanwhile, what not."""

import json
import random
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.ranks import SMALL
from support.tiny_sets import make_set, png
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lift_fast import run_folder
from lift_fast.cache import CacheWriter, Rotation, encode
from lift_fast.cli.main import main
from lift_fast.data import dali
from lift_fast.data.options import DataOptions
from lift_fast.data.shards import Shards, ShardWriter
from lift_fast.errors import ConfigError, Stopped
from lift_fast.nn import PRESETS
from lift_fast.train import setup
from lift_fast.train.config import TrainConfig
from lift_fast.train.identity import FREE, MATHEMATICS
from lift_fast.train.loop import train

TIMES = {"seconds", "step_ms", "step_ms_spread", "images_per_s", "machine", "versions", "config"}


@pytest.fixture(autouse=True)
def small_preset(monkeypatch):
    monkeypatch.setitem(PRESETS, "small", SMALL)


def make_cache(folder: Path, data: Shards, codec: str = "int8", seed: int = 0) -> Path:
    """A cache of random vectors for the captions of a data set."""
    rotation = Rotation(24, seed) if codec.endswith("r") else None
    source = [{"name": path.name, "samples": size} for path, size in zip(data.paths, data.shard_sizes, strict=True)]
    writer = CacheWriter(folder, 24, codec, {"name": "test"}, source, "txt", rotation)
    generator = torch.Generator().manual_seed(seed)
    for shard, size in enumerate(data.shard_sizes):
        rows = encode(torch.randn(size, 24, generator=generator), codec, rotation)
        writer.write_shard(shard, rows, data.shard_hashes(shard).tolist())
    writer.finish()
    return folder


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> Path:
    """Two data sets of 13 and 10 samples, in which two images are bad, with their caches; one to evaluate on, and the
    first one anew with a caption that is missing; an image tower to start from."""
    root = tmp_path_factory.mktemp("sets")
    make_cache(root / "cache-a", make_set(root / "a", 13, per_shard=5, seed=1, broken={3}), seed=1)
    make_cache(root / "cache-b", make_set(root / "b", 10, seed=2, broken={7}), seed=2)
    make_set(root / "held", 9, seed=3, broken={5})
    with ShardWriter(root / "gaps", 5) as writer:
        for i in range(13):
            writer.write(f"g{i}", png(random.Random(i)), "" if i == 6 else f"caption {i}", {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "small", SMALL)
        quiet(config_of("clip", root, root / "weights", steps=2))
    return root


def config_of(model: str, sets: Path, out: Path, **changes) -> TrainConfig:
    settings = {"preset": "small", "steps": 11, "batch_size": 6, "warmup": 2, "precision": "fp32", "max_skipped": 0.5}
    data = (sets / "a", sets / "b")
    cache = (sets / "cache-a", sets / "cache-b") if model == "lift" else ()
    return TrainConfig(model, **{"data": data, "out": out, "cache": cache, "context": 12} | settings | changes)


def quiet(config: TrainConfig, **options) -> dict:
    return train(config, progress=False, **options)


def stopping(*steps: int, signalled: int = signal.SIGTERM):
    """For `opened`: in these steps, counted from 0, the process gets a signal."""

    def opened(training: setup.Training) -> None:
        kept = training.kept

        def interrupted(step: int):
            if step in steps:
                signal.raise_signal(signalled)
            return kept(step)

        training.kept = interrupted

    return opened


def stopped(config: TrainConfig, *steps: int) -> dict:
    """The run of this config with a stop in each of these steps, and the same command again after it."""
    for number, step in enumerate(steps):
        with pytest.raises(Stopped, match=f"stopped by SIGTERM after step {step + 1} of {config.steps}; the same"):
            quiet(config, opened=stopping(step))
        assert not (config.out / "run.json").exists()
        for events in config.out.glob("events.*"):  # TensorBoard sorts the files of a process and second wrongly
            events.rename(events.with_name(f"{number}.{events.name}"))
    return quiet(config)


def steps_of(out: Path) -> list[dict]:
    """The lines of metrics.jsonl without their times."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.endswith("_ms")} for line in lines]


def scalars_of(out: Path) -> dict[str, list[tuple[int, float]]]:
    """TensorBoard's view of the events, without the times."""
    events = EventAccumulator(str(out)).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag != "step_ms"]
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}


def lines_of(file: Path) -> list[str]:
    return sorted(file.read_text().splitlines()) if file.exists() else []


def assert_same(out: Path, other: Path, steps: int) -> None:
    """Two folders of runs are equal but for times and checkpoints."""
    assert [line["step"] for line in steps_of(out)] == list(range(steps))
    assert steps_of(out) == steps_of(other)
    assert scalars_of(out) == scalars_of(other)
    weights, others = load_file(out / "model.safetensors"), load_file(other / "model.safetensors")
    assert weights.keys() == others.keys()
    assert [name for name in weights if not torch.equal(weights[name], others[name])] == []
    runs = [json.loads((folder / "run.json").read_text()) for folder in (out, other)]
    for run in runs:
        run["skipped"].sort(key=str)
    assert [{k: v for k, v in run.items() if k not in TIMES} for run in runs][0] == {
        k: v for k, v in runs[1].items() if k not in TIMES
    }
    for name in ("skipped.jsonl", "spikes.jsonl"):
        assert lines_of(out / name) == lines_of(other / name)


CASES = {
    "plain": (("lift", {}), (4,)),
    "clip": (("clip", {}), (4,)),
    "twice": (("lift", {"ema": 0.9}), (2, 8)),
    "at every step": (("lift", {"steps": 6}), (0, 1, 2, 3, 4)),
    "ema": (("clip", {"ema": 0.8, "clip_grad": 0.1}), (5,)),
    "patch dropout": (("lift", {"patch_dropout": 0.5, "patch_dropout_steps": 6}), (3, 7)),
    "cool-down": (("lift", {"schedule": "constant", "cooldown": 4, "layer_decay": 0.7}), (5, 8)),
    "locked": (("lift", {"lock": "tower", "unlocked_blocks": 1, "layer_decay": 0.5, "ema": 0.9}), (4,)),
    "head alone": (("lift", {"lock": "tower", "loss": "cosine"}), (4,)),
    "pieces": (("clip", {"micro_batch": 4, "patch_dropout": 0.25}), (4,)),
    "cosine": (("lift", {"loss": "cosine", "micro_batch": 5, "ema": 0.5}), (4,)),
    "images": (("lift", {"flip": 0.5, "colour": 0.4, "min_crop_area": 0.3}), (4,)),
    "buffer": (("lift", {"flip": 0.5, "shuffle_buffer": 7, "steps": 13}), (2, 9)),
    "recomputed": (("lift", {"checkpointing": "block", "fp8": True}), (4,)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_stopped_run_equals_the_uninterrupted_one(sets, tmp_path, name):
    """Several epochs of 23 samples, of which two are bad and may be met before or after the stop."""
    (model, settings), stops = CASES[name]
    config = config_of(model, sets, tmp_path / "a", **settings)
    run = quiet(config)
    assert run["loader"]["state"]["epoch"] >= 1 and run["skipped_pictures"] == 2
    stopped(replace(config, out=tmp_path / "b"), *stops)
    assert_same(tmp_path / "b", tmp_path / "a", config.steps)


class Killed(BaseException):
    """Ends a run as SIGKILL does, but for what its context managers write."""


def killed(*steps: int):
    """For `opened`: in these steps, counted from 0, the run ends."""

    def opened(training: setup.Training) -> None:
        kept = training.kept

        def ending(step: int):
            if step in steps:
                raise Killed
            return kept(step)

        training.kept = ending

    return opened


@pytest.mark.parametrize("step", [1, 5, 9, 10])
def test_a_killed_run_repeats_the_steps_since_its_checkpoint(sets, tmp_path, step):
    """Also before the first one, and also what it had written of them."""
    config = config_of("lift", sets, tmp_path / "a", save_every=4, ema=0.9)
    quiet(config)
    again = replace(config, out=tmp_path / "b")
    with pytest.raises(Killed):
        quiet(again, opened=killed(step))
    assert [line["step"] for line in steps_of(again.out)] == list(range(step))
    went_on = []
    stopped_events = [events.rename(events.with_name(f"0.{events.name}")) for events in again.out.glob("events.*")]
    quiet(again, opened=lambda training: went_on.append(training.step))
    assert went_on == [step // 4 * 4] and len(stopped_events) == 1
    assert_same(again.out, config.out, config.steps)


def test_spikes_that_were_skipped(sets, tmp_path):
    """Finite ones and NaN: what is a spike after the stop depends on the losses before it."""
    config = config_of("lift", sets, tmp_path / "a", steps=46, spike=1.0001, on_spike="skip", ema=0.9, lr=1e-5)
    run = quiet(config)
    assert 5 < run["skipped_steps"] < 26
    stopped(replace(config, out=tmp_path / "b"), 30, 40)
    assert_same(tmp_path / "b", tmp_path / "a", config.steps)


def test_samples_without_a_caption(sets, tmp_path):
    """They are counted before the first step."""
    options = DataOptions(skip_bad=True)
    config = config_of("clip", sets, tmp_path / "a", data=(sets / "gaps", sets / "b"), options=options)
    assert quiet(config)["skipped_pictures"] == 2
    stopped(replace(config, out=tmp_path / "b"), 1, 6)
    assert_same(tmp_path / "b", tmp_path / "a", config.steps)


@pytest.mark.parametrize("settings", [{"lock": "tower"}, {"lock": "tower", "unlocked_blocks": 1, "ema": 0.9}, {}])
def test_weights_to_start_from_are_read_once(sets, tmp_path, settings):
    config = config_of("lift", sets, tmp_path / "a", init_from=sets / "weights", **settings)
    quiet(config)
    stopped(replace(config, out=tmp_path / "b"), 4)
    assert_same(tmp_path / "b", tmp_path / "a", config.steps)
    tower = run_folder.load(config.out)[0].visual.state_dict()
    start = run_folder.load(sets / "weights")[0].visual.state_dict()
    assert all(torch.equal(tower[name], start[name]) for name in start) == (settings == {"lock": "tower"})
    with pytest.raises(Killed):  # before its first checkpoint
        quiet(replace(config, out=tmp_path / "c"), opened=killed(2))
    quiet(replace(config, out=tmp_path / "c"))
    assert_same(tmp_path / "c", tmp_path / "a", config.steps)


def test_evaluations_are_part_of_the_record(sets, tmp_path):
    config = config_of(
        "clip", sets, tmp_path / "a", eval_data={"held": sets / "held"}, eval_every=3, ema=0.8, save_every=5
    )
    quiet(config)
    steps = steps_of(config.out)
    assert [line["step"] for line in steps if "evaluation" in line] == [2, 5, 8, 10]
    assert steps[2]["evaluation"]["held"]["n"] == 8
    stopped(replace(config, out=tmp_path / "b"), 2, 4)
    assert_same(tmp_path / "b", tmp_path / "a", config.steps)
    plain = config_of("clip", sets, tmp_path / "c", ema=0.8)
    assert quiet(plain)["loss"] == [line["loss"] for line in steps]


def test_weights_beside_checkpoints_are_a_run_while_it_goes_on(sets, tmp_path, capfd):
    config = config_of("clip", sets, tmp_path / "a", save_weights=True, save_every=4, keep_last=1, ema=0.9)
    with pytest.raises(Stopped):
        quiet(config, opened=stopping(8))
    folders = [config.out / "weights" / f"step-{step:08d}" for step in (4, 8, 9)]
    assert sorted((config.out / "weights").iterdir()) == folders
    assert [run_folder.load(folder)[1]["step"] for folder in folders] == [4, 8, 9]
    first = load_file(folders[0] / "model.safetensors")
    main(["eval", "--run", str(folders[2]), "--data", "held", str(sets / "held")])
    assert "held" in capfd.readouterr().out
    stopped(config)
    assert sorted((config.out / "weights").iterdir()) == folders
    assert all(torch.equal(tensor, first[name]) for name, tensor in load_file(folders[0] / "model.safetensors").items())


# ---- settings that may change


MAY_CHANGE = [
    {"threads": 2, "save_minutes": 1e-6, "keep_last": 1},
    {"save_every": 2, "save_minutes": None, "keep_every": 4, "save_weights": True},
    {"checked": True, "timeout": 60.0, "max_skipped": 0.9},
    {"spike": 100.0, "on_spike": "skip", "resume": True},
    {"device": "cpu", "parallel": "fsdp"},
]


def test_what_does_not_change_the_mathematics_may_change(sets, tmp_path):
    """One after the other in one run, of which data, caches and the folder itself move, too."""
    config = config_of("lift", sets, tmp_path / "a", flip=0.5, patch_dropout=0.5)
    quiet(config)
    now = replace(config, out=tmp_path / "b")
    for step, change in enumerate(MAY_CHANGE + [{"loader": "dali"}] * dali.installed() + [{"loader": "host"}]):
        with pytest.raises(Stopped):
            quiet(now, opened=stopping(step))
        for events in now.out.glob("events.*"):
            events.rename(events.with_name(f"{step}.{events.name}"))
        now = replace(now, **change)
    moved = tmp_path / "moved"
    for name in ("a", "b", "cache-a", "cache-b"):
        shutil.copytree(sets / name, moved / name)
    now = replace(now, data=(moved / "a", moved / "b"), cache=(moved / "cache-a", moved / "cache-b"))
    quiet(replace(now, out=now.out.rename(tmp_path / "c")))
    assert_same(tmp_path / "c", config.out, config.steps)


@pytest.mark.parametrize(
    "change",
    [{"micro_batch": 4, "checkpointing": "block"}, pytest.param({"compile": True}, marks=pytest.mark.soak)],
)
def test_what_changes_losses_by_rounding_may_change(sets, tmp_path, change):
    config = config_of("clip", sets, tmp_path / "a")
    whole = quiet(config)
    again = replace(config, out=tmp_path / "b")
    with pytest.raises(Stopped):
        quiet(again, opened=stopping(4))
    run = quiet(replace(again, **change))
    assert run["loss"][:5] == whole["loss"][:5]
    assert run["loss"] == pytest.approx(whole["loss"], rel=1e-4)


# ---- settings that must stay the same

MUST_STAY = {
    "steps": 12, "batch_size": 7, "seed": 1, "context": 13, "loss": "cosine", "lock": "tower", "patch_dropout": 0.25,
    "lr": 2e-3, "schedule": "constant", "warmup": 3, "layer_decay": 0.9, "weight_decay": 0.1, "beta1": 0.8,
    "beta2": 0.99, "eps": 1e-8, "clip_grad": 0.5, "ema": 0.9, "min_crop_area": 0.5, "flip": 0.5, "colour": 0.1,
    "shuffle_buffer": 100, "precision": "bf16", "fp8": True, "preset": "tiny", "field": "long",
}  # fmt: skip
FURTHER = {  # those that others have to go with
    "cooldown": ({"schedule": "constant"}, {"cooldown": 2}),
    "unlocked_blocks": ({"lock": "tower"}, {"unlocked_blocks": 1}),
    "patch_dropout_steps": ({"patch_dropout": 0.5}, {"patch_dropout_steps": 5}),
}


def refused(config: TrainConfig) -> str:
    """Why the run is refused; the folder is as it was."""
    before = {path: path.stat().st_mtime_ns for path in config.out.rglob("*") if path.name != ".lock"}
    with pytest.raises(
        ConfigError, match=f"^{config.out} holds another run .*; name another --out, or remove"
    ) as error:
        quiet(config)
    assert {path: path.stat().st_mtime_ns for path in config.out.rglob("*") if path.name != ".lock"} == before
    return str(error.value).partition("another run (")[2]


def changed(name: str, was, now) -> str:
    """A setting as the message has it."""
    words = {None: "not given", True: "on", False: "off"}
    was, now = (words[x] if x is None or isinstance(x, bool) else x for x in (was, now))
    return f"--{name.replace('_', '-')} {was}, now {now}"


def test_other_settings_are_refused(sets, tmp_path):
    """The message names the option, what it was and what it is now."""
    begun = {}
    for model in ("lift", "clip"):
        begun[model] = config_of(model, sets, tmp_path / model, field="txt")
        with pytest.raises(Stopped):
            quiet(begun[model], opened=stopping(3))
    for name, value in MUST_STAY.items():
        config = begun["clip" if name in ("context", "field") else "lift"]
        assert refused(replace(config, **{name: value})).startswith(changed(name, getattr(config, name), value))
    assert refused(replace(begun["lift"], init_from=sets / "weights")).startswith("--init-from not given, now given")
    assert refused(config_of("clip", sets, tmp_path / "lift")).startswith("--model lift, now clip")
    for name, (settings, change) in FURTHER.items():
        config = config_of("lift", sets, tmp_path / name, steps=8, **settings)
        with pytest.raises(Stopped):
            quiet(config, opened=stopping(1))
        assert changed(name, getattr(config, name), change[name]) in refused(replace(config, **change))
    # text_dim and options are those of the caches and the data, which the tests below change.
    assert {*MUST_STAY, *FURTHER, "model", "init_from", "text_dim", "options"} == MATHEMATICS
    assert not FREE & MATHEMATICS


def test_other_data_caches_and_captions_are_refused(sets, tmp_path):
    config = config_of("lift", sets, tmp_path / "lift")
    clip = config_of("clip", sets, tmp_path / "clip")
    for begun in (config, clip):
        with pytest.raises(Stopped):
            quiet(begun, opened=stopping(3))

    def with_caches(name: str, *, codecs=("int8", "int8"), seeds=(1, 2)) -> TrainConfig:
        root = tmp_path / name
        caches = [
            make_cache(root / f"cache-{part}", Shards(sets / part), codec, seed)
            for part, codec, seed in zip("ab", codecs, seeds, strict=True)
        ]
        return replace(config, cache=tuple(caches))

    assert "another cache (2 of 2): other keys or vectors" in refused(with_caches("vectors", seeds=(1, 5)))
    assert "another cache (1 of 2): codec int8, now f32" in refused(with_caches("codec", codecs=("f32", "f32")))
    assert "2 of --data, now 1" in refused(replace(config, data=config.data[:1], cache=config.cache[:1]))
    swapped = replace(config, data=config.data[::-1], cache=config.cache[::-1])
    assert "another data set (1 of 2): 3 fewer samples" in refused(swapped)
    make_set(tmp_path / "images", 10, seed=2)  # the same keys and captions, so that the cache fits
    assert "another data set (2 of 2): other images" in refused(replace(config, data=(sets / "a", tmp_path / "images")))
    with ShardWriter(tmp_path / "captions", 4) as writer:
        for i in range(10):
            writer.write(f"s2-{i:03d}", png(random.Random(i)), f"another {i}", {})
    assert "another data set (2 of 2): other captions" in refused(
        replace(clip, data=(sets / "a", tmp_path / "captions"))
    )
