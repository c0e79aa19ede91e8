"""Image loading: images per second and CPU share of our pipelines, DALI's reader, torch's DataLoader and webdataset.

All read the same synthetic photographs (photographs.py) from the same tars in the page cache, and make random resized
crops in batches of the same size, with as many threads or workers as there are cores. The batches are discarded. Area
0.08 to 1 is torchvision's default, 0.9 to 1 that of CLIP and LIFT. Our pipeline with DALI checks each JPEG strictly
when it first reads it; "checked" omits this, as after `lift-fast data check`.

Loaders prefetch, so each turn is timed in the steady state. A turn first waits until this process and its workers are
idle: then the last rival's prefetching has ended and all queues are full. It discards as many batches as the rival may
have prefetched or begun, and measures the time from the arrival of the last of these to the arrival of a later batch,
over a multiple of the batches that the workers finish together. All batches that count were therefore made within the
measured time. CPU seconds are those of this process and of all workers. Rivals take turns; a row has the median and
the interquartile range of its turns.

The suite also measures differences from Pillow's pixels, the time of the parts of decoding an image on one thread, and
on a GPU DALI's decoding there and how much a training step slows down when DALI feeds it. TMPDIR sets the place of the
tars.
"""

import gc
import io
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice, repeat
from math import ceil
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lift_fast.data.host import HostPipeline
from lift_fast.data.images import decode, decode_box, read_header
from lift_fast.data.loading import DRAWS, Loading, Pipeline
from lift_fast.data.order import uniform
from lift_fast.data.samples import Collection
from lift_fast.data.shards import Shards
from lift_fast.data.transforms import View, render, render_centre, resize, view_of
from lift_fast.losses import ClipLoss
from lift_fast.measure.time import interleaved_ms, quartile_distance
from lift_fast.nn import PRESETS, Lift
from lift_fast.train.step import Step

from .data_peers import Crops, Feed, dali_reader, data_loader, webdataset
from .harness import Suite
from .pairs import device, one_line, quantized
from .photographs import write_shards
from .vit_peers import Row, adamw

HOST, DALI, READER, LOADER, DRAFT, WEB = (
    "lift_fast host",
    "lift_fast DALI",
    "DALI's reader",
    "DataLoader, Pillow",
    "DataLoader, Pillow's draft",
    "webdataset, Pillow",
)
ON_GPU, CHECKED = " on the GPU", ", checked"  # after a rival's name
SIZE, BATCH, IMAGES = 224, 64, 384
AREAS = {"0.08-1": 0.08, "0.9-1": 0.9}  # name -> least area of a crop; the targets for speed are for the first
TURN_S, MOST_BATCHES = 0.7, 1000  # of a turn; MOST_BATCHES is per worker
IDLE_S, IDLE_SHARE, PATIENCE_S = 0.05, 0.1, 10.0  # idle: less than this share of one core for IDLE_S seconds
COMPARED = 48  # images whose pixels are compared and whose parts are timed
COPIES = 1000  # copies of the set under other row numbers, so that every row is new to our pipelines
HOST_TARGET, DALI_TARGET, PIXEL_TARGET, LOST_TARGET = 1.3, 1.2, 2.0, 0.03
GPU_BATCH, GPU_IMAGES, GPU_SIZE, GPU_PRESET, GPU_TURN_S = 256, 512, (500, 375), "vit-b16", 2.0


class Turn(NamedTuple):
    images_per_s: float
    cpu_share: float  # of all cores
    cpu_ms: float  # per image


def run(suite: Suite) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if device() == "cuda":
            on_gpu(suite, folder / "gpu")
        files = write_shards(folder / "mixed", IMAGES, seed=0)
        data = Collection([Shards(folder / "mixed")])
        _pixels(suite, data, files)
        _parts(suite, files[:COMPARED])
        for area in AREAS:
            _speed(suite, data, folder / "mixed", area)


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _loading(crops: Crops) -> Loading:
    return Loading(crops.batch, crops.size, min_crop_area=crops.least, threads=crops.workers, ahead=1)


def _dali(data: Collection, crops: Crops, device_id: int | None = None, checked: bool = False) -> Pipeline:
    """Our pipeline with DALI, which decodes on the CPU or on GPU device_id. Raises BackendError without DALI."""
    from lift_fast.data.dali import DaliPipeline

    return DaliPipeline(data, replace(_loading(crops), checked=checked), device_id)


