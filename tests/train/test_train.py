"""The trainer: the same seed gives the same losses, both models see the same images, they learn; what a run writes."""

import errno
import io
import json
import math
import os
import tarfile
from dataclasses import replace

import pytest
import torch
from support import complete  # noqa: F401
from support.ranks import SMALL
from support.tiny_sets import make_set

from lift_fast import run_folder
from lift_fast.cache import Cache, CacheWriter, Rotation, encode
from lift_fast.data import dali
from lift_fast.data.host import HostPipeline
from lift_fast.data.samples import Collection
from lift_fast.data.shards import Shards
from lift_fast.devices import pick_device, use_bf16
from lift_fast.errors import CacheMismatch, ConfigError, DataError, TrainingError
from lift_fast.nn import PRESETS
from lift_fast.text.cached import CachedText
from lift_fast.train.config import TrainConfig
from lift_fast.train.loop import train


@pytest.fixture(autouse=True)
def small_preset(monkeypatch):
    monkeypatch.setitem(PRESETS, "small", SMALL)


def make_cache(folder, data, dim=24, seed=0, name="test", codec="int8", rotation=None):
    vectors = torch.nn.functional.normalize(torch.randn(len(data), dim, generator=torch.Generator().manual_seed(seed)))
    source = [{"name": path.name, "samples": size} for path, size in zip(data.paths, data.shard_sizes, strict=True)]
    writer = CacheWriter(folder, dim, codec, {"name": name}, source, "txt", rotation)
    start = 0
    for shard, size in enumerate(data.shard_sizes):
        rows = encode(vectors[start : start + size], codec, rotation)
        writer.write_shard(shard, rows, data.shard_hashes(shard).tolist())
        start += size
    writer.finish()
    return vectors


@pytest.fixture
def two_sets(tmp_path):
    """(config of a LIFT run, config of a CLIP run) over two data sets with their caches."""
    data, caches = [], []
    for seed, count in ((1, 21), (2, 14)):
        shards = make_set(tmp_path / f"data{seed}", count, per_shard=8, seed=seed)
        make_cache(tmp_path / f"cache{seed}", shards, seed=seed)
        data.append(shards.folder)
        caches.append(tmp_path / f"cache{seed}")
    shared = {"data": tuple(data), "preset": "small", "steps": 4, "batch_size": 8, "warmup": 2, "precision": "fp32"}
    lift = TrainConfig(model="lift", out=tmp_path / "lift", cache=tuple(caches), **shared)
    return lift, TrainConfig(model="clip", out=tmp_path / "clip", context=12, **shared)


def data_of(config):
    return Collection([Shards(folder) for folder in config.data])


def again(config, out, **changes):
    return replace(config, out=out, **changes)


def quiet(config):
    return train(config, progress=False)


def test_same_seed_same_losses(two_sets, tmp_path):
    for config in two_sets:
        first, second = quiet(config), quiet(again(config, tmp_path / f"{config.model}-2"))
        other = quiet(again(config, tmp_path / f"{config.model}-3", seed=1))
        assert first["loss"] == second["loss"]
        assert first["loss"] != other["loss"]


@pytest.mark.parametrize(("codec", "within"), [("int8r", 0.02), ("int4r", 0.02), ("int2r", 0.05)])
def test_rotated_training_and_plain_training_reach_the_same_loss(two_sets, tmp_path, codec, within):
    lift, _ = two_sets
    config = again(lift, tmp_path / "plain", steps=60, lr=3e-3, data=lift.data[:1], cache=lift.cache[:1])
    losses = {}
    for kind in ("f32", codec):
        rotation = Rotation(24, seed=3) if kind == codec else None
        make_cache(tmp_path / kind, data_of(config).sets[0], codec=kind, rotation=rotation)
        run = quiet(again(config, tmp_path / f"run-{kind}", cache=(tmp_path / kind,)))
        assert run["rotation"] == (None if rotation is None else {"kind": "hadamard", "seed": 3})
        losses[kind] = run["loss"]
    first, last = losses["f32"][0], sum(losses["f32"][-5:]) / 5
    assert last < first - 0.5  # it learns, so that the comparison below means something
    assert sum(losses[codec][-5:]) / 5 == pytest.approx(last, abs=within * first)


