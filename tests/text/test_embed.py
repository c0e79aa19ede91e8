"""Embedding by several ranks, with kills and restarts and with repeated captions copied: the bytes are the same."""

import os
import random
import re
import shutil
import signal
import tarfile
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.tiny_caches import contents
from support.tiny_sets import keys_of, make_set
from support.tiny_text import TinyEncoder, captions_of, start, work, work_until, write_lines

from lift_fast.cache import Cache, Manifest, encode, key_hash
from lift_fast.data.options import DataOptions
from lift_fast.data.shards import Shards, ShardWriter
from lift_fast.data.sources import open_source
from lift_fast.errors import CacheError, CacheMismatch, ConfigError, DataError
from lift_fast.ops.rows.codecs import CODECS
from lift_fast.ranks import Rank
from lift_fast.text.embed import Estimate, embed, embed_share, estimate, groups, in_bytes

SHARDS, ROWS = 36, 40  # ROWS per shard; a group has 16 shards, so there are three


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    """Captions, a third of them repeats."""
    return write_lines(tmp_path_factory.mktemp("lines") / "c.jsonl", captions_of(SHARDS * ROWS, 1300))


@pytest.fixture(scope="module")
def whole(lines, tmp_path_factory):
    """The files of a cache that one process wrote, never killed."""
    out = tmp_path_factory.mktemp("whole") / "c"
    assert work(lines, out, ROWS).missing == 0
    return contents(out)


def share(source, out, **options):
    return embed_share(source, out, options.pop("encoder", TinyEncoder()), progress=False, **options)


# what is written


@pytest.mark.parametrize("codec", CODECS)
def test_rows_are_their_captions_vectors(tmp_path, codec):
    captions = captions_of(1000, 600)
    source = open_source(write_lines(tmp_path / "c.jsonl", captions), options=DataOptions(shard_rows=130))
    encoder = TinyEncoder(mixed=False)
    done = share(source, tmp_path / "c", encoder=encoder, codec=codec)
    assert (done.computed, done.copied, done.missing) == (len(set(captions)), 1000 - len(set(captions)), 0)
    assert sorted(encoder.encoded) == sorted(set(captions))
    cache = Cache(tmp_path / "c")
    cache.verify()
    want = encode(encoder.encode(captions), codec, cache.rotation)
    got = cache.rows(torch.arange(1000))
    assert torch.equal(got.codes.view(torch.uint8), want.codes.view(torch.uint8))
    assert (got.scales is None) == (want.scales is None) and (
        got.scales is None or torch.equal(got.scales, want.scales)
    )
    assert cache.find(["k7", "k999", "none"]).tolist() == [7, 999, -1]
    assert [entry.source for entry in cache.manifest.shards] == [f"c.jsonl#{k:05d}" for k in range(8)]
    assert cache.manifest.field == "caption" and cache.manifest.encoder == {"name": "tiny"}


def test_shards_without_samples_or_of_repeats_alone(tmp_path):
    for number, captions in enumerate([["a", "b"], [], ["b", "a", "b"], ["c"]]):
        with ShardWriter(tmp_path / f"{number}") as writer:
            for i, caption in enumerate(captions):
                writer.write(f"{number}-{i}", b"", caption, {})
            if not captions:
                writer._tar = tarfile.open(writer._partial / "00000.tar", "w")
    (tmp_path / "data").mkdir()
    for number in range(4):
        shutil.move(tmp_path / f"{number}/00000.tar", tmp_path / f"data/{number:05d}.tar")
    encoder = TinyEncoder(mixed=False)
    cache = embed(Shards(tmp_path / "data"), tmp_path / "c", encoder, codec="f32", progress=False)
    assert encoder.encoded == ["a", "b", "c"]
    assert torch.equal(cache.widen(torch.arange(6)), encoder.encode(["a", "b", "b", "a", "b", "c"]))


def test_groups_cover_every_shard_once():
    rng = random.Random(0)
    for _ in range(200):
        sizes = [rng.choice([0, 1, 300, 5000, 300_000]) for _ in range(rng.randint(0, 100))]
        found = groups(sizes)
        assert [number for group in found for number in group] == list(range(len(sizes)))
        assert all(1 <= len(group) <= 16 for group in found)
        for group in found:  # a group ends as soon as it is large enough
            assert sum(sizes[k] for k in list(group)[:-1]) < 1 << 17
    assert len(groups([10_000] * 64)) == 64 and len(groups([100] * 20)) == 2
    assert len(groups([10_000] * 100_000)) == 100_000 // 14 + 1


# ranks


