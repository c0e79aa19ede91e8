"""Writing a cache: refused, killed, on a full disk or by several writers, it is complete or names what is missing."""

import errno
import json
import os
import resource
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from support.tiny_caches import ENCODER, contents, data_of, vectors_of, write, writer_for

from lift_fast.cache import Cache, CacheWriter, encode, key_hash
from lift_fast.errors import CacheError, CacheMismatch
from lift_fast.files import _tagged, written_whole
from lift_fast.ops.rows.codecs import CODECS
from lift_fast.ops.rows.table import key_hashes


def write_shard(writer, number, sizes, dim):
    """Shard `number` of write(folder, sizes, dim)."""
    starts = np.cumsum([0, *sizes])
    part = slice(starts[number], starts[number + 1])
    keys = [key_hash(key) for key in data_of(sizes).keys[part]]
    return writer.write_shard(number, encode(vectors_of(sum(sizes), dim)[part], "int8"), keys)


def test_nothing_is_written_before_it_is_asked_what_is_missing(tmp_path):
    writer = writer_for(tmp_path / "c", [3, 2], 4)
    writer.expect(0, ["a", "b", "c"], "aa")
    assert not (tmp_path / "c").exists()
    assert writer.missing() == [0, 1]
    assert sorted(contents(tmp_path / "c")) == ["partial.json"]


def test_a_finished_cache_is_left_as_it_is(tmp_path):
    write(tmp_path / "c", [3, 2], 4)
    before = contents(tmp_path / "c")
    again = writer_for(tmp_path / "c", [3, 2], 4)
    assert again.missing() == []
    again.finish()
    assert contents(tmp_path / "c") == before


@pytest.mark.parametrize("finish", [True, False])
def test_a_folder_of_another_cache_is_refused(tmp_path, finish):
    write(tmp_path / "c", [3, 2], 4, finish=finish, shards=None if finish else [0])
    before = contents(tmp_path / "c")
    for change, words in [
        ({"dim": 5}, "dim is 4, not 5"),
        ({"field": "long"}, "field is 'txt', not 'long'"),
        ({"codec": "bf16"}, "codec is 'int8', not 'bf16'"),
        ({"codec": "int4r"}, "rotation is None, not {'kind': 'hadamard', 'seed': 0}"),
        ({"encoder": {**ENCODER, "pooling": "last"}}, "encoder pooling is 'mean', not 'last'"),
        ({"sizes": [3, 2, 1]}, "the number of data shards is 2, not 3"),
        ({"sizes": [2, 3]}, "data shard 0 is 00000.tar with 3 samples, not 00000.tar with 2"),
    ]:
        with pytest.raises(CacheMismatch, match=words):
            writer_for(tmp_path / "c", **{"sizes": [3, 2], "dim": 4, **change})
    assert contents(tmp_path / "c") == before


@pytest.mark.parametrize("finish", [True, False])
def test_other_captions_under_the_same_keys_are_refused(tmp_path, finish):
    def writer(*captions):
        source = [{"name": f"{k}.tar", "samples": 2, "captions": c} for k, c in enumerate(captions)]
        return CacheWriter(tmp_path / "c", 4, "int8", ENCODER, source, "txt")

    first = writer("aa", "bb")
    for shard in (0, 1) if finish else (0,):
        first.write_shard(shard, encode(vectors_of(2, 4), "int8"), [1, 2])
    if finish:
        first.finish()
    before = contents(tmp_path / "c")
    with pytest.raises(CacheMismatch, match="the captions of 0.tar are different"):
        writer("cc", "bb")
    if finish:
        with pytest.raises(CacheMismatch, match="the captions of 1.tar are different"):
            writer("aa", "cc")
    else:  # captions may be corrected until their shard is written
        assert writer("aa", "cc").missing() == [1]
    # A writer without digests of the captions finds no difference, and the digests on disk stay.
    assert writer("", "").missing() == writer("aa", "bb").missing() == ([] if finish else [1])
    assert contents(tmp_path / "c") == before


