"""Captions that changed under the same keys: told from digests, and read only where the files' stamps differ."""

import threading
from pathlib import Path

import pytest
import torch
from support.tiny_caches import ENCODER, data_of, vectors_of, write, writer_for

from lift_fast.cache import Cache, CacheWriter, encode, key_hash
from lift_fast.cache.manifest import digest_of
from lift_fast.data.samples import BadText
from lift_fast.errors import CacheError, CacheMismatch

SIZES, DIM = [3, 0, 4, 2], 8


def made_from(folder, data, stamps=None, skipped=None):
    """The cache of `data`, written shard by shard with digests and stamps. skipped: shard -> rows left out."""
    stamps = stamps or [""] * len(data.shard_sizes)
    source = [
        {"name": f"{k}.tar", "samples": n, "stamp": s}
        for k, (n, s) in enumerate(zip(data.shard_sizes, stamps, strict=True))
    ]
    writer = CacheWriter(folder, DIM, "int8", ENCODER, source, "txt")
    for number, size in enumerate(data.shard_sizes):
        keys = data.shard_keys(number)
        writer.expect(number, keys, digest_of(data.captions(number)))
        vectors = vectors_of(size, DIM)
        left_out = (skipped or {}).get(number, [])
        vectors[left_out] = 0
        writer.write_shard(number, encode(vectors, "int8"), [key_hash(key) for key in keys], left_out)
    writer.finish()
    data.read.clear()
    return Cache(folder)


def texts():
    return [f"a caption of {i}" for i in range(sum(SIZES))]


def test_a_caption_that_changed_under_its_key_is_told(tmp_path):
    """Keys alone, as they were compared before, do not show it."""
    data = data_of(SIZES)
    data.texts = texts()
    cache = made_from(tmp_path / "c", data)
    assert cache.check_data(data) == (0, 4, 0) and sorted(data.read) == [0, 1, 2, 3]
    data.texts[4] = "another caption"
    cache.check_keys(data)
    with pytest.raises(
        CacheMismatch, match=r"data shard 00002 \(2.tar\) of some/data .* the keys are the same; .*lift-"
    ):
        cache.check_data(data)
    data.texts = texts()
    data.keys[4] = "another key"
    with pytest.raises(CacheMismatch, match="was not made from"):
        cache.check_data(data)


def test_captions_are_read_where_the_stamps_differ(tmp_path):
    data = data_of(SIZES)
    data.texts = texts()
    cache = made_from(tmp_path / "c", data, ["a", "b", "c", ""])
    data.stamps = ["a", "x", "c", ""]
    assert cache.check_data(data) == (2, 2, 0) and sorted(data.read) == [1, 3]
    # A stamp that is the same says that nothing was written, so nothing is read.
    data.texts[0] = "changed, with the old stamp"
    assert cache.check_data(data) == (2, 2, 0)
    data.stamps[0] = "later"
    with pytest.raises(CacheMismatch, match="data shard 00000"):
        cache.check_data(data)


def test_without_a_digest_nothing_is_compared(tmp_path):
    write(tmp_path / "c", SIZES, DIM)
    data = data_of(SIZES)
    assert Cache(tmp_path / "c").check_data(data) == (0, 0, 4) and not data.read


def test_the_first_shard_that_differs_is_named_and_the_rest_is_not_read(tmp_path):
    data = data_of([1] * 300)
    cache = made_from(tmp_path / "c", data)
    data.texts = [f"caption-{key}" for key in data.keys]
    data.texts[2] = data.texts[250] = "other"
    with pytest.raises(CacheMismatch, match="data shard 00002"):
        cache.check_data(data, threads=2)
    assert len(data.read) < 300
    assert threading.active_count() < 20


