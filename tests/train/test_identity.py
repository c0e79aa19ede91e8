"""train/identity.py: which settings make a run another run, and what tells data sets and caches from others."""

import json
import shutil
from dataclasses import fields, replace
from pathlib import Path

import pytest
from support.tiny_caches import ENCODER, write
from support.tiny_sets import make_set

from lift_fast.cache import Cache
from lift_fast.data.open import open_sets
from lift_fast.data.options import DataOptions
from lift_fast.data.samples import BadSample, Collection
from lift_fast.train.config import TrainConfig
from lift_fast.train.identity import FREE, MATHEMATICS, differences, fingerprints, mathematics

LIFT = TrainConfig("lift", (Path("data"),), Path("out"), cache=(Path("cache"),))
CLIP = TrainConfig("clip", (Path("data"),), Path("out"))


def of(config, **resolved):
    resolved = {"precision": "fp32", "text_dim": 24 if config.model == "lift" else None, "read": {}} | resolved
    return mathematics(config, **resolved)


def found(then, now, old=None, new=None):
    """The differences of settings that have been written and read."""
    empty = {"data": [], "caches": [], "left_out": {"samples": 0, "rows": ""}}
    sides = [
        {"mathematics": m, "fingerprints": empty if prints is None else prints}
        for m, prints in ((then, old), (now, new))
    ]
    return differences(json.loads(json.dumps(sides[0])), sides[1])


def test_every_setting_either_changes_the_mathematics_or_does_not():
    names = {field.name for field in fields(TrainConfig)}
    assert MATHEMATICS | FREE == names
    assert not MATHEMATICS & FREE


# A value other than the default for every setting, with what it needs beside it.
OTHERS = {
    "field": {"field": "long"},
    "steps": {"steps": 7},
    "batch_size": {"batch_size": 12},
    "seed": {"seed": 1},
    "preset": {"preset": "vit-b16"},
    "context": {"context": 12},
    "loss": {"loss": "cosine"},
    "lock": {"lock": "tower"},
    "unlocked_blocks": {"lock": "tower", "unlocked_blocks": 1},
    "patch_dropout": {"patch_dropout": 0.5},
    "patch_dropout_steps": {"patch_dropout": 0.5, "patch_dropout_steps": 3},
    "lr": {"lr": 0.01},
    "schedule": {"schedule": "constant"},
    "warmup": {"warmup": 3},
    "cooldown": {"schedule": "constant", "cooldown": 3},
    "layer_decay": {"layer_decay": 0.7},
    "weight_decay": {"weight_decay": 0.1},
    "beta1": {"beta1": 0.8},
    "beta2": {"beta2": 0.95},
    "eps": {"eps": 1e-8},
    "clip_grad": {"clip_grad": 2.0},
    "ema": {"ema": 0.999},
    "min_crop_area": {"min_crop_area": 0.5},
    "flip": {"flip": 0.5},
    "colour": {"colour": 0.1},
    "shuffle_buffer": {"shuffle_buffer": 100},
    "fp8": {"fp8": True},
}


@pytest.mark.parametrize("name", sorted(MATHEMATICS - {"model", "precision", "text_dim", "init_from", "options"}))
def test_a_setting_that_changes_the_mathematics_is_a_difference_under_its_options_name(name):
    changes = OTHERS[name]
    config = CLIP if name in ("field", "context") else LIFT
    assert getattr(replace(config, **changes), name) != getattr(config, name)
    needed = {other: value for other, value in changes.items() if other != name}
    lines = found(of(replace(config, **needed)), of(replace(config, **changes)))
    assert len(lines) == 1
    assert lines[0].startswith(f"--{name.replace('_', '-')} ")


def test_a_difference_names_both_values():
    assert found(of(LIFT), of(replace(LIFT, lr=0.01))) == ["--lr 0.001, now 0.01"]
    assert found(of(replace(LIFT, fp8=True)), of(LIFT)) == ["--fp8 on, now off"]
    assert found(of(LIFT), of(replace(LIFT, shuffle_buffer=9))) == ["--shuffle-buffer not given, now 9"]
    assert found(of(LIFT), of(CLIP)) == ["--model lift, now clip"]
    assert found(of(LIFT), of(LIFT, precision="bf16")) == ["--precision fp32, now bf16"]
    assert found(of(LIFT), of(LIFT, text_dim=32)) == ["--text-dim 24, now 32"]
    assert found(of(LIFT), of(LIFT, read={"key": "id"})) == ["--key not given, now id"]
    assert found(of(LIFT, read={"key": "id"}), of(LIFT)) == ["--key id, now not given"]
    assert found(of(LIFT), of(LIFT, init_from="aa")) == ["--init-from not given, now given"]
    assert found(of(LIFT, init_from="bb"), of(LIFT)) == ["--init-from given, now not given"]
    assert found(of(LIFT, init_from="bb"), of(LIFT, init_from="aa")) == ["other weights at --init-from"]
    assert len(found(of(LIFT), of(replace(LIFT, lr=0.01, seed=3, steps=9)))) == 3


def test_settings_that_do_not_change_the_mathematics_are_no_difference():
    free = replace(
        LIFT,
        out=Path("elsewhere"),
        data=(Path("moved"),),
        cache=(Path("moved too"),),
        pictures=(Path("images"),),
        resume=True,
        loader="host",
        checked=True,
        device="cuda",
        checkpointing="block",
        compile=True,
        micro_batch=3,
        parallel="fsdp",
        threads=1,
        timeout=1.0,
        save_minutes=None,
        save_every=3,
        keep_last=9,
        keep_every=100,
        save_weights=True,
        keep_best="held/r1",
        eval_data={"held": Path("held out")},
        eval_pictures=(Path("images"),),
        eval_field=("long",),
        eval_templates=Path("templates.txt"),
        eval_classnames=Path("names.txt"),
        eval_every=5,
        spike=3.0,
        on_spike="skip",
        max_skipped=0.5,
    )
    changed = {name for name in FREE if getattr(free, name) != getattr(LIFT, name)}
    assert changed == FREE - {"graph"}  # it does not go with micro_batch
    assert found(of(LIFT), of(free)) == []
    assert found(of(LIFT), of(replace(LIFT, graph=True))) == []


