"""Reading a cache while other threads change the row numbers, and in forked processes, whatever other threads do."""

import mmap
import multiprocessing
import os
import signal
import threading
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from support.judged import judged
from support.tiny_caches import write
from torch.utils.data import DataLoader, Dataset

from lift_fast import _C
from lift_fast.cache import Cache, encode
from lift_fast.ops.rows.codecs import CODECS
from lift_fast.ops.rows.dequant import dequant
from lift_fast.text.cached import CachedText

SIZES, DIM = [500, 300, 200], 64
ROWS = sum(SIZES)


@contextmanager
def changing(*contents):
    """An index, int64 [m], into which another process writes one of `contents` after another while the block runs: it
    needs no lock of this process's Python."""
    index = np.frombuffer(mmap.mmap(-1, contents[0].nbytes), np.int64)
    index[:] = contents[0]
    parent = os.getpid()
    process = os.fork()
    if process == 0:
        while os.getppid() == parent:  # which a wild number may have ended
            for content in contents:
                index[:] = content
                for _ in range(500):  # some 10 us, as long as a gather
                    pass
        os._exit(0)
    try:
        yield index
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)


def some_rows(seed, m=3000):
    """Row numbers of one byte: numbers of two contents that are mixed byte by byte, as some ways to copy memory do, are
    those of either."""
    return np.random.default_rng(seed).integers(0, 256, m)


def wild(rows):
    """Numbers far outside, mixed with `rows` in the same way."""
    return np.where(np.arange(len(rows)) % 2, rows + 2**62, rows + -(2**63))


def table_of(codes):
    """A table of the engine in one piece of int8 rows, kept by the caller."""
    table = _C.Table(CODECS["int8"].number, codes.shape[1], np.array([0, len(codes)]))
    table.map(0, codes.ctypes.data, 0)
    return table


# row numbers


@pytest.mark.parametrize("use", ["gather", "unmapped", "advise", "dequant_cpu"])
def test_the_engine_uses_the_row_numbers_that_it_has_checked(use):
    """Each row of the result is that of either content."""
    one, two = some_rows(1), some_rows(2)
    codes = np.random.default_rng(0).integers(-128, 128, (ROWS, DIM), np.int8)
    scales = np.ones(ROWS, np.float32)

    def many_gathers():
        table, right = table_of(codes), 0
        out = np.empty((len(one), DIM), np.int8)
        with changing(one, wild(one), two, one, two) as index:
            at = index.ctypes.data
            for _ in range(1000):
                out[:] = 0
                try:
                    if use == "gather":
                        table.gather(at, len(one), out.ctypes.data, 0, 4, False, 2)
                    elif use == "dequant_cpu":
                        _C.dequant_cpu(
                            codes=codes.ctypes.data, scales=scales.ctypes.data, rows=at, out=out.ctypes.data, n=ROWS,
                            m=len(one), dim=DIM, codes_stride=DIM, scales_stride=1, codec=CODECS["int8"].number, type=3,
                            normalize=False, threads=2,
                        )  # fmt: skip
                    else:
                        getattr(table, use)(at, len(one))
                        right += 1
                        continue
                except IndexError:
                    continue
                right += 1
                assert ((out == codes[one]).all(1) | (out == codes[two]).all(1)).all()
        return right

    assert judged(many_gathers).value > 0


@pytest.mark.parametrize("backend", ["cpp", "torch"])
def test_dequant_of_an_index_that_changes(backend):
    one, two = some_rows(1, 500), some_rows(2, 500)
    codes, scales = torch.randint(-128, 128, (ROWS, DIM), dtype=torch.int8), torch.ones(ROWS)
    wide = codes.numpy().astype(np.float32)

    def many():
        with changing(one, wild(one), two, one, two) as index:
            for _ in range(300):
                try:
                    out = dequant(codes, scales, torch.from_numpy(index), backend=backend).numpy()
                except IndexError:
                    continue
                assert ((out == wide[one]).all(1) | (out == wide[two]).all(1)).all()

    judged(many)


