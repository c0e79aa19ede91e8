"""Shards that are cut, written to, replaced or damaged while a cache is open: the right rows or an error, no signal."""

import contextlib
import faulthandler
import mmap
import os
import resource
import shutil
import signal
import socket
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from support.judged import judged
from support.tiny_caches import data_of, vectors_of, write, writer_for

from lift_fast import _C
from lift_fast.cache import Cache, encode, key_hash
from lift_fast.cache import writer as cache_writer
from lift_fast.cache.manifest import MANIFEST, Manifest, Shard, shard_name
from lift_fast.cache.shard import content_bytes, header
from lift_fast.cache.tools import convert, merge
from lift_fast.errors import CacheError
from lift_fast.ops.rows.codecs import CODECS
from lift_fast.ops.rows.quantized import QuantizedRows
from lift_fast.text.cached import CachedText
from lift_fast.train.setup import Training

SIZES, DIM = [40, 50], 512
ROWS = sum(SIZES)
CUT = "text-00001.safetensors was cut short while it was mapped, or its disk cannot be read; remove it and run"
WRITTEN = "text-00001.safetensors was written to while it was mapped, and rows that were read meanwhile may be wrong"


@pytest.fixture
def cache(tmp_path):
    """An open cache of which each row has been read, and whose files are older than a tick of the clock of files."""
    write(tmp_path / "c", SIZES, DIM)
    for path in (tmp_path / "c").iterdir():
        os.utime(path, (1, 1))
    cache = Cache(tmp_path / "c")
    cache.rows(torch.arange(ROWS))
    return cache


def codes():
    return encode(vectors_of(ROWS, DIM), "int8").codes


def shard_of(cache):
    return cache.folder / "text-00001.safetensors"


def overwrite(path, data):
    """Writes to a file in place."""
    with open(path, "r+b") as file:
        file.write(data)
        file.truncate()


def later():
    """Waits until a cache looks at its files again."""
    time.sleep(0.06)


USES = {
    "rows": lambda cache: cache.rows(torch.arange(ROWS)),
    "widen": lambda cache: cache.widen(torch.tensor([ROWS - 1])),
    "vectors": lambda cache: cache.vectors(np.arange(ROWS)),
    "prefetch": lambda cache: cache.prefetch(torch.arange(ROWS)).result(),
    "find": lambda cache: cache.find(["key-0001"]),
    "check_keys": lambda cache: cache.check_keys(data_of(SIZES)),
    "check_data": lambda cache: cache.check_data(data_of(SIZES)),
    "views": lambda cache: read_views(cache.shard(1)),
}


def read_views(shard):
    shard.codes.sum()
    shard.check()


@pytest.mark.parametrize("size", [0, 100])
@pytest.mark.parametrize("use", USES)
def test_a_shard_that_is_cut_is_an_error_that_names_it(cache, use, size):
    data = shard_of(cache).read_bytes()
    os.truncate(shard_of(cache), size)  # the keys are in the first page, of which something may be left
    with pytest.raises(CacheError, match=CUT):
        USES[use](cache)
    with pytest.raises(CacheError, match=r"text-00001.safetensors is not the shard that the manifest describes"):
        USES[use](cache)
    assert cache.rows(torch.arange(40)).codes.equal(codes()[:40])
    overwrite(shard_of(cache), data)
    USES[use](cache)
    assert cache.rows(torch.arange(ROWS)).codes.equal(codes())


def test_keys_of_a_shard_that_is_cut(cache):
    assert cache.find(["key-0080"]).tolist() == [80]
    data = shard_of(cache).read_bytes()
    os.truncate(shard_of(cache), 0)
    with pytest.raises(CacheError, match=CUT):
        cache.find(["key-0080"])
    overwrite(shard_of(cache), data)
    assert cache.find(["key-0080"]).tolist() == [80]


def test_a_shard_that_is_cut_within_a_page(cache):
    """What is left of the page reads as zeros, without a signal."""
    os.truncate(shard_of(cache), shard_of(cache).stat().st_size - 100)
    cache.rows(torch.tensor([40]))
    later()
    with pytest.raises(CacheError, match=CUT):
        cache.rows(torch.tensor([ROWS - 1]))
    with pytest.raises(CacheError, match="text-00001.safetensors is damaged: it has"):
        cache.rows(torch.tensor([ROWS - 1]))