@pytest.mark.parametrize("bad", [BadText("no caption", "x"), BadText("not text", "y")])
def test_bad_captions_are_part_of_the_digest(tmp_path, bad):
    data = data_of(SIZES)
    data.texts = texts()
    data.texts[1] = bad
    cache = made_from(tmp_path / "c", data, skipped={0: [1]})
    cache.check_data(data)
    data.texts[1] = BadText("no caption", "another reason")
    cache.check_data(data)
    data.texts[1] = "there is one now"
    with pytest.raises(CacheMismatch, match="data shard 00000"):
        cache.check_data(data)
    assert digest_of(["None", None]) != digest_of([None, "None"]) != digest_of(["null", "None"])


# rows without a vector


@pytest.mark.parametrize("codec", ["int8", "f32", "int4r"])
def test_rows_left_out_are_in_the_shard(tmp_path, codec):
    writer = writer_for(tmp_path / "c", SIZES, DIM, codec=codec)
    left_out = {0: [0, 2], 3: [0, 1]}
    vectors = {}
    for number in writer.missing():
        vectors[number] = vectors_of(SIZES[number], DIM, number)
        vectors[number][left_out.get(number, [])] = 0
        rows = encode(vectors[number], codec, writer._manifest.rotated_by())
        writer.write_shard(number, rows, range(SIZES[number]), left_out.get(number, []))
        assert writer.skipped(number) == left_out.get(number, [])
    writer.finish()
    cache = Cache(tmp_path / "c")
    cache.verify()
    assert [cache.skipped(k).tolist() for k in range(4)] == [[0, 2], [], [], [0, 1]]
    assert cache.skipped(0).dtype == torch.int64 and cache.manifest.skipped == 4
    assert [shard.skipped for shard in cache.manifest.shards] == [2, 0, 0, 2]
    zero = (cache.widen(torch.arange(9)) == 0).all(dim=1)
    assert zero.tolist() == [True, False, True, False, False, False, False, True, True]
    # Another run knows them from the shard's file.
    (tmp_path / "c" / "manifest.json").rename(tmp_path / "c" / "partial.json")
    again = writer_for(tmp_path / "c", SIZES, DIM, codec=codec)
    assert [again.skipped(k) for k in range(4)] == [[0, 2], [], [], [0, 1]]


def test_wrong_numbers_of_rows_left_out_are_damage(tmp_path):
    cache = made_from(tmp_path / "c", data_of(SIZES), skipped={2: [1, 3]})
    path = tmp_path / "c" / "text-00002.safetensors"
    data = bytearray(path.read_bytes())
    at = 8 + int.from_bytes(data[:8], "little") + 8 * SIZES[2]  # they follow the keys
    assert cache.skipped(2).tolist() == [1, 3]
    for value in (2**62, -1, 3):
        data[at : at + 8] = value.to_bytes(8, "little", signed=True)
        path.write_bytes(data)
        with pytest.raises(CacheError, match="is damaged: the numbers of the rows left out"):
            Cache(tmp_path / "c").rows(torch.tensor([4]))
        with pytest.raises(CacheError, match="checksum"):
            Cache(tmp_path / "c").verify()


# caches of format 2


@pytest.fixture
def version_2(tmp_path):
    """A copy of a cache that commit 2fecafe wrote: two shards of data_of([3, 2]), whose captions are caption-KEY."""
    folder = tmp_path / "v2"
    folder.mkdir()
    for path in (Path(__file__).parent / "version_2").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_format_2_is_read(version_2):
    cache, data = Cache(version_2), data_of([3, 2])
    cache.verify()
    assert torch.allclose(cache.vectors(torch.arange(5)), vectors_of(5, 6), atol=0.02)
    assert (cache.manifest.format, cache.manifest.read, cache.manifest.skipped) == (2, {}, 0)
    assert cache.skipped(1).tolist() == [] and cache.find(["key-0004"]).tolist() == [4]
    assert cache.check_data(data) == (0, 2, 0)
    data.texts = [f"caption-{key}" for key in data.keys[:-1]] + ["changed"]
    with pytest.raises(CacheMismatch, match="data shard 00001"):
        cache.check_data(data)
    assert cache.manifest.to_json() == (version_2 / "manifest.json").read_bytes()


