"""Tar shards: what other tools write, damage, hostile tars, and the index."""

import io
import os
import random
import resource
import signal
import tarfile

import pytest
from PIL import Image
from support.threads import in_threads
from support.tiny_sets import keys_of, make_set, png

from lift_fast.data.index import build_index
from lift_fast.data.reading import FILES, OpenFiles, stamp_of
from lift_fast.data.samples import BadSample, Collection
from lift_fast.data.shards import Shards, ShardWriter
from lift_fast.errors import DataError


def test_round_trip(tmp_path):
    shards = make_set(tmp_path / "set")
    assert len(shards) == 10
    assert shards.shard_sizes == [4, 4, 2]
    assert [path.name for path in shards.paths] == ["00000.tar", "00001.tar", "00002.tar"]
    assert keys_of(shards) == [f"s0-{i:03d}" for i in range(10)]
    rng = random.Random(0)
    for i in range(10):
        assert shards.image_bytes(i) == png(rng)
        assert shards.caption(i) == f"caption {i}"
        assert shards.caption(i, "long") == f"long caption {i}"
    assert not list(tmp_path.glob("*.partial*"))


def test_reads_what_other_tools_write(tmp_path):
    """GNU tar's and img2dataset's habits: ./ before names, folders, JPEG, upper case, several dots."""
    out = io.BytesIO()
    Image.new("RGB", (5, 5), "red").save(out, "JPEG")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        folder = tarfile.TarInfo("./part")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name, data in (
            ("./part/7.JPG", out.getvalue()),
            ("./part/7.txt", b" red \n"),
            ("./part/7.seg.png", b"x"),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    shards = Shards(tmp_path)
    assert len(shards) == 1
    assert shards.image_bytes(0) == out.getvalue()
    assert shards.caption(0) == "red"
    assert shards.meta(0) == {}


def test_missing_and_empty(tmp_path):
    with pytest.raises(DataError, match="no data set"):
        Shards(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"no \.tar"):
        Shards(tmp_path)
    tarfile.open(tmp_path / "00000.tar", "w").close()
    with pytest.raises(DataError, match="hold no sample"):
        Shards(tmp_path)


def test_a_tar_cut_anywhere_is_told(tmp_path):
    make_set(tmp_path / "set", count=3, per_shard=100)
    file = tmp_path / "set" / "00000.tar"
    data = file.read_bytes()
    whole = len(data.rstrip(b"\0")) // 512 * 512 + 512 + 1024  # behind its end mark tarfile pads to 10 240 bytes
    for size in [*range(0, whole, 512), *random.Random(0).sample(range(whole), 50), whole - 1]:
        file.write_bytes(data[:size])
        with pytest.raises(DataError, match=r"00000\.tar"):
            Shards(tmp_path / "set")
    file.write_bytes(data[:whole])
    assert len(Shards(tmp_path / "set")) == 3


def test_random_bytes_are_no_tar(tmp_path):
    (tmp_path / "x.tar").write_bytes(random.Random(0).randbytes(5000))
    with pytest.raises(DataError, match="x.tar"):
        Shards(tmp_path)


def test_a_missing_caption_names_the_sample(tmp_path):
    with ShardWriter(tmp_path / "set") as writer:
        writer.write("a", b"", "fine", {})
        writer.write("b", b"", "  ", {})
    shards = Shards(tmp_path / "set")
    with pytest.raises(DataError, match="'b' has no caption 'txt'"):
        shards.caption(1)
    with pytest.raises(DataError, match="'a' has no caption 'long'"):
        shards.caption(0, "long")
    (bad,) = Collection([shards]).bad_captions("txt").items()
    assert bad[0] == 1 and "'b'" in str(bad[1])


def test_metadata_that_does_not_parse(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in (("1.json", b"{"), ("2.json", b"[1]")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    for i, match in ((0, "parse"), (1, "object")):
        with pytest.raises(DataError, match=match):
            Shards(tmp_path).meta(i)


@pytest.mark.attack
def test_more_shards_than_files_may_be_open(tmp_path, monkeypatch):
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    shards = make_set(tmp_path / "set", 200, per_shard=1)
    FILES.forget()  # what other tests left open
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 100, limits[1]))
    try:
        monkeypatch.setattr("lift_fast.data.shards.FILES", OpenFiles())  # as in a process that begins with this limit
        opened = Shards(shards.folder)
        assert [opened.caption(i) for i in range(200)] == [f"caption {i}" for i in range(200)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_a_writer_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), ShardWriter(tmp_path / "set") as writer:
        writer.write("a", b"", "x", {})
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    with pytest.raises(DataError, match="dot"), ShardWriter(tmp_path / "set") as writer:
        writer.write("a.b", b"", "x", {})
    assert not list(tmp_path.iterdir())


def test_a_writer_overwrites_nothing(tmp_path):
    make_set(tmp_path / "set")
    with pytest.raises(DataError, match="exists"):
        ShardWriter(tmp_path / "set")


# ---- reading


def test_a_shard_that_vanishes_or_shrinks_while_it_is_read(tmp_path):
    folder = make_set(tmp_path / "set", 8, per_shard=4).folder
    for index in (False, True):
        if index:
            build_index(folder, 1, progress=False)
        shards = Shards(folder)
        path = folder / "00001.tar"
        data, times = path.read_bytes(), path.stat()
        path.unlink()
        with pytest.raises(BadSample, match="unreadable: .*00001.tar: sample 's0-004': No such file") as error:
            shards.image_bytes(4)
        assert error.value.cause == "unreadable"
        with pytest.raises(DataError, match="00001.tar: sample 's0-004': the shard cannot be read"):
            shards.caption(4)
        path.write_bytes(data[:600])
        with pytest.raises(BadSample, match="unreadable: .*cut short"):
            shards.image_bytes(4)
        with pytest.raises(DataError, match="cut short"):
            shards.caption(5)
        assert shards.caption(0) == "caption 0"
        path.write_bytes(data)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_numbers_that_no_sample_has(tmp_path):
    shards = make_set(tmp_path / "set", 5)
    for number in (-1, 5, 1 << 40):
        for read in (shards.image_bytes, shards.caption, shards.meta, shards.where):
            with pytest.raises(IndexError, match="of 5 at"):
                read(number)


def test_pictures_and_texts_that_are_too_large(tmp_path, monkeypatch):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, size in (("a.png", 1001), ("a.txt", 101), ("a.json", 101), ("b.png", 1000), ("b.txt", 100)):
            info = tarfile.TarInfo(name)
            info.size = size
            tar.addfile(info, io.BytesIO(b"x" * size))
    monkeypatch.setattr("lift_fast.data.shards.MOST_BYTES", 1000)
    monkeypatch.setattr("lift_fast.data.shards._MOST_TEXT", 100)
    shards = Shards(tmp_path)
    with pytest.raises(BadSample, match="too large: .*'a' has 1001 bytes"):
        shards.image_bytes(0)
    for read in (shards.caption, shards.meta):
        with pytest.raises(DataError, match="'a': a text of 101 bytes"):
            read(0)
    assert len(shards.image_bytes(1)) == 1000 and len(shards.caption(1)) == 100


def test_metadata_of_null_is_no_caption(tmp_path):
    with ShardWriter(tmp_path / "set") as writer:
        writer.write("a", b"", "x", {"caption": None, "number": 7})
    shards = Shards(tmp_path / "set")
    with pytest.raises(DataError, match="'a' has no caption 'caption'"):
        shards.caption(0, "caption")
    with pytest.raises(DataError, match="'a': 'number' is the number 7, not text"):
        shards.caption(0, "number")


def test_few_files_stay_open(tmp_path):
    shards = make_set(tmp_path / "set", 200, per_shard=1)
    rng = random.Random(0)
    want = [png(rng) for _ in range(200)]
    before = len(os.listdir("/proc/self/fd"))
    for i in [*range(200), *reversed(range(200))]:
        assert shards.image_bytes(i) == want[i]
    assert len(os.listdir("/proc/self/fd")) <= before + 128
    FILES.forget()
    assert len(os.listdir("/proc/self/fd")) <= before


def test_threads_read_while_files_are_closed(tmp_path):
    """More shards than files are kept, read at once from many threads: never another file's bytes, never a closed
    descriptor."""
    shards = make_set(tmp_path / "set", 60, per_shard=1)
    files, wrong = OpenFiles(), []
    stamps = [stamp_of(path.stat()) for path in shards.paths]
    files._most = 3
    want = [shards.paths[i].read_bytes() for i in range(60)]

    def work(seed):
        rng = random.Random(seed)
        for _ in range(500):
            i = rng.randrange(60)
            at = rng.randrange(len(want[i]) - 10)
            try:
                if files.read(shards.paths[i], stamps[i], at, 10) != want[i][at : at + 10]:
                    wrong.append(i)
            except OSError as error:
                wrong.append(error)

    in_threads(8, work)
    assert not wrong and len(files._open) == 3


def test_a_fork_reads_on_though_a_thread_held_the_lock(tmp_path):
    shards = make_set(tmp_path / "set", 4, per_shard=2)
    shards.caption(0)
    with FILES._lock:
        child = os.fork()
        if not child:
            signal.alarm(20)  # rather than wait for ever
            os._exit(0 if shards.caption(3) == "caption 3" else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert shards.caption(1) == "caption 1"