def test_caches_of_other_rotations_are_not_mixed(two_sets, tmp_path):
    lift, _ = two_sets
    data = data_of(lift)
    for seed, shards in enumerate(data.sets):
        make_cache(tmp_path / f"r{seed}", shards, codec="int4r", rotation=Rotation(24, seed))
    with pytest.raises(CacheMismatch, match="differ in encoder, caption field, codec or rotation"):
        CachedText([Cache(tmp_path / "r0"), Cache(tmp_path / "r1")], data)


def test_options_of_the_image_tower(two_sets, tmp_path):
    """Recomputation and compiling change a loss by rounding at most; float8 changes it a little."""
    lift, _ = two_sets
    plain = quiet(lift)["loss"]
    for level in ("mlp", "branches", "block"):
        assert quiet(again(lift, tmp_path / level, checkpointing=level))["loss"] == pytest.approx(plain, rel=1e-4)
    assert quiet(again(lift, tmp_path / "compiled", compile=True))["loss"] == pytest.approx(plain, rel=1e-4)
    fp8 = quiet(again(lift, tmp_path / "fp8", fp8=True))["loss"]
    assert fp8 != plain and fp8 == pytest.approx(plain, rel=0.05)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is available")
def test_a_graph_needs_a_gpu(two_sets):
    with pytest.raises(ConfigError, match="CUDA graph and needs a CUDA device"):
        quiet(again(two_sets[0], two_sets[0].out, graph=True))
    assert not two_sets[0].out.exists()


def test_both_models_see_the_same_pictures(two_sets, monkeypatch):
    seen = []
    original = HostPipeline.__iter__

    def spy(self):
        for batch in original(self):
            seen.append((batch.rows.tolist(), int(batch.pixels.long().sum())))
            yield batch

    monkeypatch.setattr(HostPipeline, "__iter__", spy)
    for config in two_sets:
        quiet(config)
    assert len(seen) == 8
    assert seen[:4] == seen[4:]


@pytest.mark.skipif(not dali.installed(), reason="DALI is not installed")
def test_either_loader_trains_alike(two_sets, tmp_path):
    """On PNG, which the host renders for DALI too: to the last digit."""
    lift, _ = two_sets
    options = {"flip": 0.5, "colour": 0.3, "shuffle_buffer": 10}
    host, other = (quiet(again(lift, tmp_path / name, loader=name, **options)) for name in ("host", "dali"))
    assert host["loss"] == other["loss"]
    assert host["loader"]["state"] == other["loader"]["state"]
    assert (host["loader"]["kind"], other["loader"]["kind"]) == ("HostPipeline", "DaliPipeline")
    assert host["loss"] != quiet(again(lift, tmp_path / "plain"))["loss"]


def test_cached_text_is_the_sample_s_text(two_sets, tmp_path):
    lift, _ = two_sets
    data = Collection([Shards(folder) for folder in lift.data])
    vectors = torch.cat([make_cache(tmp_path / f"again{seed}", data.sets[seed - 1], seed=seed) for seed in (1, 2)])
    text = CachedText([Cache(folder) for folder in lift.cache], data)
    for rows in (torch.randperm(35), torch.tensor([34, 0, 34, 20, 21]), torch.tensor([3]), torch.tensor([30])):
        got = text.rows(rows).widen(torch.float32)
        torch.testing.assert_close(got, vectors[rows], atol=0.01, rtol=0)


@pytest.mark.parametrize("loss", ["contrastive", "cosine"])
def test_it_learns(two_sets, tmp_path, loss):
    """35 random images against 35 random vectors: a model that learns can memorise them."""
    lift, _ = two_sets
    run = quiet(again(lift, tmp_path / loss, steps=150, loss=loss, batch_size=16, lr=3e-3, weight_decay=0.0))
    if loss == "contrastive":
        assert run["loss"][-1] < 0.5 * run["loss"][0]
    else:
        assert run["loss"][0] > -0.2
        assert run["loss"][-1] < -0.5