@pytest.mark.parametrize("finish", [True, False])
def test_what_is_expected_is_compared_with_what_is_there(tmp_path, finish):
    sizes = [3, 2]
    keys = data_of(sizes).keys
    for number, captions in ((0, "aa"), (1, "bb")) if finish else ((0, "aa"),):
        writer = writer_for(tmp_path / "c", sizes, 4)
        writer.expect(number, keys[:3] if number == 0 else keys[3:], captions)
        write_shard(writer, number, sizes, 4)
    if finish:
        writer.finish()
    before = contents(tmp_path / "c")

    def refused(words, number, keys, captions):
        with pytest.raises(CacheMismatch, match=words):
            writer_for(tmp_path / "c", sizes, 4).expect(number, keys, captions)

    refused("the captions of 00000.tar are different", 0, keys[:3], "cc")
    swapped = [keys[0], keys[2], keys[1]]
    refused(r"other samples than 00000.tar \(first difference at row 1, key 'key-0002'\)", 0, swapped, "aa")
    with pytest.raises(ValueError, match="00000.tar has 3 samples, not 2 keys"):
        writer_for(tmp_path / "c", sizes, 4).expect(0, keys[:2], "aa")
    writer_for(tmp_path / "c", sizes, 4).expect(0, keys[:3], "aa")
    writer_for(tmp_path / "c", sizes, 4).expect(0, keys[:3], "")
    assert contents(tmp_path / "c") == before


def test_captions_are_claimed_only_by_the_shard_that_was_made_from_them(tmp_path):
    write(tmp_path / "c", [2, 3], 4, shards=[0], finish=False)
    source = [{"name": f"{k:05d}.tar", "samples": n, "captions": "aa"} for k, n in enumerate([2, 3])]
    writer = CacheWriter(tmp_path / "c", 4, "int8", ENCODER, source, "txt")
    writer.write_shard(1, encode(vectors_of(3, 4), "int8"), [1, 2, 3])
    writer.finish()
    manifest = json.loads((tmp_path / "c" / "manifest.json").read_text())
    assert [shard["captions"] for shard in manifest["shards"]] == ["", "aa"]


def test_shards_without_a_manifest_are_not_built_upon(tmp_path):
    write(tmp_path / "c", [3, 2], 4)
    (tmp_path / "c" / "manifest.json").unlink()
    with pytest.raises(CacheError, match="has shards and no manifest"):
        writer_for(tmp_path / "c", [3, 2], 4)


def test_what_a_killed_run_left_is_looked_at(tmp_path):
    write(tmp_path / "c", [3, 2], 4, shards=[0], finish=False)
    path = tmp_path / "c" / "text-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CacheError, match="text-00000.safetensors is damaged"):
        write(tmp_path / "c", [3, 2], 4)
    assert not (tmp_path / "c" / "manifest.json").exists()


def test_a_shard_of_other_rows_does_not_pass(tmp_path):
    write(tmp_path / "c", [3, 2], 4, shards=[0], finish=False)
    write(tmp_path / "other", [3, 3], 4, shards=[1], finish=False)
    os.rename(tmp_path / "other" / "text-00001.safetensors", tmp_path / "c" / "text-00001.safetensors")
    with pytest.raises(CacheMismatch, match="has 3 rows and 00001.tar has 2 samples"):
        writer_for(tmp_path / "c", [3, 2], 4).finish()


def test_rows_of_an_earlier_run_are_checked_before_they_are_copied(tmp_path):
    write(tmp_path / "c", [3, 2], 4, shards=[0], finish=False)
    rows = encode(vectors_of(5, 4), "int8")[:3]
    there = writer_for(tmp_path / "c", [3, 2], 4).written(0, torch.arange(3))
    assert there.codes.equal(rows.codes) and there.scales.equal(rows.scales)
    path = tmp_path / "c" / "text-00000.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CacheError, match="text-00000.safetensors is damaged: its checksum"):
        writer_for(tmp_path / "c", [3, 2], 4).written(0, torch.arange(3))
    with pytest.raises(CacheError, match="text-00001.safetensors"):
        writer_for(tmp_path / "c", [3, 2], 4).written(1, torch.arange(2))


@pytest.mark.parametrize("codec", CODECS)
def test_the_size_is_known_before(tmp_path, codec):
    sizes = [3, 0, 17]
    writer = writer_for(tmp_path / "c", sizes, 20, codec=codec)
    for number, size in enumerate(sizes):
        writer.expect(number, [f"{i}" for i in range(size)], "0" * 32)
    total, first = writer.size_on_disk(), writer.size_on_disk([0])
    write_all = writer.missing()
    vectors, rotation = vectors_of(20, 20), writer._manifest.rotated_by()
    for number in write_all:
        writer.write_shard(number, encode(vectors[: sizes[number]], codec, rotation), range(sizes[number]))
    writer.finish()
    found = contents(tmp_path / "c")
    assert sum(map(len, found.values())) == total and len(found["text-00000.safetensors"]) == first


# several writers