def _feed(build: Callable[[], Pipeline]) -> Feed:
    """The batches of one of our pipelines, which holds those being read and as many again in DALI."""
    pipeline = build()
    return Feed((batch.pixels for batch in pipeline), held=2 * (1 + pipeline.loading.ahead))


def _speed(suite: Suite, data: Collection, folder: Path, area: str) -> None:
    crops = Crops(folder, BATCH, SIZE, AREAS[area], _cores())
    unseen = Collection(COPIES * data.sets)
    builds: dict[str, Callable[[], Feed]] = {
        HOST: partial(_feed, partial(HostPipeline, unseen, _loading(crops))),
        LOADER: partial(data_loader, crops),
        DALI: partial(_feed, partial(_dali, unseen, crops)),
        DALI + CHECKED: partial(_feed, partial(_dali, unseen, crops, checked=True)),
        READER: partial(dali_reader, crops),
        DRAFT: partial(data_loader, crops, draft=True),
        WEB: partial(webdataset, crops),
    }
    if device() == "cuda":
        builds[DALI + ON_GPU] = partial(_feed, partial(_dali, unseen, crops, 0))
        builds[READER + ON_GPU] = partial(dali_reader, crops, 0)
    rows = measure(suite, {"what of": "training crops", "area": area, "batch": BATCH, "size": SIZE}, builds)
    if AREAS[area] == min(AREAS.values()):
        suite.bar(f"area {area}: {HOST} faster than {LOADER}", faster(rows, HOST, LOADER), HOST_TARGET)
        suite.bar(f"area {area}: {DALI} faster than {LOADER}", faster(rows, DALI, LOADER), DALI_TARGET)


def measure(
    suite: Suite, case: Mapping[str, Any], builds: Mapping[str, Callable[[], Feed]], turn_s: float = TURN_S
) -> dict[str, Row]:
    """Opens the rivals, lets each have suite.repeats / 2 turns, and adds and returns a row for each.

    A rival that fails gets a note and no row.
    """
    name = ", ".join(str(value) for value in case.values())
    if suite.over():
        suite.note(f"out of time: not measured: {name}")
        return {}
    feeds = _opened(suite, name, builds, turn_s)
    turns: dict[str, list[Turn]] = {what: [] for what in feeds}
    order = list(feeds)
    for _ in range(ceil(suite.repeats / 2)):
        for what in order:
            turns[what].append(_turn(suite, *feeds[what]))
        order = order[1:] + order[:1]
        if suite.over():
            break
    feeds.clear()
    gc.collect()  # ends workers and DALI's threads
    rows = {what: {**case, "what": what, **_columns(measured)} for what, measured in turns.items()}
    for one in rows.values():
        suite.add(one)
    return rows


def _opened(
    suite: Suite, name: str, builds: Mapping[str, Callable[[], Feed]], turn_s: float
) -> dict[str, tuple[Feed, int]]:
    """The running rivals, each with the number of batches of a turn."""
    feeds = {}
    for what, build in builds.items():
        if suite.over():
            suite.note(f"out of time: not measured: {what}: {name}")
            continue
        try:
            feed = build()
            _take(feed, feed.held)
            begun = time.perf_counter()
            _take(feed, 2 * feed.at_once)
            seconds = (time.perf_counter() - begun) / 2
            feeds[what] = feed, feed.at_once * min(ceil(turn_s / seconds), MOST_BATCHES)
        except Exception as error:  # not installed, or any error of a rival; the remaining ones are measured
            suite.note(f"{what}: {name}: {one_line(error)}")
    return feeds


def _columns(turns: Sequence[Turn]) -> Row:
    speeds = [turn.images_per_s for turn in turns]
    return {
        "cores": _cores(),
        "turns": len(turns),
        "images_per_s": median(speeds),
        "spread": quartile_distance(speeds),
        "cpu_share": median(turn.cpu_share for turn in turns),
        "cpu_ms_per_image": median(turn.cpu_ms for turn in turns),
    }


def faster(rows: Mapping[str, Row], what: str, than: str) -> float | None:
    """How many times faster `what` is than `than`; None if either was not measured."""
    return rows[what]["images_per_s"] / rows[than]["images_per_s"] if what in rows and than in rows else None


def _turn(suite: Suite, feed: Feed, batches: int) -> Turn:
    if not _wait_until_idle():
        suite.note("rivals that had no turn kept the CPU busy: the figures include their work")
    _take(feed, feed.held)
    cpu, begun = _cpu_seconds(), time.perf_counter()
    images = _take(feed, batches)
    elapsed, spent = time.perf_counter() - begun, _cpu_seconds() - cpu
    return Turn(images / elapsed, spent / elapsed / _cores(), 1e3 * spent / images)