def test_a_shard_that_is_written_to_in_place(cache):
    data = shard_of(cache).read_bytes()
    overwrite(shard_of(cache), data[:-DIM] + bytes(DIM))
    later()
    with pytest.raises(CacheError, match=WRITTEN):
        cache.rows(torch.tensor([ROWS - 1]))
    for _ in range(2):  # it has its length and its header, and is used no more
        with pytest.raises(CacheError, match="text-00001.safetensors is damaged: its checksum"):
            cache.rows(torch.tensor([ROWS - 1]))
    overwrite(shard_of(cache), data)
    assert cache.rows(torch.arange(ROWS)).codes.equal(codes())


def test_it_is_found_at_the_end_of_an_epoch_by_who_has_read_from_it(cache):
    overwrite(shard_of(cache), shard_of(cache).read_bytes())
    cache.check_unchanged()  # since the last look nobody has read
    with pytest.raises(CacheError, match=WRITTEN):
        cache.rows(torch.tensor([ROWS - 1]))  # finds it itself on a machine that is slow
        cache.check_unchanged()
    cache.check_unchanged()
    assert cache.rows(torch.arange(ROWS)).codes.equal(codes())  # it was written with the same bytes


def test_it_is_found_before_a_run_writes_a_checkpoint(cache):
    """By Training.check_text, which asks the text."""
    text = CachedText.__new__(CachedText)
    text.caches = [cache]
    overwrite(shard_of(cache), shard_of(cache).read_bytes())
    training = Training.__new__(Training)
    training.text = text
    with pytest.raises(CacheError, match=WRITTEN):
        text.rows(torch.tensor([ROWS - 1]))  # finds it itself on a machine that is slow
        training.check_text()


def test_new_times_do_not_hide_new_content(cache):
    data, status = shard_of(cache).read_bytes(), shard_of(cache).stat()
    overwrite(shard_of(cache), data[:-DIM] + bytes(DIM))
    os.utime(shard_of(cache), ns=(status.st_atime_ns, status.st_mtime_ns))
    later()
    with pytest.raises(CacheError, match="text-00001.safetensors is damaged: its checksum"):
        cache.rows(torch.tensor([ROWS - 1]))


def replaced(path):
    path.with_suffix(".new").write_bytes(b"other")
    os.replace(path.with_suffix(".new"), path)


@pytest.mark.parametrize(
    "change",
    [
        lambda path: path.unlink(),
        replaced,
        lambda path: (path.unlink(), path.mkdir()),
        lambda path: path.chmod(0o600),
        lambda path: os.link(path, path.with_suffix(".link")),
        lambda path: path.rename(path.with_suffix(".moved")),
        lambda path: shutil.rmtree(path.parent),
    ],
    ids=["removed", "replaced", "a folder", "other rights", "another name", "moved", "no folder"],
)
def test_what_is_mapped_stays_when_the_name_is_given_away(cache, change):
    change(shard_of(cache))
    later()
    for _ in range(2):
        assert cache.rows(torch.arange(ROWS)).codes.equal(codes())
        cache.check_unchanged()
    assert cache.find(["key-0080"]).tolist() == [80]


def test_threads_read_while_a_shard_is_cut_and_restored(cache):
    """Each result is right or an error, and in the end all rows are there again."""
    data, wanted, ended, found = shard_of(cache).read_bytes(), codes(), threading.Event(), []

    def read(seed):
        index = torch.from_numpy(np.random.default_rng(seed).integers(0, ROWS, 60))
        while not ended.is_set():
            try:
                found.append(cache.rows(index).codes.equal(wanted[index]))
            except CacheError as error:
                found.append("text-00001" in str(error))

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(20):
        os.truncate(shard_of(cache), 4096)  # nothing of the codes is left
        time.sleep(0.005)
        other = shard_of(cache).with_suffix(".part")
        other.write_bytes(data)
        os.replace(other, shard_of(cache))
        time.sleep(0.005)
    ended.set()
    for thread in threads:
        thread.join()
    assert found and all(found)
    for _ in range(3):
        with contextlib.suppress(CacheError):
            cache.rows(torch.arange(ROWS))
    assert cache.rows(torch.arange(ROWS)).codes.equal(wanted)


