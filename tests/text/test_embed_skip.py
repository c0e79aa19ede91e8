"""Embedding with --skip-bad: what cannot be embedded keeps its row, is counted by cause and listed once; and encoders
that give captions one vector."""

import json
import random
import shutil
from collections import Counter

import pytest
import torch
from support.tiny_caches import contents
from support.tiny_sets import make_set
from support.tiny_text import TinyEncoder, captions_of, work, write_lines

from lift_fast.cache import Cache, CacheWriter, encode
from lift_fast.data.open import open_data
from lift_fast.data.options import DataOptions
from lift_fast.data.samples import BadText, Collection
from lift_fast.data.sources import Source, open_source
from lift_fast.errors import CacheMismatch, DataError, EncoderError
from lift_fast.ranks import Rank
from lift_fast.text.cached import CachedText
from lift_fast.text.embed import embed, embed_share
from lift_fast.text.tokenized import TokenizedText
from lift_fast.train.notices import lines

# Rows of a table that no caption can be made of, and why.
BAD = [
    ({"key": "b0", "caption": None}, "no caption"),
    ({"key": "b1", "caption": "  "}, "no caption"),
    ({"key": "b2"}, "no caption"),
    ({"key": "b3", "caption": ["a red dog", "a dog in the park"]}, "not text"),
    ({"key": "b4", "caption": float("nan")}, "not text"),
    ({"key": "b5", "caption": 7}, "not text"),
    ({"key": "b6", "caption": {"raw": "a dog"}}, "not text"),
    ({"key": "b7", "caption": "."}, "no tokens"),
    ({"key": "b8", "caption": "..."}, "no tokens"),
    ({"key": None, "caption": "caption number 3"}, "no key"),
    ({"caption": "caption number 4"}, "no key"),
    ({"key": "k1", "caption": "caption number 5"}, "repeated key"),
]
SKIP = DataOptions(skip_bad=True)


def share(source, out, **options):
    return embed_share(source, out, options.pop("encoder", TinyEncoder(mixed=False)), progress=False, **options)