def _take(feed: Feed, batches: int) -> int:
    """Waits for the next batches and returns their number of images."""
    images = sum(len(pixels) for pixels in islice(feed.batches, batches))
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return images


def _wait_until_idle() -> bool:
    """Waits until this process and its workers use almost no CPU; False if they still do after PATIENCE_S."""
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        before = _cpu_seconds()
        time.sleep(IDLE_S)
        if _cpu_seconds() - before <= IDLE_SHARE * IDLE_S:
            return True
    return False


def _cpu_seconds() -> float:
    """CPU seconds that this process with all its threads and its living children have used."""
    ticks = 0
    for child in multiprocessing.active_children():
        # Splits after the name in parentheses, which may contain spaces: state is field 3, utime 14 and stime 15.
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def _pixels(suite: Suite, data: Collection, files: Sequence[bytes]) -> None:
    """Differences of evaluation images and training crops from Pillow's, which decodes whole images."""
    files = files[:COMPARED]
    reference = [pillow_centre(file) for file in files]
    found = [render_centre(file, read_header(file), SIZE) for file in files]
    largest = {HOST: _difference(suite, "evaluation pixels", None, HOST, np.stack(found), reference)}
    for what, device_id in _dali_devices().items():
        try:
            from lift_fast.data.dali import load_images

            pixels = load_images(data.sets[0], SIZE, device_id)[0][:COMPARED].cpu().numpy()
            largest[what] = _difference(suite, "evaluation pixels", None, what, pixels, reference)
        except Exception as error:
            suite.note(f"{what}: evaluation pixels: {one_line(error)}")
    for what in (HOST, DALI):
        suite.bar(
            f"evaluation pixels: {what}: levels of 255 from Pillow's", largest.get(what), PIXEL_TARGET, at_most=True
        )

    for area, least in AREAS.items():
        crops = Crops(Path(), min(COMPARED, len(data)), SIZE, least, _cores())
        builds = {what: partial(_dali, data, crops, device_id) for what, device_id in _dali_devices().items()}
        for what, build in {HOST: partial(HostPipeline, data, _loading(crops)), **builds}.items():
            try:
                batch = next(iter(build()))
            except Exception as error:
                suite.note(f"{what}: training pixels: {one_line(error)}")
                continue
            views = [(data.image_bytes(row), _view(data.image_bytes(row), row, crops)) for row in batch.rows.tolist()]
            reference = [pillow_view(file, view) for file, view in views]
            _difference(suite, "training pixels", area, what, batch.pixels.cpu().numpy(), reference)


def _dali_devices() -> dict[str, int | None]:
    """Our pipelines with DALI: name -> the GPU that decodes, None for the CPU."""
    return {DALI: None, DALI + ON_GPU: 0} if device() == "cuda" else {DALI: None}


def _view(file: bytes, row: int, crops: Crops) -> View:
    """The crop that a pipeline takes of an image in its first epoch."""
    header, loading = read_header(file), _loading(crops)
    return view_of(header.width, header.height, uniform(DRAWS, loading.seed, 0, row), loading)


def _difference(
    suite: Suite,
    what_of: str,
    area: str | None,
    what: str,
    found: np.ndarray,
    reference: Sequence[np.ndarray],
) -> int:
    """Adds a row with the differences in levels of 255, over all pixels and channels; returns the largest."""
    levels = np.abs(found.astype(np.int16) - np.stack(reference))
    row = {"what of": what_of, "area": area, "size": SIZE, "what": what, "against": "Pillow", "pictures": len(levels)}
    suite.add({**row, "mean_levels": float(levels.mean()), "max_levels": int(levels.max())})
    return int(levels.max())