def test_a_cache_reads_right_rows_of_an_index_that_changes(tmp_path):
    vectors = write(tmp_path / "c", SIZES, DIM)
    codes = encode(vectors, "int8").codes.numpy()
    one, two = some_rows(1), some_rows(2)

    def many():
        cache = Cache(tmp_path / "c")
        with changing(one, wild(one), two, one, two) as index:
            for turn in range(300):
                use = (cache.rows, lambda rows: cache.prefetch(rows).result())[turn % 2]
                try:
                    out = use(torch.from_numpy(index)).codes.numpy()
                except IndexError:
                    continue
                assert ((out == codes[one]).all(1) | (out == codes[two]).all(1)).all()

    judged(many)


def test_prefetch_has_copied_the_row_numbers_when_it_returns(tmp_path):
    vectors = write(tmp_path / "c", SIZES, DIM)
    cache, index = Cache(tmp_path / "c"), torch.arange(100)
    with cache._lock:  # the thread waits here
        ahead = cache.prefetch(index)
        index += 500
    assert ahead.result().codes.equal(encode(vectors, "int8").codes[:100])


@pytest.mark.parametrize(
    "rows",
    [
        torch.ones(ROWS, dtype=torch.bool),
        np.ones(ROWS, bool),
        torch.tensor([0.0, 1.0]),
        torch.tensor([1.0], dtype=torch.bfloat16),
        np.array([0.0, 1.5]),
        np.array([1 + 0j]),
        np.array(["1"]),
    ],
    ids=lambda rows: str(rows.dtype),
)
def test_masks_and_floats_are_no_row_numbers(tmp_path, rows):
    write(tmp_path / "c", SIZES, DIM)
    cache = Cache(tmp_path / "c")
    name = str(rows.dtype).replace(".", r"\.")
    for use in (cache.rows, cache.widen, cache.vectors, cache.prefetch):
        with pytest.raises(TypeError, match=rf"rows are row numbers, integers such as int64, not {name}; for a mask"):
            use(rows)


@pytest.mark.parametrize("dtype", ["uint8", "int16", "int32", "uint32", "uint64"])
def test_integers_of_any_width_are_row_numbers(tmp_path, dtype):
    vectors = write(tmp_path / "c", SIZES, DIM)
    cache, index = Cache(tmp_path / "c"), np.array([3, 1, 200], dtype)
    assert cache.rows(index).codes.equal(encode(vectors, "int8").codes[[3, 1, 200]])
    if hasattr(torch, dtype) and not dtype.startswith("uint") or dtype == "uint8":
        assert cache.rows(torch.from_numpy(index)).codes.equal(encode(vectors, "int8").codes[[3, 1, 200]])
    with pytest.raises(ValueError, match=r"rows must be \[m\], not \[3, 1\]"):
        cache.prefetch(index[:, None])


def test_several_caches_take_row_numbers_alone():
    text = CachedText.__new__(CachedText)
    text.caches, text.starts = [None, None], np.array([0, 4, 9])
    with pytest.raises(TypeError, match=r"not torch\.bool"):
        text.rows(torch.ones(9, dtype=torch.bool))


# forks