@pytest.mark.parametrize(("world", "shards"), [(2, [16, 20]), (3, [16, 4, 16])])
def test_ranks_write_the_same_bytes(tmp_path, lines, whole, world, shards):
    """Rank 0 finishes last."""
    results = [work(lines, tmp_path / "c", ROWS, rank, world) for rank in (*range(1, world), 0)]
    assert [result.missing > 0 for result in results] == [True] * (world - 1) + [False]
    assert [result.computed + result.copied for result in results] == [count * ROWS for count in shards]
    assert contents(tmp_path / "c") == whole


def test_ranks_at_the_same_time(tmp_path, lines, whole):
    processes = [start(work, lines, tmp_path / "c", ROWS, rank, 3) for rank in range(3)]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert contents(tmp_path / "c") == whole


def test_more_ranks_than_work(tmp_path):
    path = write_lines(tmp_path / "c.jsonl", ["a", "b"])
    assert work(path, tmp_path / "c", 10, 1, 2).missing == 1
    assert work(path, tmp_path / "c", 10, 0, 2).missing == 0
    assert work(path, tmp_path / "c", 10, 1, 2).missing == 0


def test_the_rank_is_torchrun_s(monkeypatch):
    assert Rank.from_environment() == Rank(0, 1, 0)
    for name, value in (("RANK", "5"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert Rank.from_environment() == Rank(5, 8, 1) and str(Rank(5, 8, 1)) == "rank 5 of 8"
    monkeypatch.setenv("RANK", "8")
    with pytest.raises(ConfigError, match="RANK 8 of WORLD_SIZE 8"):
        Rank.from_environment()
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(ConfigError, match="must be whole numbers, as torchrun sets them"):
        Rank.from_environment()


# stopped and restarted


def unfinished(folder, files, names):
    """Writes the cache of a run that was stopped when it had written the shards `names`."""
    folder.mkdir()
    for name in names:
        (folder / name).write_bytes(files[name])
    partial = folder / "partial.json"
    partial.write_bytes(files["manifest.json"])
    manifest = Manifest.load(partial)
    shards = tuple(replace(shard, sha256="", captions="") for shard in manifest.shards)
    partial.write_bytes(replace(manifest, shards=shards).to_json())


@pytest.mark.parametrize("seed", range(4))
def test_any_shards_that_are_there_lead_to_the_same_bytes(tmp_path, lines, whole, seed):
    rng = random.Random(seed)
    names = [name for name in whole if name.startswith("text")]
    present = rng.sample(names, rng.randint(0, len(names)))
    unfinished(tmp_path / "c", whole, present)
    world = rng.randint(1, 3)
    results = [work(lines, tmp_path / "c", ROWS, rank, world) for rank in rng.sample(range(world), world)]
    assert results[-1].missing == 0
    assert contents(tmp_path / "c") == whole


def test_what_is_there_is_not_embedded_again(tmp_path, lines, whole):
    source, encoder = open_source(lines, options=DataOptions(shard_rows=ROWS)), TinyEncoder()
    names = [name for name in whole if name.startswith("text")]
    unfinished(tmp_path / "c", whole, names[:3] + names[4:])
    captions = [source.read(number)[1] for number in range(4)]
    new = set(captions[3]) - {caption for shard in captions[:3] for caption in shard}
    done = share(source, tmp_path / "c", encoder=encoder)
    assert set(encoder.encoded) == new and (done.computed, done.copied) == (len(new), ROWS - len(new))
    before = contents(tmp_path / "c")
    assert before == whole
    again = share(source, tmp_path / "c", encoder=encoder)
    assert (again.computed, again.copied, again.missing) == (0, 0, 0) and contents(tmp_path / "c") == whole


def test_a_damaged_shard_is_not_copied_from(tmp_path, lines, whole):
    names = [name for name in whole if name.startswith("text")]
    broken = bytearray(whole[names[0]])
    broken[-1] ^= 1
    unfinished(tmp_path / "c", {**whole, names[0]: bytes(broken)}, names[:1])
    with pytest.raises(CacheError, match="text-00000.safetensors is damaged: its checksum"):
        work(lines, tmp_path / "c", ROWS)
    found = contents(tmp_path / "c")
    assert "manifest.json" not in found and len(found) < SHARDS
    assert all(found[name] == whole[name] for name in found if name not in ("partial.json", names[0]))


@pytest.mark.parametrize("step", [0, 1, 2, 29, 72, 73, 74, 75])
def test_killed_around_a_rename(tmp_path, lines, whole, step):
    """The rename of partial.json, of the first shards, of the last shard, or of manifest.json."""
    process = start(work_until, step, lines, tmp_path / "c", ROWS)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    names = {re.sub(r"\.[0-9a-f]{24}\.part$", "", path.name) for path in (tmp_path / "c").iterdir()}
    assert len(names) == step // 2 + 1
    assert work(lines, tmp_path / "c", ROWS).missing == 0
    assert contents(tmp_path / "c") == whole


def run_killed(lines, out, world, rng):
    """Starts `world` ranks and kills all of them at a random moment, also shortly before or after they write; returns
    how many had ended."""
    files, seconds = rng.randint(-1, SHARDS), rng.uniform(0, 0.01)
    processes = [start(work, lines, out, ROWS, rank, world) for rank in range(world)]
    while sum(1 for _ in out.glob("*")) <= files and any(process.is_alive() for process in processes):
        time.sleep(0.0005)
    time.sleep(seconds)
    for process in processes:
        process.kill()
    for process in processes:
        process.join()
    assert {process.exitcode for process in processes} <= {0, -signal.SIGKILL}
    return sum(process.exitcode == 0 for process in processes)


def run(lines, out, world):
    processes = [start(work, lines, out, ROWS, rank, world) for rank in range(world)]
    for process in processes:
        process.join()
        assert process.exitcode == 0


@pytest.mark.parametrize("world", [1, 2])
def test_a_few_kills_at_random_moments(tmp_path, lines, whole, world):
    rng = random.Random(world)
    for _ in range(3):
        run_killed(lines, tmp_path / "c", world, rng)
    run(lines, tmp_path / "c", world)
    assert contents(tmp_path / "c") == whole


@pytest.mark.campaign
@pytest.mark.parametrize("world", [1, 2])
def test_forty_kills(tmp_path, lines, whole, tally, world):
    """Every other run is killed a second time; then the same command runs to completion."""
    rng = random.Random(10 + world)
    states = []
    for turn in range(40):
        out = tmp_path / f"{turn}"
        for _ in range(turn % 2 + 1):
            ended = run_killed(lines, out, world, rng)
            tally("kill", "right answer", world - ended)
        names = [path.name for path in out.iterdir()] if out.exists() else []
        parts = sum(name.endswith(".part") for name in names)
        states.append((len([name for name in names if name.endswith("tensors")]), parts, ended))
        run(lines, out, world)
        assert contents(out) == whole
        shutil.rmtree(out)
    print(f"\n{world} ranks; shards, parts, ranks that had ended at each last kill: {states}")
    assert sum(0 < shards < SHARDS for shards, _, _ in states) >= 20


# refused


def test_data_that_changed_is_caught_before_a_byte_is_written(tmp_path):
    """A dropped sample, two swapped samples, or a changed caption with an unchanged key."""
    rows = [(f"k{i}", f"caption {i}") for i in range(10)]

    def data(rows):
        shutil.rmtree(tmp_path / "data", ignore_errors=True)
        with ShardWriter(tmp_path / "data", 5) as writer:
            for key, caption in rows:
                writer.write(key, b"", caption, {})
        return Shards(tmp_path / "data")

    embed(data(rows), tmp_path / "c", TinyEncoder(), progress=False)
    for lost in ((), ("text-00001.safetensors",)):
        for name in lost:
            (tmp_path / "c" / name).unlink()
        before = contents(tmp_path / "c")
        for changed, words in [
            (rows[:2] + rows[3:], "data shard 1 is 00001.tar with 5 samples, not 00001.tar with 4"),
            (rows[:1] + [rows[2], rows[1]] + rows[3:], r"first difference at row 1, key 'k2'"),
            (rows[:3] + [("k3", "other")] + rows[4:], "the captions of 00000.tar are different"),
        ]:
            with pytest.raises(CacheMismatch, match=words):
                embed(data(changed), tmp_path / "c", TinyEncoder(), progress=False)
            assert contents(tmp_path / "c") == before
    embed(data(rows), tmp_path / "c", TinyEncoder(), progress=False).check_keys(data(rows))


def test_bad_data_in_the_last_shard_is_told_before_a_byte_is_written(tmp_path):
    path = write_lines(tmp_path / "c.jsonl", [*captions_of(2000, 2000), " "])
    with pytest.raises(DataError, match="line 2001, key 'k2000' has no caption"):
        work(path, tmp_path / "c", 100)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("late", "words"),
    [(0, "c.jsonl#00001 of .* changed while it was embedded"), (1, "c.jsonl has changed while it was read")],
)
def test_captions_that_change_while_they_are_embedded(tmp_path, late, words):
    """Also a file whose size and time of change stay the same."""
    path = write_lines(tmp_path / "c.jsonl", ["one", "two"])

    class Slow(TinyEncoder):
        def encode(self, *arguments):
            status = path.stat()
            write_lines(path, ["one", "too"])
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + late))
            return super().encode(*arguments)

    with pytest.raises(DataError, match=words):
        share(open_source(path, options=DataOptions(shard_rows=1)), tmp_path / "c", encoder=Slow())


