"""What both pipelines must do alike: every sample once, its caption's row, resuming, damaged data. See test_order.py
and test_loading.py for the parts, test_dali.py for what is DALI's own."""

import io
import json
import os
import random
import tarfile
from collections import Counter

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from support import complete  # noqa: F401
from support.hostile import hostile
from support.tiny_caches import ENCODER

from lift_fast.cache import Cache, CacheWriter, encode, key_hash
from lift_fast.data import dali
from lift_fast.data.host import HostPipeline
from lift_fast.data.loading import Loading
from lift_fast.data.samples import BadSample, Collection
from lift_fast.data.shards import Shards
from lift_fast.data.skipped import merged
from lift_fast.errors import DataError
from lift_fast.text.cached import CachedText

with_dali = pytest.mark.skipif(not dali.installed(), reason="DALI is not installed")
PIPELINES = [
    pytest.param(HostPipeline, id="host"),
    pytest.param(dali.DaliPipeline, id="dali", marks=with_dali),
]
BASE, STEP = 25, 10  # a picture's colour tells its number: three digits of base 25, ten levels apart


def digits(number):
    number = np.asarray(number)
    return np.stack([number // BASE**k % BASE for k in range(3)], axis=-1)


def numbered_picture(number, size=(20, 16)):
    out = io.BytesIO()
    Image.new("RGB", size, tuple((STEP * digits(number) + 5).tolist())).save(out, "JPEG", quality=95, subsampling=0)
    return out.getvalue()


def number_of(pixels):
    """uint8 [n, size, size, 3] -> the number that each picture tells."""
    found = torch.round((pixels.double().mean(dim=(1, 2)) - 5) / STEP)
    assert (pixels.double() - (STEP * found + 5)[:, None, None]).abs().max() < STEP / 2
    return (found.long() * torch.tensor([1, BASE, BASE**2])).sum(dim=1)


def write_tar(path, samples):
    """samples: of each its key and its picture."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for key, picture in samples:
            for suffix, content in (("jpg", picture), ("txt", f"caption of {key}".encode())):
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def key_of_number(number):
    return f"{number * 7919 % 100_003:09d}"


@pytest.fixture(scope="module")
def numbered(tmp_path_factory):
    """(10 000 samples in 7 shards, their cache: row r holds the digits of r)."""
    folder = tmp_path_factory.mktemp("numbered")
    (folder / "data").mkdir()
    for shard, numbers in enumerate(np.array_split(np.arange(10_000), 7)):
        write_tar(
            folder / "data" / f"{shard:05d}.tar", [(key_of_number(n), numbered_picture(n)) for n in numbers.tolist()]
        )
    data = Shards(folder / "data")
    sources = [{"name": name, "samples": size} for name, size in zip(data.names, data.shard_sizes, strict=True)]
    writer = CacheWriter(folder / "cache", 3, "f32", ENCODER, sources, "txt", None)
    start = 0
    for number, size in enumerate(data.shard_sizes):
        vectors = torch.tensor(digits(np.arange(start, start + size)), dtype=torch.float32)
        hashes = [key_hash(key_of_number(n)) for n in range(start, start + size)]
        writer.write_shard(number, encode(vectors, "f32", None), hashes)
        start += size
    writer.finish()
    return data, Cache(folder / "cache")


def take(pipeline, count):
    batches = iter(pipeline)
    taken = [next(batches) for _ in range(count)]
    batches.close()
    return taken


@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize("world", [1, 2, 3])
def test_two_epochs_of_every_sample_and_its_caption(numbered, pipeline, world):
    """10 000 samples: each exactly once an epoch but for the remainder of a global batch, pixels, row, key and cached
    text all of the same sample."""
    data, cache = numbered
    collection = Collection([data])
    text = CachedText([cache], collection)
    own, cached = (torch.cat([of(k) for k in range(7)]) for of in (data.shard_hashes, lambda k: cache.shard(k).keys))
    size = 48
    batches = 10_000 // (size * world)
    seen = [[], []]
    for rank in range(world):
        loading = Loading(batch_size=size, image_size=8, rank=rank, world=world, seed=3)
        for number, batch in enumerate(take(pipeline(collection, loading), 2 * batches)):
            assert torch.equal(number_of(batch.pixels), batch.rows)
            assert torch.equal(own[batch.rows], cached[batch.rows])
            keys = [key_of_number(row) for row in batch.rows.tolist()]
            assert torch.equal(cache.find(keys), batch.rows)
            wanted = torch.tensor(digits(batch.rows.numpy()), dtype=torch.float32)
            assert torch.equal(text.rows(batch.rows).widen(torch.float32), wanted)
            seen[number // batches].append(batch.rows)
    for epoch in seen:
        rows = torch.cat(epoch)
        assert len(rows) == len(rows.unique()) == 10_000 - 10_000 % (size * world)


@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize("shuffle_buffer", [None, 700])
def test_stopped_at_a_random_step_it_goes_on_with_the_rest(numbered, pipeline, shuffle_buffer):
    data = Collection([numbered[0]])
    for rank in range(2):
        loading = Loading(
            batch_size=300, image_size=8, rank=rank, world=2, shuffle_buffer=shuffle_buffer, ahead=rank, threads=3
        )
        whole = take(pipeline(data, loading), 36)  # 16 an epoch
        stop = random.randrange(1, 36)
        first = pipeline(data, loading)
        got = take(first, stop)
        second = pipeline(data, loading)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        got += take(second, 36 - stop)
        assert all(
            torch.equal(a.rows, b.rows) and torch.equal(a.pixels, b.pixels) for a, b in zip(got, whole, strict=True)
        )


@with_dali
@pytest.mark.parametrize("options", [{}, {"flip": 0.5, "colour": 0.4}, {"min_crop_area": 0.08}])
def test_both_give_the_same_samples_and_crops(tmp_path, options):
    """Pictures with detail, of many sizes: the loaders differ by rounding alone."""
    rng = np.random.default_rng(0)
    samples = []
    for number in range(60):
        coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        picture = coarse.resize(tuple(rng.integers(40, 90, 2).tolist()), Image.Resampling.BICUBIC)
        out = io.BytesIO()
        picture.save(out, "JPEG" if number % 3 else "PNG", **({"quality": 95} if number % 3 else {}))
        samples.append((f"{number:04d}", out.getvalue()))
    write_tar(tmp_path / "0.tar", samples)
    data = Collection([Shards(tmp_path)])
    loading = Loading(batch_size=13, image_size=32, **options)
    pairs = zip(take(HostPipeline(data, loading), 9), take(dali.DaliPipeline(data, loading), 9), strict=True)
    for host, other in pairs:
        assert torch.equal(host.rows, other.rows)
        off = (host.pixels.int() - other.pixels.int()).abs()
        assert off.double().mean() < 1


@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float16, torch.bfloat16])
def test_dtypes_and_layouts(numbered, pipeline, dtype):
    data = Collection([numbered[0]])
    plain = take(HostPipeline(data, Loading(batch_size=5, image_size=9)), 1)[0].pixels
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    wanted = plain.float() if dtype == torch.uint8 else (plain / 255 - mean) / std
    for layout in ("NHWC", "NCHW"):
        loading = Loading(batch_size=5, image_size=9, dtype=dtype, layout=layout)
        pixels = take(pipeline(data, loading), 1)[0].pixels
        assert pixels.dtype == dtype and pixels.is_contiguous()
        assert pixels.shape == ((5, 9, 9, 3) if layout == "NHWC" else (5, 3, 9, 9))
        got = pixels.float() if layout == "NHWC" else pixels.float().permute(0, 2, 3, 1)
        levels = 1 if dtype == torch.uint8 else 1 / (255 * 0.224) + 0.02 * (dtype == torch.bfloat16)
        assert (got - wanted).abs().max() <= levels + 1e-2 * (dtype != torch.uint8)


# ---- one stream of samples, whatever the ranks


class Unrendered(HostPipeline):
    """Reads images and does not decode them: for many samples in little time."""

    def _render(self, row, draws):
        self.data.image_bytes(row)
        return np.zeros((1, 1, 3), np.uint8)


def run(build, world, batches, state, **options):
    """Goes on from `state` on so many ranks: the keys' hashes of each global batch, and the state at the end.

    build: (options of Loading) -> pipeline. options: for all ranks; each has other threads and another depth.
    """
    parts, places, states = [], [], []
    for rank in range(world):
        loader = build(rank=rank, world=world, threads=1 + 3 * (rank % 2), ahead=3 * ((rank + world) % 2), **options)
        if state:
            loader.skipped.load_state_dict(state["skipped"])
            loader.load_state_dict(state["loader"])
        parts.append([batch.rows for batch in take(loader, batches)])
        places.append(loader.state_dict())
        states.append(loader.skipped.state_dict())
    assert all(place == places[0] for place in places)
    state = json.loads(json.dumps({"loader": places[0], "skipped": merged(states)}))
    return [torch.cat(rows) for rows in zip(*parts, strict=True)], state


def check_streams(build, hashes, bad, size, batches, rng):
    """Ranks 1 to 4, then a run that stops at ten random places and goes on with another number of ranks."""

    def keys(rows):
        return [hashes[batch].tolist() for batch in rows]

    rows, end = run(build, 1, batches, None, batch_size=size)
    expected = keys(rows)
    for batch in rows:
        assert len(batch.unique()) == size and not bad & set(batch.tolist())
    for world in (2, 3, 4):
        found, state = run(build, world, batches, None, batch_size=size // world)
        assert keys(found) == expected and state == end
    stops = [0, *sorted(rng.sample(range(1, batches), 10)), batches]
    found, state, world = [], None, 1
    for start, stop in zip(stops, stops[1:], strict=False):
        world = rng.choice([other for other in (1, 2, 3, 4) if other != world])
        more, state = run(build, world, stop - start, state, batch_size=size // world)
        found += keys(more)
    assert found == expected and state == end
    return state


@pytest.mark.parametrize("shuffle_buffer", [None, 700])
def test_two_epochs_are_one_stream_for_any_ranks(numbered, shuffle_buffer):
    """10 000 samples, 3% of them bad."""
    rng = random.Random(2)
    bad = set(rng.sample(range(10_000), 300))
    data = Collection([numbered[0]])
    data.leave_out({row: BadSample("corrupt", "made so") for row in bad})
    hashes = torch.cat([numbered[0].shard_hashes(k) for k in range(7)])

    def build(**options):
        return Unrendered(data, Loading(image_size=1, seed=4, shuffle_buffer=shuffle_buffer, **options))

    state = check_streams(build, hashes, bad, 96, 2 * (10_000 // 96), rng)
    assert state["loader"] | {"epoch": 1, "batch": 104} == state["loader"]
    assert state["skipped"]["rows"] == {"corrupt": sorted(bad)}
    assert 2 * 290 < state["skipped"]["met"]["corrupt"] < 2 * 320


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_two_epochs_of_pixels_are_one_stream_for_any_ranks(tmp_path, pipeline):
    """140 samples, 20% of them damaged; with a batch of 72, slots without a good candidate are frequent."""
    rng = random.Random(3)
    bad = set(rng.sample(range(140), 28))
    for shard, numbers in enumerate(np.array_split(np.arange(140), 3)):
        pictures = [numbered_picture(n)[: 200 if n in bad else None] for n in numbers.tolist()]
        write_tar(tmp_path / f"{shard}.tar", list(zip(map(key_of_number, numbers.tolist()), pictures, strict=True)))
    samples = Shards(tmp_path)

    def build(**options):
        return pipeline(Collection([samples]), Loading(image_size=4, shuffle_buffer=50, max_skipped=1.0, **options))

    hashes = torch.cat([samples.shard_hashes(k) for k in range(3)])
    for size in (12, 72):
        state = check_streams(build, hashes, bad, size, max(11, 2 * (140 // size)), rng)
        assert state["skipped"]["rows"] == {"truncated": sorted(bad)}


# ---- damaged and hostile data


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """2 000 good samples and 200 others in 11 shards -> (data, cause of each row or None)."""
    folder = tmp_path_factory.mktemp("damaged")
    rng = random.Random(5)
    strange = []
    while len(strange) < 200:
        strange += list(hostile(rng).values())
    everything = [(numbered_picture(n), None) for n in range(2000)] + strange[:200]
    rng.shuffle(everything)
    for shard in range(11):
        part = everything[200 * shard : 200 * shard + 200]
        write_tar(
            folder / f"{shard:02d}.tar", [(f"{shard:02d}{k:04d}", picture) for k, (picture, _) in enumerate(part)]
        )
    return Collection([Shards(folder)]), [cause for _, cause in everything]


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_hostile_files_are_counted_by_cause_and_the_good_all_arrive(damaged, pipeline, tmp_path):
    data, causes = damaged
    bad = {row: cause for row, cause in enumerate(causes) if cause is not None}
    found = pipeline(data, Loading(batch_size=1, image_size=16, max_skipped=0.2))
    found.skipped.write_to(tmp_path / "skipped.jsonl")
    rows = torch.cat([batch.rows for batch in take(found, len(causes))]).tolist()
    own = found.order.rows(0, np.arange(len(causes))).tolist()
    assert [row for row in own if row not in bad] == [row for row, place in zip(rows, own, strict=True) if row == place]
    assert not bad.keys() & set(rows)
    lines = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert {line["row"]: line["cause"] for line in lines} == bad
    assert len(lines) == len(bad)
    assert found.skipped.causes == Counter(bad.values())


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_twenty_epochs_of_hostile_files_leak_nothing(damaged, pipeline):
    data, causes = damaged
    loading = Loading(batch_size=100, image_size=16, max_skipped=0.2)
    found = pipeline(data, loading)
    batches = iter(found)
    process, resident, files = psutil.Process(), [], []
    for _ in range(20):
        for _ in range(found.order.batches):
            next(batches)
        resident.append(process.memory_info().rss)
        files.append(len(os.listdir("/proc/self/fd")))
    batches.close()
    # The first epochs fill allocators; then it is flat.
    assert max(resident[5:]) <= 1.02 * resident[4], resident
    assert max(files) == files[0], files


@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize("what", ["gone", "cut", "emptied"])
def test_a_shard_that_is_lost_while_training(tmp_path, pipeline, what):
    for shard in range(4):
        numbers = range(50 * shard, 50 * shard + 50)
        write_tar(tmp_path / f"{shard}.tar", [(f"{n:04d}", numbered_picture(n)) for n in numbers])
    (tmp_path / "4.tar").touch()
    with pytest.raises(DataError, match="4.tar is not a whole tar"):
        Shards(tmp_path)
    with tarfile.open(tmp_path / "4.tar", "w"):
        pass  # whole, and without a sample
    data = Collection([Shards(tmp_path)])
    lost = tmp_path / "2.tar"
    if what == "gone":
        lost.unlink()
    else:
        os.truncate(lost, 60_000 if what == "cut" else 0)
    found = pipeline(data, Loading(batch_size=10, image_size=8, max_skipped=0.9))
    for batch in take(found, 40):
        assert torch.equal(number_of(batch.pixels), batch.rows)
    assert set(found.skipped.causes) == {"unreadable"}
    with pytest.raises(DataError, match=r"samples are bad \(\d+ unreadable\), more than --max-skipped 0.05"):
        take(pipeline(data, Loading(batch_size=10, image_size=8, max_skipped=0.05)), 200)
