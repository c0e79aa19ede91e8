"""The benchmark of image loading at tiny sizes: photographs, rivals, turns, rows and targets."""

import io
import json
import multiprocessing
import random
import tarfile
import time
from collections import Counter
from functools import partial
from itertools import count, repeat
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, JpegImagePlugin
from support import complete  # noqa: F401

from benchmarks import bench_data, data_peers, photographs
from benchmarks.data_peers import Crops, Feed
from benchmarks.harness import Suite
from lift_fast.data.samples import Collection
from lift_fast.data.shards import Shards


def rng(*seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("width, height", [(400, 300), (333, 500), (1100, 7), (1, 1)])
def test_photographs_have_their_size_and_follow_from_the_seed(width, height):
    image = photographs.photograph(rng(1), width, height)
    assert image.shape == (height, width, 3) and image.dtype == np.uint8
    np.testing.assert_array_equal(photographs.photograph(rng(1), width, height), image)
    assert (photographs.photograph(rng(2), width, height) != image).any()


def test_photographs_look_like_photographs():
    """Amplitude falls as in natural images, about as 1 / f; channels correlate; there are edges and flat regions."""
    slopes = []
    for seed in range(5):
        image = photographs.photograph(rng(seed), 640, 480).astype(np.float64)
        grey = image.mean(axis=2)
        n = 480
        window = np.hanning(n)
        square = (grey[:, :n] - grey.mean()) * window * window[:, None]
        power = np.abs(np.fft.fft2(square)) ** 2
        frequency = np.hypot(np.fft.fftfreq(n), np.fft.fftfreq(n)[:, None])
        edges = np.geomspace(5 / n, 0.4, 10)
        rings = np.digitize(frequency, edges)
        means = [power[rings == ring].mean() for ring in range(1, len(edges))]
        slopes.append(np.polyfit(np.log(edges[1:] * edges[:-1]) / 2, np.log(means) / 2, 1)[0])
        assert np.corrcoef(image.reshape(-1, 3).T)[np.triu_indices(3, 1)].min() > 0.7
        step = np.abs(np.diff(grey, axis=1))
        assert (step > 40).mean() > 0.005 and (step < 3).mean() > 0.2
    assert all(-1.5 < slope < -1 for slope in slopes), slopes


def test_files_are_as_large_as_photographs_are():
    kinds = Counter()
    for seed in range(30):
        width, height = photographs.size_of(rng(seed))
        assert (max(width, height), min(width, height)) in photographs.SIZES
        data = photographs.jpeg(rng(seed), width, height)
        assert data == photographs.jpeg(rng(seed), width, height)
        assert 0.15 < len(data) / (width * height) < 0.7
        image = Image.open(io.BytesIO(data))
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (width, height))
        kinds[JpegImagePlugin.get_sampling(image)] += 1
        kinds["upright"] += height > width
    assert kinds[2] > 20 and kinds["upright"] in range(2, 15)  # 2: 4:2:0


def test_shards_lie_as_img2dataset_writes_them(tmp_path):
    files = photographs.write_shards(tmp_path / "a", 7, seed=3, shards=2)
    names = []
    for path in sorted((tmp_path / "a").iterdir()):
        with tarfile.open(path) as tar:
            names += [(path.name, member.name) for member in tar]
            for member in tar:
                if member.name.endswith(".json"):
                    meta = json.load(tar.extractfile(member))
                    assert meta["key"] == member.name[:9] and meta["status"] == "success" and meta["width"] >= 300
    keys = ["000000000", "000000001", "000000002", "000000003", "000010000", "000010001", "000010002"]
    assert names == [(f"{key[:5]}.tar", f"{key}.{suffix}") for key in keys for suffix in ("jpg", "json", "txt")]
    data = Shards(tmp_path / "a")
    assert [data.image_bytes(i) for i in range(len(data))] == files
    assert len(set(files)) == 7 and all(data.caption(i) == data.meta(i)["caption"] for i in range(7))
    assert photographs.write_shards(tmp_path / "b", 7, seed=3) == files  # also in another number of shards
    one = photographs.write_shards(tmp_path / "c", 1, seed=3, size=(40, 30))
    assert Image.open(io.BytesIO(one[0])).size == (40, 30)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photographs") / "set"
    photographs.write_shards(folder, 20, seed=0, size=(120, 90))
    return folder


def test_boxes_are_torchvisions():
    random.seed(0)
    for width, height, least in (400, 300, 0.08), (300, 400, 0.9), (7, 5, 0.08):
        boxes = [data_peers.random_box(width, height, least) for _ in range(300)]
        for left, top, right, bottom in boxes:
            assert 0 <= left < right <= width and 0 <= top < bottom <= height
        areas = [(right - left) * (bottom - top) / (width * height) for left, top, right, bottom in boxes]
        assert min(areas) > 0.7 * least and max(areas) > 0.95
        assert min(areas) < least + 0.1 * (1 - least)
    assert data_peers.random_box(1000, 10, 1.0) == (493, 0, 506, 10)  # no box fits: the centre, at 4:3
    assert data_peers.random_box(10, 1000, 1.0) == (0, 493, 10, 506)