def test_another_encoder_codec_or_cut_is_refused(tmp_path):
    path = write_lines(tmp_path / "c.jsonl", ["one", "two", "three"])
    work(path, tmp_path / "c", 2)
    with pytest.raises(CacheMismatch, match="codec is 'int8', not 'bf16'"):
        work(path, tmp_path / "c", 2, codec="bf16")
    with pytest.raises(CacheMismatch, match="data shard 0 is c.jsonl#00000 with 2 samples, not c.jsonl#00000 with 1"):
        work(path, tmp_path / "c", 1)
    other = TinyEncoder()
    other.spec.name = "other"
    with pytest.raises(CacheMismatch, match="encoder name is 'tiny', not 'other'"):
        share(open_source(path, options=DataOptions(shard_rows=2)), tmp_path / "c", encoder=other)
    with pytest.raises(CacheError, match="no codec 'int3'"):
        work(path, tmp_path / "d", 2, codec="int3")
    assert not (tmp_path / "d").exists()


# estimates and progress


@pytest.mark.parametrize("codec", ["int8", "int2r", "bf16"])
def test_the_estimate_s_size_is_the_size(tmp_path, codec):
    source, encoder = (
        open_source(write_lines(tmp_path / "c.jsonl", captions_of(700, 300)), options=DataOptions(shard_rows=99)),
        TinyEncoder(),
    )
    found = estimate(source, tmp_path / "c", encoder, codec=codec, worlds=(1, 4))
    assert not (tmp_path / "c").exists()
    assert (found.rows, found.sampled) == (700, 256) and len(encoder.encoded) == 512
    assert found.seconds[1] == pytest.approx(700 / found.captions_per_s)
    assert found.seconds[4] == found.seconds[1]  # one group
    share(source, tmp_path / "c", codec=codec)
    assert sum(map(len, contents(tmp_path / "c").values())) == found.bytes
    again = estimate(source, tmp_path / "c", encoder, codec=codec)
    assert again.bytes == found.bytes and isinstance(again, Estimate)


