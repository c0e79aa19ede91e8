"""train/notices.py and the accounting of a run: what is left out, which texts repeat, and that it is said."""

import json
import random

import pytest
import torch
from support import complete  # noqa: F401
from support.tiny_sets import make_set, png

from lift_fast.cache import Cache, CacheWriter, encode
from lift_fast.data.open import open_data
from lift_fast.data.options import DataOptions
from lift_fast.data.samples import BadText, Collection
from lift_fast.data.shards import ShardWriter
from lift_fast.errors import ConfigError, DataError, TrainingError
from lift_fast.nn import PRESETS, Preset, TextConfig, VitConfig
from lift_fast.text.cached import CachedText
from lift_fast.text.tokenized import TokenizedText
from lift_fast.train import notices
from lift_fast.train.config import TrainConfig
from lift_fast.train.loop import train


@pytest.fixture(autouse=True)
def small_preset(monkeypatch):
    small = Preset(VitConfig(16, 8, 32, 2, 2), TextConfig(width=16, layers=1, heads=2), embed_dim=16, text_dim=24)
    monkeypatch.setitem(PRESETS, "small", small)


def write(folder, captions):
    """A set of random images with these captions, "" for none."""
    with ShardWriter(folder, 8) as writer:
        for i, caption in enumerate(captions):
            writer.write(f"k{i}", png(random.Random(i)), caption, {})
    return folder


def clip(folder, captions, **settings):
    """The config of a CLIP run on such a set."""
    data = write(folder / "data", captions)
    shared = {"preset": "small", "context": 12, "steps": 2, "batch_size": 4, "precision": "fp32"}
    return TrainConfig("clip", (data,), folder / "run", **{**shared, **settings})


def said_by(config):
    """The notices of a run, and its run.json."""
    said = []
    run = train(config, progress=False, opened=lambda training: said.extend(training.notices))
    return said, run


def test_a_contrastive_batch_of_one_is_refused(tmp_path):
    """Line 5 of the issue: it trained at loss 0.000."""
    with pytest.raises(ConfigError, match="the contrastive loss of a batch of 1 is always 0.*at least 2"):
        clip(tmp_path, ["a"] * 8, batch_size=1)
    TrainConfig("lift", (tmp_path,), tmp_path, (tmp_path,), batch_size=1, loss="cosine")


def test_varied_captions_need_no_notice(tmp_path):
    said, run = said_by(clip(tmp_path, [f"caption {i}" for i in range(24)]))
    assert said == [] and run["left_out"] == {} and run["problems"] == []


def test_a_set_of_one_caption_is_told(tmp_path):
    """The kind of line 5: nothing can be learnt, and the loss says nothing of it."""
    said, _ = said_by(clip(tmp_path, ["a photo"] * 24))
    assert said == ["all texts that were looked at are the same: with one text there is nothing to learn"]


def test_more_repeats_than_captions_are_told(tmp_path):
    said, _ = said_by(clip(tmp_path, [f"class {i % 3}" for i in range(24)], batch_size=8))
    (line,) = said
    assert "of the samples of a batch have the text of another one in it" in line
    assert int(line.split("%")[0]) > 90


@pytest.mark.parametrize(("groups", "batch_size"), [(12, 8), (60, 30), (6, 60)])
def test_the_share_is_that_of_batches(groups, batch_size, tmp_path):
    """Against its expectation: 1 - the chance that no other of the batch is of the sample's group."""
    captions = [f"class {i % groups}" for i in range(60)]
    data = Collection([open_data(write(tmp_path / "data", captions))])
    text = TokenizedText(data, "txt", 12)
    share, all_same = notices.repeats(text, len(data), batch_size, seed=0)
    others = 60 // groups - 1
    none = 1.0
    for i in range(batch_size - 1):
        none *= max(0, 59 - others - i) / (59 - i)
    assert share == pytest.approx(1 - none, abs=0.05) and not all_same


def cache_of(folder, data, vectors, skipped=()):
    source = [{"name": name, "samples": size} for name, size in zip(data.names, data.shard_sizes, strict=True)]
    writer = CacheWriter(folder, vectors.shape[1], "int8", {"name": "test"}, source, "txt", None)
    first = 0
    for number, size in enumerate(data.shard_sizes):
        rows = [row - first for row in skipped if first <= row < first + size]
        part = encode(vectors[first : first + size], "int8", None)
        writer.write_shard(number, part, data.shard_hashes(number).tolist(), skipped=rows)
        first += size
    writer.finish()
    return folder