def test_a_draft_is_the_same_crop():
    data = photographs.jpeg(rng(0), 640, 480)
    for seed in range(8):
        crops = []
        for draft in (False, True):
            random.seed(seed)
            crops.append(data_peers.crop(data, 64, 0.5, draft))
        assert crops[0].shape == (64, 64, 3) and crops[0].dtype == torch.uint8
        apart = (crops[0].int() - crops[1].int()).abs().float().mean()
        assert 0 < apart < 4  # decoded at another scale, but the same crop


PEERS = {
    "DataLoader": data_peers.data_loader,
    "draft": partial(data_peers.data_loader, draft=True),
    "webdataset": data_peers.webdataset,
    "DALI's reader": data_peers.dali_reader,
}


@pytest.mark.parametrize("name", PEERS)
def test_rivals_give_the_same_batches(name, folder):
    if name == "DALI's reader":
        pytest.importorskip("nvidia.dali")
    if name == "webdataset":
        pytest.importorskip("webdataset")
    feed = PEERS[name](Crops(folder, 6, 32, 0.9, workers=2))
    assert feed.held >= feed.at_once >= 1
    originals = torch.stack(
        [
            torch.from_numpy(np.array(Image.open(io.BytesIO(data)).resize((32, 32)))).float()
            for i in range(20)
            for data in [Shards(folder).image_bytes(i)]
        ]
    )
    seen = set()
    for _ in range(12):  # more batches than an epoch has
        batch = next(feed.batches)
        assert batch.shape == (6, 32, 32, 3) and batch.dtype == torch.uint8
        apart = (batch.float()[:, None] - originals).abs().flatten(2).mean(dim=2)
        nearest = apart.sort(dim=1)
        assert (nearest.values[:, 0] < 0.8 * nearest.values[:, 1]).all()  # every crop is of an image of the set
        seen |= set(nearest.indices[:, 0].tolist())
    assert len(seen) > 10


def fake_feed(batches, held: int, at_once: int = 1):
    return lambda: Feed(iter(batches), held, at_once)


def slow(ready: int, seconds: float):
    """Yields `ready` batches without delay whenever it was idle before, then one every `seconds`."""
    last = 0.0
    left = ready
    while True:
        if time.monotonic() - last > 2 * bench_data.IDLE_S / 3:
            left = ready
        if left:
            left -= 1
        else:
            time.sleep(seconds)
        last = time.monotonic()
        yield torch.empty(4)


def test_what_was_made_before_the_clock_ran_does_not_count():
    suite = Suite("x", True)
    feed = Feed(slow(3, 0.02), held=4)
    for _ in range(3):
        turn = bench_data._turn(suite, feed, 5)
        assert 20 < turn.images_per_s <= 200 and turn.cpu_share < 0.5
    assert bench_data._turn(suite, Feed(slow(3, 0.02), held=1), 5).images_per_s > 200
    assert not suite.notes


def test_batches_that_workers_finish_together_are_counted_together(monkeypatch):
    taken = []
    monkeypatch.setattr(bench_data, "_turn", lambda suite, feed, batches: taken.append(batches))
    monkeypatch.setattr(bench_data, "_columns", lambda turns: {})
    suite = Suite("x", True)
    suite.repeats = 1
    builds = {"x": fake_feed(slow(0, 0.01), held=1, at_once=3), "ready": fake_feed(repeat(torch.empty(4)), held=1)}
    bench_data.measure(suite, {}, builds, turn_s=0.1)
    assert taken[0] % 3 == 0 and 3 <= taken[0] <= 12
    assert taken[1] == bench_data.MOST_BATCHES


def burn() -> None:
    end = time.process_time() + 0.5
    while time.process_time() < end:
        pass
    time.sleep(30)


def test_workers_cpu_seconds_count():
    worker = multiprocessing.get_context("forkserver").Process(target=burn, daemon=True)
    before = bench_data._cpu_seconds()
    worker.start()
    try:
        deadline = time.monotonic() + 60
        while bench_data._cpu_seconds() - before < 0.45 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert bench_data._cpu_seconds() - before >= 0.45
        assert bench_data._wait_until_idle()
    finally:
        worker.kill()
        worker.join()


def test_who_never_rests_is_noted(monkeypatch):
    monkeypatch.setattr(bench_data, "PATIENCE_S", 0.2)
    seconds = count()
    monkeypatch.setattr(bench_data, "_cpu_seconds", lambda: next(seconds))
    suite = Suite("x", True)
    suite.repeats = 1
    rows = bench_data.measure(suite, {}, {"x": fake_feed(slow(0, 0), held=1)}, turn_s=0.01)
    assert set(rows) == {"x"} and "kept the CPU busy" in suite.notes[0]