@pytest.mark.parametrize("tool", ["written", "expect"])
def test_a_writer_whose_shard_is_cut_meanwhile(tmp_path, monkeypatch, tool):
    """Rows of zeros must not be copied into another shard, nor wrong keys compared."""
    write(tmp_path / "c", SIZES, DIM, shards=[0], finish=False)
    path, mapped = tmp_path / "c" / "text-00000.safetensors", cache_writer.map_shard

    def cut(*arguments):
        shard = mapped(*arguments)
        os.truncate(path, 0)
        return shard

    writer = writer_for(tmp_path / "c", SIZES, DIM)
    monkeypatch.setattr(cache_writer, "map_shard", cut)
    monkeypatch.setattr(cache_writer, "check_content", lambda *arguments: None)
    with pytest.raises(CacheError, match="text-00000.safetensors was cut short while it was mapped"):
        if tool == "written":
            writer.written(0, torch.arange(3))
        else:
            writer.expect(0, data_of(SIZES).keys[:40], "c" * 32)


# the signal


def maps(path, count):
    with open(path, "rb") as file:
        return [_C.Mapping(file.fileno(), 8192) for _ in range(count)]


def test_thousands_of_maps_are_told_apart(tmp_path):
    for name in "ab":
        (tmp_path / name).write_bytes(b"x" * 8192)
    both = [each for pair in zip(maps(tmp_path / "a", 1500), maps(tmp_path / "b", 1500), strict=True) for each in pair]
    del both[100:2000:3]
    kept = [*both, *maps(tmp_path / "b", 700)]
    before = _C.lost_mappings()
    os.truncate(tmp_path / "a", 0)
    for each in kept:
        assert bytes(memoryview(each)[5000:5002]) in (b"xx", b"\0\0")
        assert each.lost == (bytes(memoryview(each)[:1]) == b"\0")
    lost = sum(each.lost for each in kept)
    assert lost == _C.lost_mappings() - before and 800 < lost < 1500


def test_arguments_of_a_map(tmp_path):
    (tmp_path / "a").write_bytes(b"x")
    with open(tmp_path / "a", "rb") as file:
        for size in (0, -1):
            with pytest.raises(ValueError, match=f"a mapping has at least 1 byte, not {size}"):
                _C.Mapping(file.fileno(), size)
        with pytest.raises(OSError, match="Cannot allocate memory"):
            _C.Mapping(file.fileno(), 1 << 60)
    with pytest.raises(OSError, match="Bad file descriptor"):
        _C.Mapping(10**6, 1)


def enable(folder):
    faulthandler.enable(open(folder / "trace", "w"))  # noqa: SIM115


def read_elsewhere(folder):
    """Reads from a cut file that this package has not mapped."""
    (folder / "other").write_bytes(b"x" * 8192)
    with open(folder / "other", "r+b") as file:
        memory = mmap.mmap(file.fileno(), 8192)
    os.truncate(folder / "other", 0)
    memory[5000]


def send(folder):
    os.kill(os.getpid(), signal.SIGBUS)
    time.sleep(0.1)


HANDLERS = {
    "none": lambda folder: faulthandler.disable(),
    "faulthandler": enable,
    "torch's of a worker": lambda folder: torch._C._set_worker_signal_handlers(),
    "ignored": lambda folder: signal.signal(signal.SIGBUS, signal.SIG_IGN),
}


@pytest.mark.parametrize("when", ["before", "after", "both"])
@pytest.mark.parametrize("handler", HANDLERS)
@pytest.mark.parametrize("fault", [read_elsewhere, send])
def test_other_faults_go_to_the_handler_that_was_there(tmp_path, handler, when, fault):
    """The process ends by the signal, as without lift-fast, and what handles it otherwise has its say; a handler that
    is installed later does not keep cut shards from being errors."""
    write(tmp_path / "c", [9], DIM)
    process = os.fork()
    if process == 0:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            faulthandler.disable()
            signal.signal(signal.SIGBUS, signal.SIG_DFL)
            if when != "after":
                HANDLERS[handler](tmp_path)
            cache = Cache(tmp_path / "c")
            cache.rows(torch.arange(9))
            if when != "before":
                HANDLERS[handler](tmp_path)
            os.truncate(tmp_path / "c" / "text-00000.safetensors", 0)
            try:
                cache.rows(torch.arange(9))
            except CacheError as error:
                (tmp_path / "said").write_text(str(error))
            signal.alarm(10)
            fault(tmp_path)
        finally:
            os._exit(7)
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    assert "was cut short" in (tmp_path / "said").read_text()
    assert status == (7 if handler == "ignored" and fault is send else -signal.SIGBUS)
    if handler == "faulthandler":
        assert "Fatal Python error: Bus error" in (tmp_path / "trace").read_text()


# what is opened