def table(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def listed(folder):
    return [json.loads(line) for line in (folder / "skipped.jsonl").read_text().splitlines()]


def mixed_rows(count, seed, bad=BAD):
    """Rows of which a third repeat a caption, with the bad ones among them; "k1" is the first."""
    rows = [{"key": f"k{i}", "caption": caption} for i, caption in enumerate(captions_of(count, count * 2 // 3))]
    rng = random.Random(seed)
    for row, _ in bad:
        rows.insert(rng.randrange(2, len(rows) + 1), row)
    return rows


# what is skipped


@pytest.mark.parametrize("codec", ["int8", "int4r", "f32"])
def test_samples_in_are_samples_embedded_and_samples_skipped(tmp_path, codec):
    rows = mixed_rows(60, 1)
    path = table(tmp_path / "c.jsonl", rows)
    source = open_source(path, options=DataOptions(skip_bad=True, shard_rows=100))
    done = share(source, tmp_path / "c", codec=codec)
    assert done.skipped == dict(Counter(cause for _, cause in BAD))
    assert done.computed + done.copied + sum(done.skipped.values()) == len(rows)
    cache = Cache(tmp_path / "c")
    assert len(cache) == len(rows) and cache.manifest.skipped == len(BAD)
    cache.verify()
    bad = [row for row, entry in enumerate(rows) if any(entry is b for b, _ in BAD)]
    assert cache.skipped(0).tolist() == bad
    good = [row for row in range(len(rows)) if row not in bad]
    want = TinyEncoder(mixed=False).encode([rows[row]["caption"] for row in good])
    assert torch.cosine_similarity(cache.vectors(torch.tensor(good)), want).min() > 0.97
    assert not cache.widen(torch.tensor(bad)).any()
    found = listed(tmp_path / "c")
    assert [(line["row"], line["cause"]) for line in found] == [
        (row, next(cause for b, cause in BAD if b is rows[row])) for row in bad
    ]
    assert {line["shard"] for line in found} == {"c.jsonl#00000"}
    assert all(line["sample"] and line["reason"] for line in found)


@pytest.mark.parametrize(("row", "cause"), BAD)
def test_each_is_an_error_without_skip_bad(tmp_path, row, cause):
    """None becomes text, as lists, numbers and NaN did."""
    rows = [{"key": f"k{i}", "caption": f"caption {i}"} for i in range(12)]
    rows.insert(8, {**row, "key": "k6"} if cause == "repeated key" else row)
    source = open_source(table(tmp_path / "c.jsonl", rows), options=DataOptions(shard_rows=6))
    with pytest.raises(BadText, match="(line 9|row 8).*skip-bad") as error:
        share(source, tmp_path / "c")
    assert error.value.cause == cause
    # A tokenizer's captions are known only when they are encoded, all others before anything is written.
    assert (tmp_path / "c").exists() == (cause == "no tokens")
    if cause == "no tokens":
        done = share(open_source(source.path, options=DataOptions(shard_rows=6, skip_bad=True)), tmp_path / "c")
        assert (done.computed, done.skipped) == (6, {"no tokens": 1})  # the first shard had been written


def test_a_repeat_of_a_bad_row_is_not_its_copy(tmp_path):
    """The first sample with a caption may be bad by its key, and a caption without tokens may repeat, in any shard of a
    group."""
    rows = [
        {"key": None, "caption": "one"}, {"key": "a", "caption": "one"}, {"key": "b", "caption": "."},
        {"key": "c", "caption": "."}, {"key": "d", "caption": "one"}, {"key": "e", "caption": "two"},
        {"key": "f", "caption": "two"}, {"key": "f", "caption": "three"}, {"key": "g", "caption": "three"},
        {"key": "h", "caption": "."},
    ]  # fmt: skip
    path = table(tmp_path / "c.jsonl", rows)
    for shard_rows in (1, 2, 3, 10):
        out = tmp_path / f"{shard_rows}"
        source = open_source(path, options=DataOptions(skip_bad=True, shard_rows=shard_rows))
        done = share(source, out, codec="f32")
        # With a shard for each row nobody sees that a key occurs twice.
        twice = {"repeated key": 1} if shard_rows in (2, 10) or shard_rows == 3 and 6 // 3 == 7 // 3 else {}
        assert done.skipped == {"no key": 1, "no tokens": 3, **twice}
        cache, encoder = Cache(out), TinyEncoder(mixed=False)
        kept = [1, 4, 5, 6, 8] if twice else [1, 4, 5, 6, 7, 8]
        want = encoder.encode([rows[row]["caption"] for row in kept])
        assert torch.equal(cache.widen(torch.tensor(kept)), want)
        assert {line["sample"] for line in listed(out)} == {
            source.samples.where(row) for row in range(10) if row not in kept
        }


def test_lift_and_clip_leave_out_the_same_samples(tmp_path):
    bad = [(row, cause) for row, cause in BAD if cause != "no tokens"]  # of these each tokenizer has its own
    rows = [{**row, "file_name": "a.png"} for row in mixed_rows(40, 3, bad)]
    path = table(tmp_path / "c.jsonl", rows)
    share(open_source(path, options=SKIP), tmp_path / "c")
    data = Collection([open_data(path, options=SKIP)])
    lift, clip = CachedText([Cache(tmp_path / "c")], data).left_out, TokenizedText(data, "txt", 16, True).left_out
    assert {row: error.cause for row, error in lift.items()} == {row: error.cause for row, error in clip.items()}
    assert list(clip) == sorted(clip) and Counter(error.cause for error in clip.values()) == Counter(
        cause for _, cause in bad
    )


def test_nothing_is_left_of_a_set_of_bad_captions(tmp_path):
    path = table(tmp_path / "c.jsonl", [{"caption": None}, {"caption": "."}, {"caption": 3}])
    done = share(open_source(path, options=SKIP), tmp_path / "c")
    assert (done.computed, done.copied, done.cosine, done.written) == (0, 0, None, 1)
    assert done.skipped == {"no caption": 1, "no tokens": 1, "not text": 1}
    assert not Cache(tmp_path / "c").vectors(torch.arange(3)).any()


# ranks, kills and a second run


@pytest.mark.parametrize("seed", range(6))
def test_the_list_is_the_same_after_kills_and_by_any_ranks(tmp_path, seed):
    rng = random.Random(seed)
    rows = mixed_rows(150, seed, BAD * 2)
    path = table(tmp_path / "c.jsonl", rows)
    work(path, tmp_path / "whole", 7, skip_bad=True)
    whole = contents(tmp_path / "whole")
    assert len(listed(tmp_path / "whole")) >= 20
    # A run that was stopped: some shards, partial.json, no list.
    work(path, tmp_path / "c", 7, skip_bad=True)
    partial = tmp_path / "c" / "text-00000.safetensors"
    partial.unlink()
    work(path, tmp_path / "c", 7, skip_bad=True)
    assert contents(tmp_path / "c") == whole
    shards = sorted(name for name in whole if name.startswith("text"))
    for name in rng.sample(shards, rng.randint(1, len(shards))):
        (tmp_path / "c" / name).unlink()
    (tmp_path / "c" / "skipped.jsonl").unlink()
    world = rng.randint(1, 3)
    results = [work(path, tmp_path / "c", 7, rank, world, skip_bad=True) for rank in rng.sample(range(world), world)]
    assert results[-1].missing == 0 and contents(tmp_path / "c") == whole
    assert results[-1].skipped == dict(Counter(line["cause"] for line in listed(tmp_path / "c")))
    again = work(path, tmp_path / "c", 7, skip_bad=True)
    assert (again.computed, again.copied, again.written) == (0, 0, 0) and again.skipped == results[-1].skipped
    assert contents(tmp_path / "c") == whole


def test_a_rank_that_is_not_the_last_counts_its_share(tmp_path):
    path = table(tmp_path / "c.jsonl", [{"caption": f"caption {i}" if i % 10 else None} for i in range(200)])
    source = open_source(path, options=DataOptions(skip_bad=True, shard_rows=5))
    first, last = (share(source, tmp_path / "c", rank=Rank(number, 2)) for number in range(2))
    assert first.missing and first.skipped == {"no caption": 12}  # 16 and 8 shards of 5 rows
    assert not last.missing and last.skipped == {"no caption": 20} and len(listed(tmp_path / "c")) == 20


# damaged shards, and what training makes of it


def test_a_cut_tar_among_three(tmp_path):
    """One damaged shard does not stop the others; training leaves out what the cache left out."""
    make_set(tmp_path / "data", 12, per_shard=4)
    tar = tmp_path / "data" / "00001.tar"
    tar.write_bytes(tar.read_bytes()[:5000])
    with pytest.raises(DataError, match=r"00001.tar.*"):
        open_data(tmp_path / "data")
    samples = open_data(tmp_path / "data", options=SKIP)
    cache = embed(samples, tmp_path / "c", TinyEncoder(), progress=False)
    assert len(cache) == len(samples) and samples.shard_sizes[1] < 4
    found = listed(tmp_path / "c")
    assert [line["cause"] for line in found] == ["damaged shard"] and "00001.tar" in found[0]["sample"]
    assert len(CachedText([cache], Collection([open_data(tmp_path / "data", options=SKIP)]))) == len(samples)


def test_training_leaves_out_what_the_cache_has_no_vector_of(tmp_path):
    make_set(tmp_path / "data", 10, per_shard=4)
    for name, rows in (("one", 3), ("two", 4)):
        table(
            tmp_path / f"{name}.jsonl",
            [
                {"key": f"{name}{i}", "image": f"{i}.png", "caption": None if i == 1 else f"{name} {i}"}
                for i in range(rows)
            ],
        )
    sets = [open_data(tmp_path / f"{name}.jsonl", options=SKIP) for name in ("one", "two")]
    caches = []
    for name in ("one", "two"):
        share(open_source(tmp_path / f"{name}.jsonl", options=SKIP), tmp_path / f"cache-{name}")
        caches.append(Cache(tmp_path / f"cache-{name}"))
    data = Collection(sets)
    text = CachedText(caches, data)
    assert sorted(text.left_out) == [1, 4] and "has no caption" in str(text.left_out[4])
    data.leave_out(text.left_out)
    assert TokenizedText(data, "caption", 8, skip_bad=True).left_out.keys() == {1, 4}
    with pytest.raises(BadText, match="has no caption"):
        TokenizedText(data, "caption", 8)


def test_training_gives_the_causes_that_embed_gives(tmp_path):
    path = table(tmp_path / "c.jsonl", mixed_rows(60, 2))
    options = DataOptions(skip_bad=True, shard_rows=20)
    done = share(open_source(path, options=options), tmp_path / "c")
    text = CachedText([Cache(tmp_path / "c")], Collection([open_data(path, options=options, captions_only=True)]))
    assert dict(Counter(error.cause for error in text.left_out.values())) == done.skipped
    assert [error.reason for error in text.left_out.values()] == [line["reason"] for line in listed(tmp_path / "c")]


def test_captions_that_changed_stop_training(tmp_path):
    path = write_lines(tmp_path / "c.jsonl", captions_of(20, 20))
    share(open_source(path), tmp_path / "c")
    cache = Cache(tmp_path / "c")
    same = open_data(path, captions_only=True)
    assert cache.check_data(same) == (1, 0, 0)
    shutil.copy(path, tmp_path / "copy.jsonl")
    moved = open_data(tmp_path / "copy.jsonl", captions_only=True)
    assert cache.check_data(moved) == (0, 1, 0)
    write_lines(path, [*captions_of(20, 20)[:-1], "another"])
    with pytest.raises(CacheMismatch, match="the keys are the same"):
        CachedText([cache], Collection([open_data(path, captions_only=True)]))


def test_a_cache_without_digests_is_told_before_training(tmp_path):
    """One of import-parquet: keys are compared, and captions cannot be."""
    samples = make_set(tmp_path / "data", 8)
    source = [{"name": name, "samples": size} for name, size in zip(samples.names, samples.shard_sizes, strict=True)]
    writer = CacheWriter(tmp_path / "c", 4, "f32", {"name": "x"}, source, "txt")
    for number, size in enumerate(samples.shard_sizes):
        writer.write_shard(number, encode(torch.randn(size, 4), "f32"), samples.shard_hashes(number).tolist())
    writer.finish()
    data = Collection([samples])
    text = CachedText([Cache(tmp_path / "c")], data)
    assert text.not_compared == 2
    assert "the captions of 2 shards were not compared, only their keys" in lines(data, text, 4, 0, negatives=True)[0]
    share(Source(samples), tmp_path / "whole")
    assert CachedText([Cache(tmp_path / "whole")], data).not_compared == 0


def test_how_the_data_was_read_is_recorded(tmp_path):
    path = tmp_path / "c.csv"
    path.write_text("id;caption\na;one\nb;two\nc;three\n")
    options = DataOptions(key="id", delimiter=";", shard_rows=2)
    share(open_source(path, options=options), tmp_path / "c")
    cache = Cache(tmp_path / "c")
    assert cache.manifest.read == {"key": "id", "delimiter": ";", "shard_rows": 2}
    assert cache.find(["c"]).tolist() == [2]
    with pytest.raises(CacheMismatch, match="key is 'id', not None"):
        share(open_source(path, options=DataOptions(delimiter=";", shard_rows=2)), tmp_path / "c")
    samples = open_data(path, options=DataOptions().merged(cache.manifest.read), captions_only=True)
    assert cache.check_data(samples) == (2, 0, 0)


# encoders that do not tell captions apart


class Constant(TinyEncoder):
    """Gives one vector for all captions, but for `noise` of their own."""

    noise = 0.0

    def encode(self, captions, batch_size=64, done=lambda count: None):
        own = super().encode(captions, batch_size, done)
        return self.noise * own + torch.ones(self.dim)


@pytest.mark.parametrize("shard_rows", [100, 1, 3])
def test_one_vector_for_all_captions_is_an_error(tmp_path, shard_rows):
    path = write_lines(tmp_path / "c.jsonl", captions_of(100, 60))
    source = open_source(path, options=DataOptions(shard_rows=shard_rows))
    with pytest.raises(EncoderError, match="one vector for .* different captions"):
        share(source, tmp_path / "c", encoder=Constant(mixed=False))
    assert len(list((tmp_path / "c").glob("text-*"))) == (0 if shard_rows == 100 else (8 - 1) // shard_rows)


def test_captions_that_are_all_equal_are_no_fault_of_the_encoder(tmp_path):
    path = write_lines(tmp_path / "c.jsonl", ["the same caption"] * 50)
    source = open_source(path, options=DataOptions(shard_rows=5))
    assert share(source, tmp_path / "c").computed == 1
    few = write_lines(tmp_path / "few.jsonl", [f"{i}" for i in range(7)])
    assert share(open_source(few), tmp_path / "few", encoder=Constant(mixed=False)).spread is None


def test_nearly_one_vector_is_a_warning_with_the_figure(tmp_path):
    path = write_lines(tmp_path / "c.jsonl", captions_of(300, 300))
    said = []
    encoder = Constant(mixed=False)
    encoder.noise = 0.3
    done = share(
        open_source(path, options=DataOptions(shard_rows=50)), tmp_path / "c", encoder=encoder, warn=said.append
    )
    assert 0.95 < done.spread < 0.9999 and len(said) == 1
    assert "mean cosine 0.9" in said[0] and "--pooling mean" in said[0]
    plain = share(open_source(path), tmp_path / "plain", warn=said.append)
    assert abs(plain.spread) < 0.5 and len(said) == 1