def test_what_a_run_writes(two_sets):
    for config in two_sets:
        run = quiet(config)
        lines = [json.loads(line) for line in (config.out / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [0, 1, 2, 3]
        assert [line["loss"] for line in lines] == run["loss"]
        assert [line["lr"] for line in lines] == pytest.approx([0.0005, 0.001, 0.001, 0.0005])
        assert list(config.out.glob("events.out.tfevents.*"))
        assert not list(config.out.glob("*.part"))
        model, read = run_folder.load(config.out)
        assert read["samples_seen"] == 32
        assert read["params"] == sum(p.numel() for p in model.parameters())
        assert not model.training
        assert read["step_ms"] > 0
        assert read["loss"] == run["loss"]


def test_trained_weights_come_back(two_sets):
    lift, _ = two_sets
    quiet(lift)
    model, _ = run_folder.load(lift.out)
    torch.manual_seed(lift.seed)
    fresh = run_folder.build({"model": "lift", "preset": "small", "text_dim": 24})
    assert not torch.equal(model.head.fc_1.weight, fresh.head.fc_1.weight)
    pixels = torch.randn(2, 3, 16, 16)
    once, twice = run_folder.load(lift.out)[0].encode_image(pixels), model.encode_image(pixels)
    torch.testing.assert_close(once, twice)


def test_broken_pictures_are_counted_and_training_goes_on(tmp_path):
    shards = make_set(tmp_path / "data", 20, broken={4, 11})
    make_cache(tmp_path / "cache", shards)
    config = TrainConfig(
        "lift", (shards.folder,), tmp_path / "run", (tmp_path / "cache",), preset="small", steps=9, batch_size=6
    )
    run = quiet(config)
    assert run["skipped_pictures"] == 2
    assert {line["row"] for line in run["skipped"]} == {4, 11}
    lines = (config.out / "skipped.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == run["skipped"]
    assert run["loader"]["state"]["epoch"] == 2 and run["loader"]["kind"] == "HostPipeline"
    assert len(run["loss"]) == 9


def test_a_cache_of_other_data_is_refused_before_anything_is_written(two_sets, tmp_path):
    lift, _ = two_sets
    with pytest.raises(CacheMismatch, match="first difference|shards"):
        quiet(again(lift, tmp_path / "x", cache=lift.cache[::-1]))
    assert not (tmp_path / "x").exists()


def test_a_cache_that_does_not_fit_the_head_is_refused(two_sets, tmp_path):
    lift, _ = two_sets
    with pytest.raises(CacheMismatch, match="24.*32"):
        quiet(again(lift, tmp_path / "x", text_dim=32))
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"context": 2},
        {"lr": -1.0},
        {"lr": math.nan},
        {"warmup": -1},
        {"min_crop_area": 5.0},
        {"min_crop_area": 0.0},
        {"clip_grad": 0.0},
        {"beta2": 1.5},
    ],
)
def test_settings_out_of_range(two_sets, tmp_path, changes):
    with pytest.raises(ConfigError, match=next(iter(changes))):
        again(two_sets[1], tmp_path / "x", **changes)


def test_pictures_that_are_missing_or_broken_are_told_before_anything_is_written(tmp_path):
    shards = make_set(tmp_path / "data", 12, broken=set(range(10)))
    config = TrainConfig("clip", (shards.folder,), tmp_path / "x", preset="small", context=12, steps=2, batch_size=4)
    with pytest.raises(DataError, match="only 2 of 12 images decode"):
        quiet(config)
    with tarfile.open(tmp_path / "data/00000.tar", "a") as tar:
        info = tarfile.TarInfo("z.txt")
        info.size = 1
        tar.addfile(info, io.BytesIO(b"x"))
    with pytest.raises(DataError, match="'z' has no image"):
        quiet(config)
    assert not (tmp_path / "x").exists()


def test_a_full_disk_at_the_end_is_told(two_sets, monkeypatch):
    lift, _ = two_sets
    fsync = os.fsync

    def full(descriptor):
        if (lift.out / "metrics.jsonl").exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(TrainingError, match=r"cannot write the run to .*No space left"):
        quiet(lift)
    written = sorted(path.name for path in lift.out.iterdir() if "tfevents" not in path.name)
    assert written == ["metrics.jsonl", "started.json"]
    monkeypatch.undo()
    monkeypatch.setitem(PRESETS, "small", SMALL)
    assert quiet(lift)["loss"] == quiet(again(lift, lift.out.with_name("other")))["loss"]  # the same command again