@pytest.mark.parametrize("kind", ["pipe", "folder", "socket", "loop", "device"])
def test_a_shard_that_is_no_file_is_an_error_at_once(tmp_path, kind, monkeypatch):
    write(tmp_path / "c", SIZES, DIM)
    path = tmp_path / "c" / "text-00001.safetensors"
    path.unlink()
    monkeypatch.chdir(tmp_path)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "socket":
        socket.socket(socket.AF_UNIX).bind(os.path.relpath(path))
    else:
        path.symlink_to("/dev/zero" if kind == "device" else path.name)
    cache = Cache(tmp_path / "c")
    for use in (lambda: cache.rows(torch.tensor([60])), cache.verify, lambda: cache.find(["key-0001"])):
        found = judged(use, seconds=20)
        assert found.outcome == "error" and "text-00001.safetensors cannot be read" in found.message


@pytest.mark.parametrize("codec", ["int8", "int8r", "int4r", "int2r", "fp8", "bf16", "f32"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_verify_refuses_rows_that_are_not_finite(tmp_path, codec, value):
    """Under checksums that agree; convert and merge do not pass them on."""
    kind, writer = CODECS[codec], writer_for(tmp_path / "c", SIZES, DIM, codec=codec)
    keys = [[key_hash(key) for key in data_of(SIZES).shard_keys(number)] for number in range(2)]
    for number, size in enumerate(SIZES):
        rotation = Manifest.rotated_by(writer._manifest)
        rows = encode(vectors_of(size, DIM), codec, rotation)
        if number == 1 and kind.scaled and not (codec == "fp8" and value > 0):
            rows = QuantizedRows(rows.codes, rows.scales.index_fill(0, torch.tensor([17, 30]), value), codec, DIM)
        elif number == 1:
            # e4m3 has two NaNs and nothing infinite.
            bad = torch.tensor(0x7F, dtype=torch.uint8).view(kind.dtype) if codec == "fp8" else torch.tensor(value)
            rows.codes.view(-1)[17 * DIM + DIM - 1 :: DIM] = bad.to(kind.dtype)
        writer.write_shard(number, rows, keys[number])
    writer.finish()
    cache = Cache(tmp_path / "c")
    words = "text-00001.safetensors: row 17 is not finite, which no vector of an encoder is; remove it"
    with pytest.raises(CacheError, match=f"1 of 2 shards cannot be trusted:\n.*{words}"):
        cache.verify()
    with pytest.raises(CacheError, match=words):
        convert(cache, tmp_path / "out", "f32" if codec != "f32" else "bf16", progress=False)
    with pytest.raises(CacheError, match=words):
        merge([cache, cache], tmp_path / "both", progress=False)


def sparse_cache(folder, rows):
    """A cache of zeros in one sparse file."""
    folder.mkdir()
    manifest = Manifest(4096, "int8", "txt", {"name": "none"}, (Shard(shard_name(0), rows, "0.tar", "0" * 64),))
    with open(folder / shard_name(0), "wb") as file:
        file.write(header(manifest, 0, manifest.shards[0]))
        file.truncate(file.tell() + content_bytes(manifest, manifest.shards[0]))
    (folder / MANIFEST).write_bytes(manifest.to_json())


def test_a_system_that_does_not_map_a_shard(tmp_path):
    sparse_cache(tmp_path / "c", 1 << 18)  # 1 GiB

    def read():
        used = int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE
        resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 29), used + (1 << 29)))
        cache = Cache(tmp_path / "c")
        with pytest.raises(CacheError, match="cannot be mapped into memory: Cannot allocate.*ulimit -v.*max_map_count"):
            cache.rows(torch.arange(3))
        with pytest.raises(CacheError, match="cannot be mapped into memory"):
            cache.find(["a"])

    judged(read)


def test_no_thread_can_be_started(cache, monkeypatch):
    def refuse(thread):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        for use in (
            cache.verify,
            lambda: cache.prefetch(torch.arange(3)),
            lambda: USES["check_data"](captioned(cache)),
        ):
            with pytest.raises(CacheError, match=r"needs a thread, and none was started \(can't start.*ulimit -u"):
                use()
    assert cache.prefetch(torch.arange(3)).result().codes.equal(codes()[:3])
    Cache(cache.folder).verify()


def captioned(cache):
    """The same cache, with digests of captions, so that check_data reads them."""
    shards = tuple(Shard(**{**vars(shard), "captions": "c" * 32}) for shard in cache.manifest.shards)
    cache.manifest = Manifest(**{**vars(cache.manifest), "shards": shards})
    return cache