def test_equal_cached_vectors_repeat(tmp_path):
    data = make_set(tmp_path / "data", 24)
    vectors = torch.nn.functional.normalize(torch.randn(24, 24, generator=torch.Generator().manual_seed(0)))
    collection = Collection([data])
    for name, count, want in (("own", 24, 0.0), ("two", 2, 1.0), ("one", 1, 1.0)):
        cache = cache_of(tmp_path / name, data, vectors[torch.arange(24) % count])
        text = CachedText([Cache(cache)], collection)
        assert notices.repeats(text, 24, 12, seed=0) == (want, count == 1)
        told = [len(notices.lines(collection, text, 12, 0, negatives=negatives)) for negatives in (True, False)]
        unknown = 1  # this cache has no digest of its captions
        assert told == [unknown + (count < 3), unknown + (count == 1)]


def test_rows_that_a_cache_left_out_are_left_out_of_training(tmp_path):
    """They need no --skip-bad; each is in skipped.jsonl, counted in run.json and told, even before it comes up."""
    data = make_set(tmp_path / "data", 24)
    vectors = torch.nn.functional.normalize(torch.randn(24, 24))
    cache = cache_of(tmp_path / "cache", data, vectors, skipped=(3, 17))
    config = TrainConfig(
        "lift", (data.folder,), tmp_path / "run", (cache,), preset="small", steps=12, batch_size=5, precision="fp32"
    )
    said, run = said_by(config)
    assert said[0].startswith("2 of 24 samples are left out (2 ")
    assert sum(run["left_out"].values()) == 2
    lines = [json.loads(line) for line in (config.out / "skipped.jsonl").read_text().splitlines()]
    assert sorted(line["row"] for line in lines) == [3, 17]
    assert run["skipped_pictures"] == 2 and run["skipped_met"] >= 4


def test_every_left_out_sample_is_listed_when_a_run_is_short(tmp_path):
    data = make_set(tmp_path / "data", 24)
    cache = cache_of(tmp_path / "cache", data, torch.nn.functional.normalize(torch.randn(24, 24)), skipped=range(9))
    config = TrainConfig(
        "lift", (data.folder,), tmp_path / "run", (cache,), preset="small", steps=1, batch_size=2, precision="fp32"
    )
    _, run = said_by(config)
    assert len((config.out / "skipped.jsonl").read_text().splitlines()) == 9 > run["skipped_pictures"]


def test_clip_leaves_out_captions_that_cannot_be_used_where_it_may(tmp_path):
    captions = [f"caption {i}" for i in range(24)]
    captions[5] = captions[20] = ""
    with pytest.raises(BadText, match="'k5' has no caption"):
        said_by(clip(tmp_path / "a", captions))
    said, run = said_by(clip(tmp_path / "b", captions, options=DataOptions(skip_bad=True), steps=12))
    assert said[0].startswith("2 of 24 samples are left out (2 no caption); the first: ") and "'k5'" in said[0]
    assert run["left_out"] == run["skipped_causes"] == {"no caption": 2}
    assert run["config"]["options"]["skip_bad"]


def test_what_belongs_to_no_sample_is_in_run_json(tmp_path):
    config = clip(tmp_path, [f"caption {i}" for i in range(24)], options=DataOptions(skip_bad=True))
    tar = sorted(config.data[0].glob("*.tar"))[-1]
    tar.write_bytes(tar.read_bytes()[:5000])
    _, run = said_by(config)
    (problem,) = run["problems"]
    assert problem["cause"] == "damaged shard" and tar.name in problem["where"] and problem["reason"]
    with pytest.raises(DataError, match="skip-bad"):
        said_by(clip_of_same(config, tmp_path / "again"))


def clip_of_same(config, out):
    return TrainConfig("clip", config.data, out, preset="small", context=12, steps=2, batch_size=4)


def test_the_disk_must_have_space_for_the_weights(tmp_path, monkeypatch):
    config = clip(tmp_path, [f"caption {i}" for i in range(24)])
    monkeypatch.setattr("lift_fast.train.setup.free_bytes", lambda path: 1000)
    with pytest.raises(TrainingError, match=r"the run needs \d+\.\d MB in .*run and its disk has 0\.0 MB free"):
        train(config, progress=False)
    assert not config.out.exists()


def test_notices_change_no_loss(tmp_path, monkeypatch):
    """They draw from a generator of their own."""
    config = clip(tmp_path, [f"caption {i % 5}" for i in range(24)], steps=4)
    _, with_them = said_by(config)
    monkeypatch.setattr(notices, "lines", lambda *args, **settings: [])
    again = TrainConfig(**{**vars(config), "out": tmp_path / "again"})
    assert train(again, progress=False)["loss"] == with_them["loss"]