def test_format_2_is_mended_in_its_format(version_2):
    """As the message about a damaged shard says: remove it, and embed again."""
    before = {path.name: path.read_bytes() for path in version_2.iterdir()}
    (version_2 / "text-00001.safetensors").unlink()
    source = [{"name": f"{k:05d}.tar", "samples": n, "stamp": "s"} for k, n in enumerate([3, 2])]
    writer = CacheWriter(version_2, 6, "int8", ENCODER, source, "txt", read={"key": "id"})
    data = data_of([3, 2])
    for number in range(2):
        writer.expect(number, data.shard_keys(number), digest_of(data.captions(number)))
    assert writer.missing() == [1]
    rows, keys = encode(vectors_of(5, 6), "int8")[3:], [key_hash(key) for key in data.shard_keys(1)]
    with pytest.raises(CacheError, match="format version 2, in which no sample can be left out"):
        writer.write_shard(1, rows, keys, [0])
    writer.write_shard(1, rows, keys)
    writer.finish()
    assert {path.name: path.read_bytes() for path in version_2.iterdir()} == before


def test_format_2_is_converted_and_merged(version_2, tmp_path):
    from lift_fast.cache.tools import convert, merge

    write(tmp_path / "new", [4], 6)
    merge([Cache(version_2), Cache(tmp_path / "new")], tmp_path / "merged", progress=False)
    merged = Cache(tmp_path / "merged")
    assert merged.manifest.format == 3 and len(merged) == 9
    merged.verify()
    assert [bool(shard.captions) for shard in merged.manifest.shards] == [True, True, False]
    convert(Cache(version_2), tmp_path / "f32", "f32", progress=False)
    assert torch.equal(Cache(tmp_path / "f32").vectors(torch.arange(5)), Cache(version_2).vectors(torch.arange(5)))


def test_rows_left_out_stay_so_in_converted_and_merged_caches(tmp_path):
    from lift_fast.cache.tools import convert, merge, sample

    data = data_of(SIZES)
    cache = made_from(tmp_path / "c", data, ["a", "b", "c", "d"], skipped={0: [1], 3: [0, 1]})
    convert(cache, tmp_path / "f32", "f32", progress=False)
    merge([cache, cache], tmp_path / "merged", progress=False)
    for name, times in (("f32", 1), ("merged", 2)):
        found = Cache(tmp_path / name)
        found.verify()
        assert [found.skipped(k).tolist() for k in range(4 * times)] == times * [[1], [], [], [0, 1]]
        assert [shard.stamp for shard in found.manifest.shards] == times * ["a", "b", "c", "d"]
    data.stamps = ["a", "b", "c", "d"]
    assert Cache(tmp_path / "f32").check_data(data) == (4, 0, 0)
    shown = sample(cache, 9)
    assert [entry["skipped"] for entry in shown["rows"]] == [False, True] + 5 * [False] + 2 * [True]
    assert abs(shown["mean_cosine"]) <= 1


# space on the disk


def test_a_cache_that_does_not_fit_is_told_before_the_first_shard(tmp_path, monkeypatch):
    import shutil

    writer = writer_for(tmp_path / "a" / "c", [1000, 1000], 64)
    needed = writer.size_on_disk()
    usage = shutil._ntuple_diskusage(10**9, 10**9 - needed * 3 // 5, needed * 3 // 5)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CacheError, match=rf"needs \d+ bytes .* for 2 shards, and its disk has {needed * 3 // 5} bytes"):
        writer.check_space()
    assert not (tmp_path / "a").exists()
    writer.write_shard(0, encode(vectors_of(1000, 64), "int8"), range(1000))
    writer.check_space()  # the other shard fits
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 0))
    writer.check_space()  # a file system that does not say