def test_settings_without_a_meaning_for_the_model_are_left_out():
    assert found(of(LIFT), of(replace(LIFT, field="long", context=5))) == []
    assert found(of(CLIP), of(replace(CLIP, text_dim=5), text_dim=5)) == []


def test_how_a_cache_says_the_data_is_read_equals_the_option():
    read = DataOptions(shard_rows=5).recorded()
    asked = replace(LIFT, options=DataOptions(shard_rows=5))
    assert found(of(LIFT, read=read), of(asked, read=read)) == []


@pytest.fixture
def sets(tmp_path):
    """The folders of two data sets of 10 and 7 samples."""
    return [make_set(tmp_path / f"dáta {seed}", count, seed=seed).folder for seed, count in ((1, 10), (2, 7))]


def compared(old, new):
    return found(of(CLIP), of(CLIP), old, new)


def test_a_moved_data_set_is_the_same(sets, tmp_path):
    before = fingerprints(open_sets(sets), [], ["a", "b"])
    moved = [tmp_path / "x", tmp_path / "y"]
    for old, new in zip(sets, moved, strict=True):
        shutil.copytree(old, new)
        shutil.rmtree(old)
    assert compared(before, fingerprints(open_sets(moved), [], ["a", "b"])) == []


def test_another_data_set_is_told_by_its_first_difference(sets, tmp_path):
    before = fingerprints(open_sets(sets), [], ["a", "b"])

    def now(first, second, captions=("a", "b")):
        return compared(before, fingerprints(Collection([first, second]), [], captions))

    first, second = open_sets(sets).sets
    more = make_set(tmp_path / "more", 12, seed=1)
    fewer = make_set(tmp_path / "fewer", 4, seed=2)
    cut = make_set(tmp_path / "cut", 10, per_shard=3, seed=1)
    images = make_set(tmp_path / "images", 7, seed=3)
    assert now(first, second) == []
    assert now(more, second) == ["another data set (1 of 2): 2 more samples"]
    assert now(first, fewer) == ["another data set (2 of 2): 3 fewer samples"]
    assert now(cut, fewer) == [
        "another data set (1 of 2): cut into other shards",
        "another data set (2 of 2): 3 fewer samples",
    ]
    assert now(first, images) == ["another data set (2 of 2): other images"]
    assert now(first, second, ("a", "c")) == ["another data set (2 of 2): other captions"]
    assert now(second, first, ("b", "a"))
    assert now(make_set(tmp_path / "eleven", 11, seed=1), second) == ["another data set (1 of 2): 1 more sample"]
    one = fingerprints(open_sets(sets[:1]), [])
    assert compared(before, one) == ["2 of --data, now 1"]
    assert compared(one, fingerprints(Collection([more]), [])) == ["another data set: 2 more samples"]


def test_at_most_16_images_of_a_set_are_read(tmp_path):
    samples = make_set(tmp_path / "data", 100, per_shard=30)
    read = []
    image_bytes = samples.image_bytes
    samples.image_bytes = lambda i: read.append(i) or image_bytes(i)
    fingerprints(Collection([samples]), [])
    assert len(read) == len(set(read)) == 16
    assert min(read) == 0
    assert max(read) > 90


def test_an_image_that_cannot_be_read_is_not_compared(sets):
    data = open_sets(sets[:1])
    before = fingerprints(data, [])
    samples = data.sets[0]
    image_bytes = samples.image_bytes

    def unreadable(i):
        if i < 4:
            raise BadSample("unreadable", "gone")
        return image_bytes(i)

    samples.image_bytes = unreadable
    after = fingerprints(data, [])
    assert after["data"][0]["images"].count("") == 4
    assert compared(before, after) == compared(after, before) == []


def test_an_empty_set_of_left_out_samples_and_others(sets):
    data = open_sets(sets)
    none, some = fingerprints(data, []), fingerprints(data, [], left_out={3: "x", 1: "y"})
    assert some == fingerprints(data, [], left_out=[1, 3])
    assert compared(none, some) == ["0 samples left out for their text, now 2"]
    assert compared(some, fingerprints(data, [], left_out=[1, 4])) == [
        "2 samples left out for their text, now 2 others"
    ]


def test_another_cache_is_told_by_its_first_difference(tmp_path):
    def of_cache(name, copied=None, **options):
        folder = tmp_path / name
        if copied:
            shutil.copytree(tmp_path / copied, folder)
        else:
            write(folder, (4, 3), 16, **options)
        return fingerprints(Collection([]), [Cache(folder)])

    first = of_cache("first")
    assert compared(first, of_cache("copy", "first")) == []
    assert compared(first, of_cache("same")) == []
    assert compared(first, of_cache("codec", codec="int4r")) == ["another cache: codec int8, now int4r"]
    assert compared(first, of_cache("vectors", seed=1)) == ["another cache: other keys or vectors"]
    assert compared(first, of_cache("field", field="long")) == ["another cache: field txt, now long"]
    other = of_cache("encoder", encoder=ENCODER | {"pooling": "cls"})
    assert compared(first, other) == ["another cache: encoder pooling mean, now cls"]
    rotated = [of_cache(f"rotation {seed}", codec="int4r", rotation_seed=seed) for seed in (0, 1)]
    (line,) = compared(*rotated)
    assert line.startswith("another cache: rotation ")
