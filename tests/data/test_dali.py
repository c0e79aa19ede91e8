"""What only the DALI pipeline does; test_pipelines.py tests what both pipelines must do.

A GPU's graph runs here on the CPU (`graph`): the same operators, given their inputs in the same way.
"""

import gc
import io
import random
import re
import struct
import sys
import threading
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from support import complete  # noqa: F401
from support.hostile import encoded, hostile, insert_segment, scene

from lift_fast.data import dali
from lift_fast.data.dali import DaliPipeline, load_images
from lift_fast.data.host import HostPipeline
from lift_fast.data.images import read_header
from lift_fast.data.loading import Loading
from lift_fast.data.samples import Collection
from lift_fast.data.transforms import render_centre
from lift_fast.errors import BackendError, DataError

# Otherwise a batch that fails for a fault of ours would pass, rendered by the host.
pytestmark = pytest.mark.filterwarnings("error:DALI failed")


@pytest.fixture(autouse=True)
def _needs_dali(request):
    if not request.function.__name__.startswith("test_without_dali"):
        pytest.importorskip("nvidia.dali")


@pytest.fixture(params=["host resizes", "dali resizes"])
def graph(request, monkeypatch):
    """The CPU's graph, then the GPU's on the CPU."""
    monkeypatch.setattr(dali, "_RESIZES_ON_CPU", request.param == "dali resizes")


class Pictures:
    """A data set in memory."""

    folder = Path("memory")
    names = ["memory"]

    def __init__(self, pictures):
        self.pictures, self.shard_sizes = pictures, [len(pictures)]

    def __len__(self):
        return len(self.pictures)

    def image_bytes(self, i):
        return self.pictures[i]

    def where(self, i):
        return f"memory/{i}"


def collection(pictures):
    return Collection([Pictures(pictures)])


def jpeg(pixels, **settings):
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", **{"quality": 92, **settings})
    return out.getvalue()