def test_caches_of_two_encoders_are_refused(two_sets, tmp_path):
    lift, _ = two_sets
    make_cache(tmp_path / "other", Shards(lift.data[1]), name="another")
    with pytest.raises(CacheMismatch, match="differ in encoder"):
        quiet(again(lift, tmp_path / "x", cache=(lift.cache[0], tmp_path / "other")))


def test_settings_that_cannot_work(two_sets, tmp_path):
    lift, clip = two_sets
    for changes, match in (
        ({"cache": lift.cache[:1]}, "one --cache for each"),
        ({"steps": 0}, "steps"),
        ({"preset": "huge"}, "no preset"),
        ({"device": "tpu9"}, "device"),
        ({"batch_size": 100}, "larger than the data"),
    ):
        with pytest.raises(ConfigError, match=match):
            quiet(again(lift, tmp_path / "x", **changes))
    with pytest.raises(ConfigError, match="collapses"):
        again(clip, tmp_path / "x", loss="cosine")
    with pytest.raises(ConfigError, match="leave out --cache"):
        again(clip, tmp_path / "x", cache=lift.cache)
    assert not (tmp_path / "x").exists()
    lift.out.mkdir()
    (lift.out / "notes.txt").write_text("of another")
    with pytest.raises(ConfigError, match="exists already"):
        quiet(lift)
    with pytest.raises(ConfigError, match="no run in"):
        quiet(again(lift, tmp_path / "x", resume=True))


def test_clip_names_a_caption_that_is_missing(two_sets, tmp_path):
    _, clip = two_sets
    with pytest.raises(DataError, match="no caption 'title'"):
        quiet(again(clip, tmp_path / "x", field="title"))
    assert not (tmp_path / "x").exists()


def test_a_loss_that_explodes_stops_the_run(two_sets, tmp_path):
    lift, _ = two_sets
    with pytest.raises(TrainingError, match=r"Lower --lr"):
        quiet(again(lift, tmp_path / "x", lr=float("inf")))
    assert (tmp_path / "x" / "metrics.jsonl").exists()
    with pytest.raises(DataError, match="no finished run"):
        run_folder.load(tmp_path / "x")


def test_a_checkpoint_that_does_not_fit_is_told(two_sets):
    lift, _ = two_sets
    quiet(lift)
    file = lift.out / "run.json"
    file.write_text(file.read_text().replace('"text_dim": 24', '"text_dim": 25'))
    with pytest.raises(ConfigError, match="does not fit"):
        run_folder.load(lift.out)
    file.write_text(file.read_text()[:100])
    with pytest.raises(DataError, match="damaged"):
        run_folder.load(lift.out)


def test_a_complete_run_is_not_trained_again(two_sets):
    lift, _ = two_sets
    run = quiet(lift)
    before = (lift.out / "model.safetensors").stat().st_mtime_ns
    assert quiet(lift) == json.loads(json.dumps(run, default=str))
    assert (lift.out / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(ConfigError, match=r"holds another run \(--lr 0.001, now 0.002\)"):
        quiet(again(lift, lift.out, lr=2e-3))


def test_devices_and_precision():
    cpu = torch.device("cpu")
    assert pick_device("cpu") == cpu
    assert use_bf16("bf16", cpu) and not use_bf16("fp32", cpu)
    for name in ("tpu9", "meta", "mps", "cuda:99"):
        with pytest.raises(ConfigError, match="device"):
            pick_device(name)


def test_bf16_stays_near_fp32(two_sets, tmp_path):
    lift, _ = two_sets
    exact, rounded = (quiet(again(lift, tmp_path / p, precision=p))["loss"] for p in ("fp32", "bf16"))
    assert exact != rounded
    assert all(math.isclose(a, b, abs_tol=0.05) for a, b in zip(exact, rounded, strict=True))