def _parts(suite: Suite, files: Sequence[bytes]) -> None:
    """Milliseconds per image of each part of decoding, on one thread, for crops of the widest range of areas."""
    headers = [read_header(file) for file in files]
    loading = _loading(Crops(Path(), BATCH, SIZE, min(AREAS.values()), 1))
    draws = uniform(DRAWS, 0, 0, np.arange(len(files)))
    views = [view_of(h.width, h.height, u, loading) for h, u in zip(headers, draws, strict=True)]
    images = [Image.open(io.BytesIO(file)).convert("RGB") for file in files]
    cropped = [np.array(image)[_slices(view)] for image, view in zip(images, views, strict=True)]
    each = list(zip(files, headers, views, strict=True))
    parts: dict[str, Callable[[], object]] = {
        "read_header": lambda: [read_header(file) for file in files],
        "view_of": lambda: [view_of(h.width, h.height, u, loading) for h, u in zip(headers, draws, strict=True)],
        "decode": lambda: [decode(file, header) for file, header, _ in each],
        "decode_box": lambda: [decode_box(file, header, view.box, SIZE) for file, header, view in each],
        "resize": lambda: [resize(pixels, SIZE, SIZE) for pixels in cropped],
        "render": lambda: [render(file, header, view, SIZE) for file, header, view in each],
        "Pillow: decode": lambda: [Image.open(io.BytesIO(file)).convert("RGB") for file in files],
        "Pillow: resize": lambda: [_resized(image, view) for image, view in zip(images, views, strict=True)],
        "Pillow: all": lambda: [pillow_view(file, view) for file, _, view in each],
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        timings = interleaved_ms(parts, suite.repeats, warmup=1)
    finally:
        torch.set_num_threads(threads)
    for what, (middle, spread) in timings.items():
        row = {"what of": "a picture's parts", "what": what, "size": SIZE, "pictures": len(files), "threads": 1}
        suite.add({**row, "median_ms": middle / len(files), "spread_ms": spread / len(files)})


def _slices(view: View) -> tuple[slice, slice]:
    left, top, width, height = view.box
    return slice(top, top + height), slice(left, left + width)


def _resized(image: Image.Image, view: View) -> np.ndarray:
    left, top, width, height = view.box
    box = (left, top, left + width, top + height)
    return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=box))


def pillow_view(data: bytes, view: View) -> np.ndarray:
    """A training crop by Pillow, uint8 [SIZE, SIZE, 3]."""
    return _resized(Image.open(io.BytesIO(data)).convert("RGB"), view)


def pillow_centre(data: bytes) -> np.ndarray:
    """torchvision's Resize and CenterCrop by Pillow, uint8 [SIZE, SIZE, 3]."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    width, height = (int(SIZE * extent / min(image.size)) for extent in image.size)
    left, top = (round((extent - SIZE) / 2) for extent in (width, height))
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))[top : top + SIZE, left : left + SIZE]


def on_gpu(suite: Suite, folder: Path) -> None:
    """DALI's decoding on the GPU, and how much it slows down a training step that it feeds."""
    write_shards(folder, GPU_IMAGES, seed=1, size=GPU_SIZE)
    data = Collection([Shards(folder)])
    width, height = GPU_SIZE
    least = AREAS["0.9-1"]
    crops = Crops(folder, GPU_BATCH, SIZE, least, _cores())
    case = {"what of": f"{width}x{height} pictures", "area": "0.9-1", "batch": GPU_BATCH, "size": SIZE}
    unseen = Collection(COPIES * data.sets)
    builds = {DALI: partial(_feed, partial(_dali, unseen, crops, 0)), READER: partial(dali_reader, crops, 0)}
    measure(suite, case, {what + ON_GPU: build for what, build in builds.items()}, GPU_TURN_S)

    step = _step()
    pixels = torch.randint(256, (GPU_BATCH, SIZE, SIZE, 3), dtype=torch.uint8, device="cuda")

    def fed() -> Feed:
        feed = _feed(partial(_dali, unseen, crops, 0))
        return Feed(map(step, feed.batches), feed.held)

    def in_memory() -> Feed:
        return Feed(map(step, repeat(pixels)), held=2)

    case["what of"] = f"steps of {GPU_PRESET}"
    rows = measure(suite, case, {DALI + ON_GPU: fed, "pixels in memory": in_memory}, GPU_TURN_S)
    rate = faster(rows, DALI + ON_GPU, "pixels in memory")
    lost = None if rate is None else 1 - rate
    suite.bar(f"{GPU_PRESET}: part of a step's rate lost by feeding it with DALI", lost, LOST_TARGET, at_most=True)


def _step() -> Callable[[Tensor], Tensor]:
    """A function that trains a step in bfloat16, captured as a graph, on uint8 pixels on the GPU and returns them."""
    preset = PRESETS[GPU_PRESET]
    model = Lift(preset).to("cuda").train()
    optimizer = adamw(model, torch.tensor(1e-4, device="cuda"), fused=True, capturable=True)
    step = Step(model, ClipLoss(normalize=True), optimizer, precision=torch.bfloat16, graphed=True)
    codes = quantized(torch.randn(GPU_BATCH, preset.text_dim, device="cuda"))

    def call(pixels: Tensor) -> Tensor:
        step(pixels, codes, 1e-4)
        return pixels

    return call