@contextmanager
def busy(cache, folder):
    """Threads that gather from a cache, map its shards anew, prefetch and find without a pause."""
    ended = threading.Event()
    index = torch.arange(ROWS)

    def gather():
        while not ended.is_set():
            cache.widen(index)

    def remap():
        while not ended.is_set():
            other = Cache(folder)  # its memory is that of the shared pool
            other.rows(index)
            other.find(["key-0001"])
            for number in range(len(SIZES)):
                with cache._lock:
                    cache._forget(number)

    def ahead():
        while not ended.is_set():
            cache.prefetch(index).result()

    threads = [threading.Thread(target=work) for work in (gather, remap, ahead)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        for thread in threads:
            thread.join()


def forks(folder, count, tally):
    """Forks while other threads read, in this process with torch's threads started; each child reads as well."""
    wanted = encode(write(folder, SIZES, DIM), "int8")
    cache, wide, index = Cache(folder), wanted.widen(), torch.arange(ROWS)
    cache.widen(index)

    def read():
        assert cache.rows(index).codes.equal(wanted.codes)
        assert cache.prefetch(index[:300]).result(timeout=20).codes.equal(wanted.codes[:300])
        assert cache.widen(index).equal(wide)
        assert cache.find(["key-0007", "none"]).tolist() == [7, -1]
        out, many = torch.empty(40 * ROWS, DIM), index.repeat(40)
        _C.dequant_cpu(  # in several threads, in memory of the shared pool
            codes=wanted.codes.data_ptr(), scales=wanted.scales.data_ptr(), rows=many.data_ptr(), out=out.data_ptr(),
            n=ROWS, m=len(many), dim=DIM, codes_stride=DIM, scales_stride=1, codec=CODECS["int8"].number, type=0,
            normalize=False, threads=2,
        )  # fmt: skip
        assert (out.view(40, ROWS, DIM).numpy() == wide.numpy()).all()

    with busy(cache, folder):
        for _ in range(count):
            tally("fork", judged(read, seconds=30).outcome)
    assert cache.rows(index).codes.equal(wanted.codes)


@pytest.mark.attack
def test_a_forked_process_reads_while_threads_of_its_parent_do(tmp_path, tally):
    forks(tmp_path / "c", 30, tally)


@pytest.mark.campaign
@pytest.mark.parametrize("part", range(4))
def test_many_forked_processes_read(tmp_path, tally, part):
    forks(tmp_path / "c", 50, tally)


def test_a_fork_while_the_lock_of_a_cache_is_held(tmp_path):
    """By a thread that the child does not have; the prefetcher's is gone, too."""
    wanted = encode(write(tmp_path / "c", SIZES, DIM), "int8").codes
    cache, held, ended = Cache(tmp_path / "c"), threading.Event(), threading.Event()
    cache.prefetch(torch.arange(3)).result()

    def hold():
        with cache._lock:
            held.set()
            ended.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    try:

        def read():
            assert cache.prefetch(torch.arange(ROWS)).result(timeout=20).codes.equal(wanted)
            assert cache.find(["key-0003"]).tolist() == [3]
            cache.verify()

        judged(read, seconds=30)
    finally:
        ended.set()
        thread.join()


def test_a_forked_process_reads_without_pinned_memory(tmp_path):
    """CUDA allocates it, which does not work after a fork; and without a GPU torch refuses it in any process."""
    wanted = encode(write(tmp_path / "c", SIZES, DIM), "int8")
    cache = Cache(tmp_path / "c")
    cache._pin = True

    def read():
        assert cache.rows(torch.arange(ROWS)).codes.equal(wanted.codes)
        assert cache.widen(torch.arange(ROWS)).equal(wanted.widen())

    judged(read)


class Numbers(Dataset):
    """Rows of a cache as a DataLoader's workers read them: opened before they start, or by themselves when sent."""

    def __init__(self, cache):
        self.cache = cache

    def __len__(self):
        return len(self.cache)

    def __getitem__(self, row):
        index = torch.tensor([row])
        return torch.cat([self.cache.rows(index).codes, self.cache.prefetch(index).result().codes])


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_workers_of_a_data_loader_read_from_a_cache(tmp_path, method):
    wanted = encode(write(tmp_path / "c", [20, 15], DIM), "int8").codes
    cache = Cache(tmp_path / "c")
    cache.prefetch(torch.arange(35)).result()
    loader = DataLoader(
        Numbers(cache),
        batch_size=7,
        num_workers=2 if method == "fork" else 1,
        multiprocessing_context=multiprocessing.get_context(method),
        timeout=60,
    )
    ended, index = threading.Event(), torch.arange(35)

    def gather():
        while not ended.is_set():
            cache.widen(index)

    thread = threading.Thread(target=gather)
    thread.start()
    try:
        found = torch.cat(list(loader))
    finally:
        ended.set()
        thread.join()
    assert found[:, 0].equal(wanted) and found[:, 1].equal(wanted)