def test_two_writers_share_the_work(tmp_path):
    sizes = [3, 2, 4, 1]
    write(tmp_path / "whole", sizes, 4)
    one, two = (writer_for(tmp_path / "c", sizes, 4) for _ in range(2))
    for writer in (one, two):
        assert writer.missing() == [0, 1, 2, 3]
    for number in (0, 1):
        write_shard(one, number, sizes, 4)
    with pytest.raises(CacheError, match=r"lacks 2 of 4 shards: \[2, 3\]"):
        one.finish()
    for number in (2, 3):
        write_shard(two, number, sizes, 4)
    two.finish()
    assert contents(tmp_path / "c") == contents(tmp_path / "whole")
    one.finish()  # the other writer finishes too, with the same bytes
    assert contents(tmp_path / "c") == contents(tmp_path / "whole")


def test_a_writer_that_looks_while_another_begins_or_finishes(tmp_path, monkeypatch):
    """Between any two of its checks of the folder, another writer may have written more."""
    sizes = [3]
    write(tmp_path / "whole", sizes, 4)
    exists = Path.exists
    for looks in range(1, 7):
        folder = tmp_path / str(looks)
        other, count = writer_for(folder, sizes, 4), [0]

        def step(path, folder=folder, other=other, count=count, looks=looks):
            if path.parent == folder and path.name.endswith(".json"):
                count[0] += 1
                if count[0] == looks:
                    count[0] += 100
                    other.missing()
                    write_shard(other, 0, sizes, 4)
                    other.finish()
            return exists(path)

        monkeypatch.setattr(Path, "exists", step)
        late = writer_for(folder, sizes, 4)
        if late.missing():
            write_shard(late, 0, sizes, 4)
        late.finish()
        monkeypatch.undo()
        assert count[0] > 100 or looks == 6
        assert contents(folder) == contents(tmp_path / "whole")


def test_a_forgotten_process_at_the_same_shard_does_no_harm(tmp_path, monkeypatch):
    """A killed torchrun may leave a process running. This one is about to name its shard when another has written it
    and finishes the cache: it is not disturbed either, and says that the shard is the other's."""
    sizes = [3, 2]
    write(tmp_path / "whole", sizes, 4)
    forgotten, now = (writer_for(tmp_path / "c", sizes, 4) for _ in range(2))
    forgotten.missing()
    link, done, made = os.link, [], []

    def late(source, target):
        done.append(source)
        if len(done) == 1:
            made.extend(write_shard(now, number, sizes, 4) for number in now.missing())
            now.finish()
        link(source, target)

    monkeypatch.setattr(os, "link", late)
    assert write_shard(forgotten, 0, sizes, 4) is False and made == [True, True]
    assert len(set(done)) == 3  # three different parts
    assert forgotten.missing() == []
    forgotten.finish()
    assert contents(tmp_path / "c") == contents(tmp_path / "whole")


@pytest.mark.parametrize("links", [True, False])
def test_a_shard_that_another_process_has_written_stays(tmp_path, monkeypatch, links):
    """Its bytes may differ where an encoder rounds differently. The manifest has the checksum of the one that is there,
    whichever process finishes last."""
    slow, quick = (writer_for(tmp_path / "c", [3, 2], 4) for _ in range(2))
    if not links:
        monkeypatch.setattr(os, "link", refused)
    for writer in (slow, quick):
        writer.missing()
        writer.expect(0, ["key-0000", "key-0001", "key-0002"], "c" * 32)
    assert write_shard(quick, 0, [3, 2], 4) and write_shard(slow, 1, [3, 2], 4)
    rows = encode(vectors_of(3, 4, seed=1), "int8")
    assert slow.write_shard(0, rows, key_hashes(["key-0000", "key-0001", "key-0002"]).tolist()) is False
    assert not torch.equal(slow.written(0, torch.arange(3)).codes, rows.codes)
    for writer in (quick, slow):
        writer.finish()
        Cache(tmp_path / "c").verify()


def refused(*_):
    raise OSError(errno.EPERM, os.strerror(errno.EPERM))


def test_a_shard_of_other_samples_that_another_process_has_written(tmp_path):
    slow, quick, other = (writer_for(tmp_path / "c", [3, 2], 4) for _ in range(3))
    for writer, captions in ((slow, "a"), (quick, "a"), (other, "b")):
        writer.missing()
        writer.expect(0, ["key-0000", "key-0001", "key-0002"], captions * 32)
    write_shard(quick, 0, [3, 2], 4)
    rows = encode(vectors_of(3, 4), "int8")
    with pytest.raises(CacheMismatch, match="another process has written .* from other samples than 00000.tar .*row 1"):
        slow.write_shard(0, rows, key_hashes(["key-0000", "other", "key-0002"]).tolist())
    with pytest.raises(CacheMismatch, match="the captions of 00000.tar are different"):
        write_shard(other, 0, [3, 2], 4)