def test_the_estimate_shares_out_groups(tmp_path, lines):
    found = estimate(
        open_source(lines, options=DataOptions(shard_rows=ROWS)), tmp_path / "c", TinyEncoder(), worlds=(1, 2, 3, 50)
    )
    per = found.captions_per_s
    assert {world: round(seconds * per) for world, seconds in found.seconds.items()} == {
        1: 36 * ROWS, 2: 20 * ROWS, 3: 16 * ROWS, 50: 16 * ROWS,
    }  # fmt: skip


def test_bytes_are_told_in_three_figures():
    formatted = [in_bytes(count) for count in (0, 999, 1000, 3_912_345_678, 5e15)]
    assert formatted == ["0 B", "999 B", "1 KB", "3.91 GB", "5,000 TB"]


def test_progress_tells_rate_time_and_size_left(tmp_path, capfd):
    path = write_lines(tmp_path / "c.jsonl", captions_of(300, 200))
    embed_share(open_source(path, options=DataOptions(shard_rows=100)), tmp_path / "c", TinyEncoder(), rank=Rank(0, 2))
    shown = capfd.readouterr().err
    assert "embed caption (rank 0 of 2)" in shown and "captions/s" in shown and "to write" in shown and "0 B" in shown


def test_keys_are_hashed_as_the_reader_looks_for_them(tmp_path):
    data = make_set(tmp_path / "data", 6, per_shard=3)
    cache = embed(data, tmp_path / "c", TinyEncoder(), progress=False)
    keys = np.concatenate([cache.shard(number).keys.numpy() for number in range(2)])
    assert keys.tolist() == [key_hash(key) for key in keys_of(data)]


@pytest.mark.parametrize(("codec", "low", "high"), [("f32", 1, 1), ("int8", 0.9999, 1), ("int2r", 0.9, 0.98)])
def test_the_cosine_that_is_told_is_the_codecs(tmp_path, lines, codec, low, high):
    first, again = (
        embed_share(open_source(lines), tmp_path / "c", TinyEncoder(), codec=codec, progress=False) for _ in range(2)
    )
    assert low - 1e-6 <= first.cosine <= high + 1e-6
    assert again.cosine is None and again.computed == 0