def test_what_fails_is_noted_and_the_others_go_on():
    def broken():
        raise RuntimeError("no such loader\nmore")

    def breaks():
        yield torch.empty(4)
        raise OSError("gone")

    suite = Suite("x", True)
    suite.repeats = 1
    builds = {"broken": broken, "breaks": fake_feed(breaks(), held=2), "good": fake_feed(slow(0, 0.001), held=1)}
    rows = bench_data.measure(suite, {"size": 3}, builds, turn_s=0.01)
    assert set(rows) == {"good"}
    assert suite.notes == ["broken: 3: RuntimeError: no such loader", "breaks: 3: OSError: gone"]
    assert bench_data.faster(rows, "good", "broken") is None and bench_data.faster(rows, "good", "good") == 1
    late = Suite("x", True, seconds=-1)
    assert bench_data.measure(late, {"size": 3}, builds) == {} and late.notes == ["out of time: not measured: 3"]


@pytest.fixture
def small(monkeypatch):
    threads = torch.get_num_threads()
    monkeypatch.setattr(bench_data, "device", lambda: "cpu")
    for name, value in {"SIZE": 32, "BATCH": 4, "IMAGES": 12, "COMPARED": 6, "TURN_S": 0.02}.items():
        monkeypatch.setattr(bench_data, name, value)
    yield
    assert torch.get_num_threads() == threads


def quick() -> Suite:
    suite = Suite("data", True)
    suite.repeats = 1
    bench_data.run(suite)
    return suite


def test_a_run(small, capsys):
    suite = quick()
    assert not multiprocessing.active_children()
    suite.print()
    rows = {(row["what of"], row.get("area"), row["what"]): row for row in suite.rows}
    for area in bench_data.AREAS:
        for what in (bench_data.HOST, bench_data.LOADER, bench_data.DRAFT):
            row = rows["training crops", area, what]
            assert row["images_per_s"] > 0 and row["cpu_ms_per_image"] > 0 and row["batch"] == 4
            assert 0 < row["cpu_share"] < 1.2
        assert rows["training pixels", area, bench_data.HOST]["mean_levels"] < 8
    parts = [row["median_ms"] for (of, _, _), row in rows.items() if of == "a picture's parts"]
    assert len(parts) == 9 and all(ms > 0 for ms in parts)
    pixels = rows["evaluation pixels", None, bench_data.HOST]
    assert pixels["max_levels"] <= 2 and pixels["mean_levels"] < 0.1 and pixels["pictures"] == 6
    bars = {bar["name"]: bar for bar in suite.bars}
    host = [rows["training crops", "0.08-1", what]["images_per_s"] for what in (bench_data.HOST, bench_data.LOADER)]
    assert bars["area 0.08-1: lift_fast host faster than DataLoader, Pillow"]["value"] == host[0] / host[1]
    assert len(bars) == 4 and sum("lift_fast DALI" in name for name in bars) == 2
    for what in (bench_data.DALI, bench_data.READER, bench_data.WEB):
        measured = [key for key in rows if key[0] == "training crops" and key[2] == what]
        assert len(measured) == 2 or any(note.startswith(f"{what}: training crops") for note in suite.notes)


def test_a_run_without_dali(small, monkeypatch):
    """Figures that need DALI are missing, and their targets are missed."""

    def unavailable(*arguments, **options):
        raise ModuleNotFoundError("No module named 'nvidia'")

    monkeypatch.setattr(bench_data, "_dali", unavailable)
    monkeypatch.setattr("lift_fast.data.dali.load_images", unavailable)
    for name in ("dali_reader", "webdataset", "data_loader"):
        monkeypatch.setattr(bench_data, name, unavailable)
    suite = quick()
    assert {row["what"] for row in suite.rows if row["what of"] == "training crops"} == {bench_data.HOST}
    assert [bar["value"] is None for bar in suite.bars] == [False, True, True, True]
    assert f"{bench_data.DALI}: evaluation pixels: ModuleNotFoundError: No module named 'nvidia'" in suite.notes


def test_levels_apart():
    suite = Suite("x", True)
    found, reference = np.zeros((2, 2, 2, 3), np.uint8), [np.zeros((2, 2, 3), np.uint8) for _ in range(2)]
    reference[1][0, 0, 0] = 240
    assert bench_data._difference(suite, "pixels", None, "x", found, reference) == 240
    assert suite.rows[0]["mean_levels"] == 10 and suite.rows[0]["pictures"] == 2


@pytest.mark.gpu
def test_on_a_gpu(tmp_path, monkeypatch):
    pytest.importorskip("nvidia.dali")
    for name, value in {"GPU_BATCH": 8, "GPU_IMAGES": 24, "GPU_PRESET": "tiny", "GPU_TURN_S": 0.05}.items():
        monkeypatch.setattr(bench_data, name, value)
    suite = Suite("x", True)
    suite.repeats = 1
    bench_data.on_gpu(suite, tmp_path / "set")
    assert len(suite.rows) == 4 and all(row["images_per_s"] > 0 for row in suite.rows), suite.notes
    assert suite.bars[0]["value"] is not None and suite.bars[0]["at_most"]


def test_unseen_pictures_are_those_of_the_set(folder):
    """The same files under other row numbers."""
    data = Collection([Shards(folder)])
    unseen = Collection(bench_data.COPIES * data.sets)
    assert len(unseen) == bench_data.COPIES * len(data)
    assert unseen.image_bytes(len(data) + 3) == data.image_bytes(3)