@pytest.mark.parametrize("name", ["partial.json", "manifest.json"])
def test_a_writer_whose_unfinished_file_another_tidied_away(tmp_path, monkeypatch, name):
    sizes = [3]
    write(tmp_path / "whole", sizes, 4)
    slow, quick = (writer_for(tmp_path / "c", sizes, 4) for _ in range(2))
    if name == "manifest.json":
        assert slow.missing() == [0]
    replace, done = os.replace, []

    def late(source, target):
        if Path(target).name == name and not done:
            done.append(name)
            if quick.missing():
                write_shard(quick, 0, sizes, 4)
            quick.finish()
        replace(source, target)

    if name == "manifest.json":
        write_shard(slow, 0, sizes, 4)
    monkeypatch.setattr(os, "replace", late)
    assert slow.missing() == []
    slow.finish()
    assert done and contents(tmp_path / "c") == contents(tmp_path / "whole")


# killed (test_embed.py kills at random moments)


def test_a_kill_between_the_manifest_and_the_tidying(tmp_path):
    write(tmp_path / "c", [3, 2], 4)
    before = contents(tmp_path / "c")
    (tmp_path / "c" / "partial.json").write_bytes(b"{}")
    (tmp_path / "c" / _tagged("text-00001.safetensors")).write_bytes(b"half a sh")
    Cache(tmp_path / "c").verify()
    assert writer_for(tmp_path / "c", [3, 2], 4).missing() == []
    assert contents(tmp_path / "c") == before


def test_a_part_file_left_by_a_kill_is_cleaned(tmp_path):
    write(tmp_path / "c", [3, 2], 4, shards=[0], finish=False)
    for name in ("text-00001.safetensors", "text-00000.safetensors", "manifest.json"):
        (tmp_path / "c" / _tagged(name)).write_bytes(b"half a ")
    writer = writer_for(tmp_path / "c", [3, 2], 4)
    assert len(list((tmp_path / "c").glob("*.part"))) == 3
    assert writer.missing() == [1]  # removes them before it writes, so that kills do not fill the disk
    assert not list((tmp_path / "c").glob("*.part"))
    write_shard(writer, 1, [3, 2], 4)
    writer.finish()
    write(tmp_path / "whole", [3, 2], 4)
    assert contents(tmp_path / "c") == contents(tmp_path / "whole")


def test_parts_of_running_writers_and_other_files_stay(tmp_path):
    """The old name of a part, by which none knows whether its process runs, too."""
    write(tmp_path / "whole", [3, 2], 4)
    (tmp_path / "c").mkdir()
    with pytest.raises(FileExistsError), written_whole(tmp_path / "c" / "text-00001.safetensors", False) as part:
        part.write(b"half a ")
        (tmp_path / "c" / "text-00000.safetensors.7-ab.part").write_bytes(b"old")
        write(tmp_path / "c", [3, 2], 4)
        found = contents(tmp_path / "c")
        assert found.pop(Path(part.name).name) is not None
        assert found.pop("text-00000.safetensors.7-ab.part") == b"old"
        assert found == contents(tmp_path / "whole")


# a full disk


def assert_full_then_continues(folder, sizes, words, free_space):
    with pytest.raises(CacheError, match=words) as caught:
        write(folder, sizes, 64)
    assert "\n" not in str(caught.value)
    left = contents(folder)
    assert "manifest.json" not in left and not [name for name in left if name.endswith(".part")]
    free_space()
    write(folder, sizes, 64)
    cache = Cache(folder)
    cache.verify()
    cache.check_keys(data_of(sizes))


def test_a_full_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "none", disk], capture_output=True).returncode:
        pytest.skip("no permission to mount a small disk; test_a_limit_on_file_size covers the error")

    def more():
        subprocess.run(["mount", "-o", "remount,size=4m", disk], check=True)

    try:
        words = r"cannot write .*text-0000[12].safetensors: the disk is full. [12] of 4 shards are complete"
        assert_full_then_continues(disk / "c", [600] * 4, words, more)
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


def test_a_limit_on_file_size(tmp_path):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)

    def lift():
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)

    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))
    try:
        words = r"text-00001.safetensors: the file would be larger .* 1 of 2 shards are complete"
        assert_full_then_continues(tmp_path / "c", [100, 600], words, lift)
    finally:
        lift()


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(CacheError, match="cannot write .*partial.json: Not a directory"):
        writer_for(tmp_path / "file" / "c", [3], 4).missing()