def photograph(rng, width, height):
    """uint8 [height, width, 3] with the spectrum of a photograph: amplitudes fall with frequency."""
    across, down = np.fft.rfftfreq(width)[None], np.fft.fftfreq(height)[:, None]
    frequency = np.maximum(np.hypot(across, down), 1 / max(width, height))
    waves = rng.standard_normal((2, 3, height, width // 2 + 1)) / frequency**1.2
    planes = np.fft.irfft2(waves[0] + 1j * waves[1], s=(height, width))
    planes /= planes.std(axis=(1, 2), keepdims=True) + 1e-9
    return np.clip(120 + 55 * planes, 0, 255).astype(np.uint8).transpose(1, 2, 0)


def photographs(count=12, least=50, most=126, seed=0):
    """Of less than twice 64 pixels: the host decodes larger ones at half their size, and they differ by more."""
    rng = np.random.default_rng(seed)
    return [jpeg(photograph(rng, *rng.integers(least, most, 2).tolist())) for _ in range(count)]


def numbered(count):
    """JPEGs of one colour that tells their number."""
    return [
        jpeg(np.full((20, 24, 3), (10 * (n % 25), 10 * (n // 25), 128), np.uint8), quality=95) for n in range(count)
    ]


def numbers_of(pixels):
    red, green = (torch.round(pixels[..., c].double().mean(dim=(1, 2)) / 10).long() for c in (0, 1))
    return red + 25 * green


def take(pipeline, count):
    batches = iter(pipeline)
    taken = [next(batches) for _ in range(count)]
    batches.close()
    return taken


def assert_same(got, wanted, most=1.0):
    """The same rows, and pixels within a mean of `most` levels of 255."""
    for one, other in zip(got, wanted, strict=True):
        assert torch.equal(one.rows, other.rows)
        assert one.pixels.shape == other.pixels.shape and one.pixels.dtype == other.pixels.dtype
        off = (one.pixels.double() - other.pixels.double()).abs()
        assert off.mean(dim=(1, 2, 3)).max() <= most


@pytest.fixture
def threads_end():
    """Every thread that a test started is gone at its end."""
    gc.collect()
    before = psutil.Process().num_threads()
    yield
    gc.collect()
    assert psutil.Process().num_threads() <= before
    assert not [t.name for t in threading.enumerate() if t.name.startswith(("decode", "resize"))]


# ---- pixels


@pytest.mark.parametrize(
    "options",
    [{}, {"flip": 0.5}, {"flip": 0.5, "colour": 0.4}, {"min_crop_area": 0.08}, {"image_size": 97}],
    ids=str,
)
def test_the_hosts_pixels(graph, options):
    data = collection(photographs())
    loading = Loading(**{"batch_size": 5, "image_size": 64, **options})
    assert_same(take(DaliPipeline(data, loading), 6), take(HostPipeline(data, loading), 6))


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float16, torch.bfloat16])
def test_dtypes_and_layouts(graph, dtype, layout):
    """Half of the samples mirrored; a level of 255 is 0.0175 of a standard deviation."""
    data = collection(photographs(6))
    loading = Loading(3, 64, flip=0.5, dtype=dtype, layout=layout)
    got, wanted = take(DaliPipeline(data, loading), 3), take(HostPipeline(data, loading), 3)
    assert_same(got, wanted, most=1.0 if dtype == torch.uint8 else 0.0175)
    assert all(batch.pixels.is_contiguous() for batch in got)


def test_what_is_not_plain_is_the_hosts_picture(graph):
    """PNGs, and JPEGs that are turned or CMYK, reach torch as the host renders them."""
    rng = random.Random(1)
    kinds = (
        "png",
        "png with alpha",
        "png palette",
        "jpeg orientation 6",
        "jpeg cmyk",
        "jpeg rgb",
        "webp",
        "gif",
        "bmp",
    )
    everything = hostile(rng)
    data = collection([everything[kind][0] for kind in kinds])
    loading = Loading(3, 32, flip=0.5)
    assert_same(take(DaliPipeline(data, loading), 6), take(HostPipeline(data, loading), 6), most=0.0)


def test_rows_and_pixels_belong_together(graph):
    """Three ranks, two epochs, batches ahead; the host renders a third of the images."""
    pictures = numbered(120)
    for n in range(0, 120, 3):
        out = io.BytesIO()
        Image.open(io.BytesIO(pictures[n])).save(out, "PNG")
        pictures[n] = out.getvalue()
    data = collection(pictures)
    for world in (1, 2, 3):
        seen = []
        for rank in range(world):
            loading = Loading(7, 16, seed=1, rank=rank, world=world, threads=3, ahead=rank)
            for batch in take(DaliPipeline(data, loading), 2 * (120 // (7 * world))):
                assert torch.equal(numbers_of(batch.pixels), batch.rows)
                seen += batch.rows.tolist()
        assert all(seen.count(row) <= 2 for row in seen)
        assert len(seen) == 2 * (120 - 120 % (7 * world))


def test_a_batch_stays_as_it_was(graph):
    """Batches are DALI's memory; they outlive the pipeline and are not written again."""
    data = collection(photographs(40))
    held, copies = [], []
    pipeline = DaliPipeline(data, Loading(4, 64, ahead=2))
    batches = iter(pipeline)
    for _ in range(25):
        batch = next(batches)
        held.append(batch.pixels)
        copies.append(batch.pixels.clone())
    batches.close()
    del pipeline, batches
    gc.collect()
    assert all(torch.equal(a, b) for a, b in zip(held, copies, strict=True))


def test_a_picture_and_pixels_of_one(graph):
    data = collection([jpeg(np.full((1, 1, 3), 100, np.uint8)), jpeg(np.full((1, 500, 3), 100, np.uint8))])
    for batch in take(DaliPipeline(data, Loading(1, 1, ahead=1)), 4):
        assert batch.pixels.shape == (1, 1, 1, 3) and batch.pixels.float().sub(100).abs().max() <= 2


# ---- position


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_it_tells_and_takes_its_place(graph, threads_end, ahead):
    """Closed anywhere, iterated again, or loaded into another: the next samples follow. Epochs of 5 batches."""
    data, loading = collection(numbered(23)), Loading(4, 16, ahead=ahead, seed=2)
    whole = [batch.rows.tolist() for batch in take(HostPipeline(data, loading), 14)]
    first, second = DaliPipeline(data, loading), DaliPipeline(data, loading)
    assert [batch.rows.tolist() for batch in take(first, 6)] == whole[:6]
    assert first.state_dict() | {"epoch": 1, "batch": 1} == first.state_dict()
    second.load_state_dict(first.state_dict())
    assert [batch.rows.tolist() for batch in take(first, 3)] == whole[6:9]
    assert [batch.rows.tolist() for batch in take(second, 8)] == whole[6:]


def test_fewer_samples_than_are_made_ahead(graph, threads_end):
    data, loading = collection(numbered(3)), Loading(2, 16, ahead=5)
    for batch in take(DaliPipeline(data, loading), 7):
        assert torch.equal(numbers_of(batch.pixels), batch.rows)


def test_closed_before_and_after_the_first_batch(threads_end):
    data, loading = collection(numbered(9)), Loading(2, 16, ahead=2)
    iter(DaliPipeline(data, loading)).close()
    take(DaliPipeline(data, loading), 1)
    dropped = iter(DaliPipeline(data, loading))
    next(dropped)
    del dropped


# ---- bad samples


@pytest.fixture(scope="module")
def mixed():
    """Good pictures and every kind of hostile one."""
    rng = random.Random(4)
    pictures = numbered(60) + [data for data, _ in hostile(rng).values()]
    rng.shuffle(pictures)
    return collection(pictures)


@pytest.mark.parametrize("ahead", [0, 2])
def test_hostile_files_are_skipped_as_on_the_host(graph, mixed, ahead):
    loading = Loading(6, 16, ahead=ahead, max_skipped=0.9)
    ours, host = DaliPipeline(mixed, loading), HostPipeline(mixed, loading)
    # The host decodes crops of large images at a reduced size.
    assert_same(take(ours, 50), take(host, 50), most=8.0)
    assert ours.skipped.causes == host.skipped.causes and ours.skipped.looked_at == host.skipped.looked_at
    assert not ours._refused


def test_damage_that_dali_does_not_report(graph):
    """Zeros in the entropy code, the end cut off, bytes gone: DALI returns images, and none of them is used."""
    good = photographs(8)
    damaged = []
    for n, picture in enumerate(good):
        middle = (picture.index(b"\xff\xda") + len(picture)) // 2
        fault = [bytes(60), b"\xff\xd9", random.Random(n).randbytes(80)][n % 3]
        end = picture[middle + len(fault) :] if n % 3 != 1 else b""
        damaged.append(picture[:middle] + fault + end)
    pipeline = DaliPipeline(collection(good + damaged), Loading(4, 32, max_skipped=0.9))
    rows = torch.cat([batch.rows for batch in take(pipeline, 6)])
    assert set(rows.tolist()) <= set(range(8))
    assert pipeline.skipped.causes["corrupt"] >= 8
    assert not pipeline._refused


def test_a_picture_is_read_strictly_once(monkeypatch):
    calls = []
    regular = dali.is_regular
    monkeypatch.setattr(dali, "is_regular", lambda *a: calls.append(0) or regular(*a))
    pipeline = DaliPipeline(collection(numbered(19)), Loading(3, 16, threads=1))
    take(pipeline, 18)
    assert len(calls) <= 19
    take(pipeline, 18)
    assert len(calls) <= 19


def test_too_many_bad_ones_are_an_error(threads_end):
    pipeline = DaliPipeline(collection(numbered(3) + [b""] * 9), Loading(4, 16))
    with pytest.raises(DataError, match="only 3 of 12 images decode"):
        take(pipeline, 1)


# ---- DALI fails


def without_quantisation(picture):
    """A JPEG whose quantisation tables are gone: decoders refuse it, its header does not show it."""
    return picture.replace(b"\xff\xdb", b"\xff\xe9")


@pytest.mark.parametrize("ahead", [0, 2])
def test_a_batch_that_dali_refuses(graph, monkeypatch, threads_end, ahead):
    """Bytes that only DALI's decoder refuses are skipped when the host refuses them, too; nothing else is lost."""
    pictures = numbered(50)
    for n in (3, 4, 31):
        pictures[n] = without_quantisation(pictures[n])
    data, loading = collection(pictures), Loading(4, 16, ahead=ahead, max_skipped=0.9)
    monkeypatch.setattr(dali, "is_regular", lambda data, header: True)
    ours, host = DaliPipeline(data, loading), HostPipeline(data, loading)
    with pytest.warns(UserWarning, match="DALI failed on a batch; .*: Failed to decode sample"):
        assert_same(take(ours, 30), take(host, 30))
    assert {3, 4, 31} <= ours._refused and len(ours._refused) <= 3 * (1 + ahead) * 4
    assert ours.skipped.causes == host.skipped.causes and ours.skipped.looked_at == host.skipped.looked_at
    assert ours.state_dict() == host.state_dict()


def dali_fails_once(monkeypatch, number, why):
    """DALI's call number `number` for a batch raises. Returns the list of the calls, which grows as they are made."""
    get, calls = dali._Decoder.get, []

    def fails_once(self):
        calls.append(self)
        if len(calls) == number:
            raise RuntimeError(why)
        return get(self)

    monkeypatch.setattr(dali._Decoder, "get", fails_once)
    return calls


@pytest.mark.parametrize("ahead", [0, 3])
def test_a_failure_in_between(graph, monkeypatch, ahead):
    """DALI raises in the middle for no reason in the data: the host renders the batch, the sequence is the same."""
    data, loading = collection(photographs(20)), Loading(4, 64, ahead=ahead)
    wanted = take(HostPipeline(data, loading), 12)
    dali_fails_once(monkeypatch, 4, "out of memory")
    pipeline = DaliPipeline(data, loading)
    with pytest.warns(UserWarning, match="the host renders its 4 images from now on: out of memory"):
        got = take(pipeline, 12)
    assert_same(got, wanted)
    assert pipeline._refused == set(wanted[3].rows.tolist())


def test_dali_that_always_fails_is_an_error(monkeypatch, threads_end):
    def fails(self):
        raise RuntimeError("no luck")

    monkeypatch.setattr(dali._Decoder, "get", fails)
    pipeline = DaliPipeline(collection(numbered(10)), Loading(4, 16))
    with pytest.raises(BackendError, match="no luck"), pytest.warns(UserWarning, match="DALI failed"):
        take(pipeline, 1)


def test_without_dali_it_says_what_brings_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(BackendError, match=re.escape("pip install 'lift-fast[dali]'")):
        DaliPipeline(collection(numbered(3)), Loading(1, 8))
    assert not dali.installed()


# ---- memory


def soak(pipeline, rounds, batches_each):
    """Resident bytes after each round."""
    process, resident = psutil.Process(), []
    batches = iter(pipeline)
    for _ in range(rounds):
        for _ in range(batches_each):
            next(batches)
        resident.append(process.memory_info().rss)
    batches.close()
    return resident


def test_memory_stays(graph, mixed):
    resident = soak(DaliPipeline(mixed, Loading(6, 16, ahead=1, max_skipped=0.9)), 6, 15)
    assert max(resident[3:]) <= 1.02 * resident[2], resident


def test_memory_stays_when_pipelines_are_opened_and_fail(monkeypatch, threads_end):
    monkeypatch.setattr(dali, "is_regular", lambda data, header: True)
    pictures = [without_quantisation(picture) if n % 10 == 0 else picture for n, picture in enumerate(numbered(40))]
    process, resident = psutil.Process(), []
    for _ in range(8):
        for _ in range(5):
            with pytest.warns(UserWarning, match="DALI failed"):
                take(DaliPipeline(collection(pictures), Loading(4, 16, ahead=1, max_skipped=0.9)), 6)
        resident.append(process.memory_info().rss)
    assert max(resident[4:]) <= 1.02 * resident[3], resident


@pytest.mark.soak
def test_twenty_epochs_of_large_pictures_leak_nothing(graph, mixed):
    pictures = photographs(200, 300, 700) + [data for data, _ in hostile(random.Random(0)).values()]
    resident = soak(DaliPipeline(collection(pictures), Loading(16, 224, ahead=2, max_skipped=0.9)), 20, 14)
    assert max(resident[5:]) <= 1.02 * resident[4], resident


# ---- evaluation


def by_pillow(data, size):
    picture = Image.open(io.BytesIO(data))
    short = min(picture.size)
    width, height = (int(size * extent / short) for extent in picture.size)
    left, top = (int(round((extent - size) / 2)) for extent in (width, height))
    box = (left, top, left + size, top + size)
    return np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC).crop(box))


def test_evaluation_agrees_with_pillow(graph):
    """Target: a mean of 2 levels; images larger and smaller than the evaluated size, and more than one batch."""
    pictures = photographs(70, 60, 300)
    pixels, samples, causes = load_images(collection(pictures), 112)
    assert samples == list(range(70))
    assert pixels.dtype == torch.uint8 and pixels.shape == (70, 112, 112, 3)
    for data, ours in zip(pictures, pixels.double().numpy(), strict=True):
        assert np.abs(ours - by_pillow(data, 112)).mean() <= 0.5
        assert np.abs(ours - render_centre(data, read_header(data), 112)).mean() <= 0.5


def test_evaluation_of_odd_and_strange_pictures(graph):
    rng = np.random.default_rng(3)
    pictures = [jpeg(photograph(rng, *size)) for size in ((600, 9), (9, 600), (112, 112), (113, 111), (1, 1))]
    pictures += [data for data, cause in hostile(random.Random(2)).values() if cause is None]
    pixels, samples, causes = load_images(collection([b"", *pictures, pictures[0][:200]]), 37)
    assert causes == {"empty": 1, "truncated": 1}
    assert samples == list(range(1, len(pictures) + 1))
    host = np.stack([render_centre(data, read_header(data), 37) for data in pictures])
    assert np.abs(pixels.double().numpy() - host).mean(axis=(1, 2, 3)).max() <= 1


def test_evaluation_goes_on_where_dali_fails(monkeypatch):
    pictures = photographs(70, 60, 300)
    wanted, *_ = load_images(collection(pictures), 32)
    calls = dali_fails_once(monkeypatch, 2, "a fault")
    with pytest.warns(UserWarning, match="DALI failed on images, which the host renders: a fault"):
        pixels, samples, causes = load_images(collection(pictures), 32)
    assert len(calls) == 3 and samples == list(range(70))
    assert (pixels.double() - wanted.double()).abs().mean() <= 0.5


def test_what_auto_means(monkeypatch):
    for installed in (False, True):
        monkeypatch.setattr(dali, "installed", lambda installed=installed: installed)
        assert dali.wanted("auto", True) == installed and not dali.wanted("auto", False)
        assert dali.wanted("dali", False) and not dali.wanted("host", True)


def test_a_long_picture_is_not_enlarged_to_gigabytes():
    assert max(dali._centred(jpeg(np.zeros((2, 9000, 3), np.uint8)), 100, None).resized) == 1600


def long_exif(level):
    entry = struct.pack("<HHII", 0x0112, 4, 1, level)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, 1) + entry + bytes(4)


@pytest.mark.parametrize("orientation", [2, 3, 4, 6])
def test_dali_turns_no_picture(orientation):
    data = insert_segment(encoded(scene(random.Random(0), 48, 48), "JPEG"), 0xE1, long_exif(orientation))
    loading = Loading(1, 32)
    host, other = (next(iter(kind(collection([data]), loading))).pixels for kind in (HostPipeline, DaliPipeline))
    assert (host.int() - other.int()).abs().max() <= 8


# ---- a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("ahead", [0, 2])
def test_a_gpus_batches(ahead):
    """Ready for torch's current stream, whichever it is, and valid while further batches are made."""
    data, loading = collection(photographs(24)), Loading(8, 64, flip=0.5, colour=0.2, ahead=ahead)
    wanted = take(HostPipeline(data, loading), 9)
    with torch.cuda.stream(torch.cuda.Stream()):
        got = take(DaliPipeline(data, loading, device_id=0), 9)
        sums = [batch.pixels.sum(dtype=torch.int64) for batch in got]
    torch.cuda.synchronize()
    for batch, total, other in zip(got, sums, wanted, strict=True):
        assert batch.pixels.device == torch.device("cuda:0") and not batch.rows.is_cuda
        assert torch.equal(batch.rows, other.rows)
        assert batch.pixels.sum(dtype=torch.int64) == total
        assert (batch.pixels.cpu().double() - other.pixels.double()).abs().mean() <= 2


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_gpus_dtypes(dtype):
    data, loading = collection(photographs(8)), Loading(8, 64, dtype=dtype, layout="NCHW")
    (got,), (wanted,) = take(DaliPipeline(data, loading, device_id=0), 1), take(HostPipeline(data, loading), 1)
    assert got.pixels.dtype == dtype
    assert (got.pixels.cpu().float() - wanted.pixels.float()).abs().mean() <= 0.035


@pytest.mark.gpu
def test_a_gpus_evaluation_agrees_with_pillow():
    pictures = photographs(20, 60, 300)
    pixels, *_ = load_images(collection(pictures), 112, device_id=0)
    assert pixels.is_cuda
    wanted = np.stack([by_pillow(data, 112) for data in pictures])
    assert np.abs(pixels.cpu().double().numpy() - wanted).mean(axis=(1, 2, 3)).max() <= 2
