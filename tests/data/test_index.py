"""The index of a folder of tars: tars.py finds the members that tarfile finds; the index file, its age and damage."""

import io
import os
import random
import struct
import tarfile
import threading
import tracemalloc
import zlib

import pytest
from support.damage import flip_bit
from support.indexes import forge
from support.tiny_sets import keys_of, make_set

from lift_fast import files
from lift_fast.cache import key_hash
from lift_fast.cli.main import main
from lift_fast.data.index import INDEX, Index, build_index, open_index, scan
from lift_fast.data.samples import BadSample
from lift_fast.data.shards import Shards
from lift_fast.data.tars import NotWhole, members
from lift_fast.errors import DataError

FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]


def read(path):
    with open(path, "rb") as file:
        return [tuple(member) for member in members(file.fileno(), os.path.getsize(path))]


def by_tarfile(path):
    with tarfile.open(path, "r:") as tar:
        return [(m.name.encode(errors="surrogateescape"), m.offset_data, m.size) for m in tar if m.isreg()]


def add(tar, name, data=b"", kind=tarfile.REGTYPE, **options):
    info = tarfile.TarInfo(name)
    info.size, info.type = len(data), kind
    for option, value in options.items():
        setattr(info, option, value)
    tar.addfile(info, io.BytesIO(data))


def header(name=b"a.txt", size=b"00000000000\0", kind=b"0", magic=b"ustar\x0000", prefix=b""):
    block = name.ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2 + size + b"00000000000\0" + b" " * 8 + kind
    block = (block + bytes(100) + magic).ljust(345, b"\0") + prefix.ljust(155, b"\0")
    block = block.ljust(512, b"\0")
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


def pad(data):
    return data + bytes(-len(data) % 512)


END = bytes(1024)


# tars.members


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("seed", range(6))
def test_random_tars_are_read_as_tarfile_reads_them(tmp_path, format, seed):
    rng = random.Random(seed)
    path = tmp_path / "x.tar"
    letters = "ab.É日🦜 -_" if format != tarfile.USTAR_FORMAT else "abé.-_"
    with tarfile.open(path, "w", format=format, encoding="utf-8") as tar:
        for i in range(rng.choice([0, 1, 60])):
            length = rng.choice([1, 5, 20] if format == tarfile.USTAR_FORMAT else [1, 20, 99, 100, 101, 155, 300, 5000])
            name = f"{'part/' * rng.randrange(3)}{i}{''.join(rng.choices(letters, k=length))}.JPG"
            kind = rng.choices(
                [tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE]
                + [tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.CONTTYPE],
                [12, 2, 2, 2, 2, 1, 1, 1],
            )[0]
            plain = kind in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
            data = rng.randbytes(rng.choice([0, 1, 511, 512, 513, 3000])) if plain else b""
            options = {"pax_headers": {"mtime": "1.5", "comment": "x=y\nz"}} if rng.random() < 0.3 else {}
            links = [1, 15] if format == tarfile.USTAR_FORMAT else [1, 15, 60]
            add(tar, name, data, kind, linkname="there" * rng.choice(links), uname="ü", **options)
    assert read(path) == by_tarfile(path)


def test_a_name_that_ustar_splits_in_two(tmp_path):
    name = "/".join(["folder" * 4] * 6) + "/" + "n" * 90 + ".png"
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        add(tar, name, b"x")
    assert read(tmp_path / "x.tar") == by_tarfile(tmp_path / "x.tar") == [(name.encode(), 512, 1)]
    # GNU keeps times where ustar has the beginning of the name.
    path = tmp_path / "gnu.tar"
    path.write_bytes(header(magic=b"ustar  \0", prefix=b"14770000000\0") + END)
    assert read(path) == [(b"a.txt", 512, 0)]


@pytest.mark.parametrize("kind", [b"1", b"2", b"3", b"4", b"5", b"6"])
def test_links_and_devices_that_tell_a_size_have_no_data(tmp_path, kind):
    path = tmp_path / "x.tar"
    path.write_bytes(header(b"b", size=b"00000001000\0", kind=kind) + header() + END)
    assert read(path) == by_tarfile(path) == [(b"a.txt", 1024, 0)]


def test_sizes_that_octal_digits_do_not_hold(tmp_path):
    """8 GiB and more: base 256 from GNU, a pax record elsewhere; the files are holes."""
    size = (8 << 30) + 5
    for name, head in (
        ("gnu", header(size=b"\x80" + size.to_bytes(11, "big"), magic=b"ustar  \0")),
        ("pax", header(kind=b"x", size=b"%011o\0" % 19) + pad(b"19 size=8589934597\n") + header()),
    ):
        path = tmp_path / f"{name}.tar"
        with path.open("wb") as file:
            file.write(head)
            file.truncate(len(head) + size + -size % 512)
            file.seek(0, 2)
            file.write(header(b"b.txt") + END)
        want = [(b"a.txt", len(head), size), (b"b.txt", len(head) + size + 507 + 512, 0)]
        assert read(path) == by_tarfile(path) == want
        entry, segment = scan(path)
        place = Index(tmp_path, [entry], bytearray(segment)).place
        assert place(0, 0, 1) == (len(head), (1 << 32) - 1) and place(0, 1, 1) == (path.stat().st_size - 1024, 0)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "end-of-archive"),
        (bytes(512), "end-of-archive"),
        (header() + END[:-1], "end-of-archive"),
        (header() + bytes(512) + b"x" * 512, "end-of-archive"),
        (header(size=b"00000000001\0") + END, "end-of-archive"),
        (header(size=b"00000002001\0") + END, "beyond the end"),
        (header(size=b"77777777777\0") + END, "beyond the end"),
        (header(size=b"\xff" * 12) + END, "beyond the end"),
        (header(size=b"\x80" + b"\xff" * 11) + END, "beyond the end"),
        (header(size=b"-0000000001\0") + END, "beyond the end"),
        (header(size=b"0000000000x\0") + END, "no size"),
        (header()[:-1] + b"x" + END, "no header"),
        (b"x" * 512 + END, "no header"),
        (header()[:148] + b"garbage\0" + header()[156:] + END, "no header"),
        (header(kind=b"L", size=b"%011o\0" % (2 << 20)) + bytes(2 << 20) + END, "a name of"),
        (header(kind=b"x", size=b"%011o\0" % 5) + pad(b"99 a=b\n"[:5]) + header() + END, "pax header"),
        (header(kind=b"x", size=b"%011o\0" % 7) + pad(b"99 a=b\n") + header() + END, "pax header"),
        (header(kind=b"x", size=b"%011o\0" % 7) + pad(b"0 a=bc\n") + header() + END, "pax header"),
        (header(kind=b"x", size=b"%011o\0" % 11) + pad(b"11 size=-1\n") + header() + END, "no size"),
        (header(kind=b"x", size=b"%011o\0" % 22) + pad(b"22 GNU.sparse.major=1\n") + header() + END, "sparse"),
        (header(kind=b"S") + END, "sparse"),
        (header() + END + header() + END, "joined"),
        (header() + bytes(512) + header(b"b.txt") + END, "joined"),
    ],
)
def test_tars_that_are_refused(tmp_path, content, why):
    (tmp_path / "x.tar").write_bytes(content)
    with pytest.raises(NotWhole, match=why):
        read(tmp_path / "x.tar")
    with pytest.raises(DataError, match=rf"x.tar is not a whole tar \(.*{why}"):
        scan(tmp_path / "x.tar")


def test_names_that_are_odd(tmp_path):
    path = tmp_path / "x.tar"
    names = ["a.jpg", "README", ".hidden", "._a.jpg", "x/.b.jpg", "./c.TXT", "/d.json", "../e.txt", "f.seg.png", "g."]
    with tarfile.open(path, "w") as tar:
        for name in names:
            add(tar, name, name.encode())
        add(tar, "old.d/", kind=tarfile.AREGTYPE)
    entry, segment = scan(path)
    index = Index(tmp_path, [entry], bytearray(segment))
    assert index.keys(0) == ["a", "c", "d", "../e"]
    assert index.hashes(0).tolist() == [key_hash(key) for key in index.keys(0)]
    assert [what for row in range(4) for what in range(3) if index.place(0, row, what)] == [0, 1, 2, 1]
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        add(tar, "zero.txt", b"x", pax_headers={"path": "a\0b.txt"})
    assert scan(path)[0].samples == 1
    path.write_bytes(header(b"\xff\xfe.jpg") + END)
    with pytest.raises(DataError, match="x.tar: the name .*is not UTF-8"):
        scan(path)


def test_the_last_of_two_equal_names_and_the_first_kind_of_picture(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, data in [
            ("a.bmp", b"bmp"),
            ("b.txt", b"b"),
            ("a.jpg", b"old"),
            ("a.webp", b"webp"),
            ("a.jpg", b"new"),
            ("a.gif", b"gif"),
        ]:
            add(tar, name, data)
    shards = Shards(tmp_path)
    assert keys_of(shards) == ["a", "b"] and shards.image_bytes(0) == b"new"
    with pytest.raises(BadSample, match="missing: .*'b' has no image") as error:
        shards.image_bytes(1)
    assert error.value.cause == "missing"


# the file


def everything(shards):
    """All that a set returns."""
    samples = range(len(shards))
    return (
        shards.names,
        shards.shard_sizes,
        keys_of(shards),
        [shards.shard_hashes(number).tolist() for number in range(len(shards.names))],
        [(shards.image_bytes(i), shards.caption(i), shards.meta(i), shards.where(i)) for i in samples],
    )


@pytest.mark.parametrize("processes", [1, 2])
def test_with_an_index_and_without(tmp_path, processes, monkeypatch):
    monkeypatch.setattr("lift_fast.data.index._PROCESSES_FROM", 2)
    shards = make_set(tmp_path / "set", 11, per_shard=4)
    tarfile.open(tmp_path / "set" / "00001a.tar", "w").close()  # no sample, but a shard
    without = everything(Shards(shards.folder))
    built = build_index(shards.folder, processes, progress=False)
    assert (built.shards, built.samples, built.read) == (4, 11, 4)
    assert built.bytes == (shards.folder / INDEX).stat().st_size
    assert everything(Shards(shards.folder)) == without and without[1] == [4, 4, 0, 3]
    assert sorted(path.name for path in shards.folder.iterdir())[-1] == INDEX  # and no part of one


def test_opening_an_index_reads_no_tar_and_no_sample(tmp_path, monkeypatch):
    make_set(tmp_path / "set")
    build_index(tmp_path / "set", 1, progress=False)
    monkeypatch.setattr("lift_fast.data.index.scan", None)
    monkeypatch.setattr(Index, "key", None)
    monkeypatch.setattr(Index, "place", None)
    shards = Shards(tmp_path / "set")
    assert len(shards) == 10 and shards.shard_hashes(2).tolist() == [key_hash("s0-008"), key_hash("s0-009")]


def test_an_index_that_is_out_of_date(tmp_path):
    folder = make_set(tmp_path / "set", 12, per_shard=4).folder
    build_index(folder, 1, progress=False)
    first, last = folder / "00000.tar", folder / "00002.tar"
    data, times = first.read_bytes(), (first.stat().st_atime_ns, first.stat().st_mtime_ns)

    def stale(name):
        with pytest.raises(DataError, match=rf"{INDEX} is out of date: {name}.*; run lift-fast data index again"):
            Shards(folder)

    os.utime(first, ns=(0, 0))
    stale("00000.tar was added or changed")
    os.utime(first, ns=times)
    Shards(folder)
    first.write_bytes(data + bytes(512))
    os.utime(first, ns=times)
    stale("00000.tar was added or changed")
    first.write_bytes(data)
    os.utime(first, ns=times)
    (folder / "00001b.tar").write_bytes(data)
    stale("00001b.tar was added or changed")
    built = build_index(folder, 1, progress=False)
    assert (built.shards, built.samples, built.read) == (4, 16, 1)  # only the new one was read
    assert everything(Shards(folder))[1] == [4, 4, 4, 4]
    last.unlink()
    stale("00002.tar is gone")
    assert build_index(folder, 1, progress=False).read == 0
    make_set(tmp_path / "other", 5, per_shard=5, seed=1)
    os.replace(tmp_path / "other" / "00000.tar", first)
    assert build_index(folder, 1, progress=False).read == 1
    with_index = everything(Shards(folder))
    (folder / INDEX).unlink()
    assert everything(Shards(folder)) == with_index and with_index[1] == [5, 4, 4]


def test_a_segment_that_is_not_as_written_is_read_anew(tmp_path):
    folder = make_set(tmp_path / "set", 12, per_shard=4).folder
    build_index(folder, 1, progress=False)
    whole = (folder / INDEX).read_bytes()
    at = open_index(folder).entries[1].at + 3
    (folder / INDEX).write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    assert build_index(folder, 1, progress=False).read == 1
    assert (folder / INDEX).read_bytes() == whole
    (folder / INDEX).write_bytes(whole[:100])
    assert build_index(folder, 1, progress=False).read == 3


def test_a_damaged_index_is_never_a_crash(tmp_path):
    folder = make_set(tmp_path / "set", 12, per_shard=4).folder
    build_index(folder, 1, progress=False)
    path, rng = folder / INDEX, random.Random(0)
    whole = path.read_bytes()
    refused = 0
    for trial in range(400):
        data = bytearray(whole)
        if trial % 4 == 0:
            data = data[: rng.randrange(len(data))]
        else:
            for _ in range(trial % 4):
                at = rng.randrange(len(data))
                data[at : at + rng.choice([1, 8])] = rng.randbytes(rng.choice([1, 8]))
        path.write_bytes(data)
        try:
            shards = Shards(folder)
            assert shards.shard_sizes == [4, 4, 4]
            for number in range(3):
                shards.shard_hashes(number)
                shards.shard_keys(number)
            for i in range(12):
                shards.image_bytes(i)
        except DataError as error:
            assert INDEX in str(error) and "run lift-fast data index again" in str(error)
            refused += 1
        except BadSample:
            pass
    assert refused > 100


def test_numbers_that_lead_out_are_refused(tmp_path):
    folder = make_set(tmp_path / "set", 4, per_shard=4).folder
    build_index(folder, 1, progress=False)
    path = folder / INDEX
    whole, entry = path.read_bytes(), open_index(folder).entries[0]

    def refused(at, format, value, words, read):
        path.write_bytes(whole)
        forge(path, at, struct.pack(format, value))
        with pytest.raises(DataError, match=f"{INDEX} is damaged.*{words}.*; run lift-fast data index again"):
            read(Shards(folder))

    record = entry.records + 40 * 2
    for offset in (entry.bytes, entry.bytes - 1, -2, -(1 << 63), (1 << 63) - 1):
        refused(record, "<q", offset, "00000.tar: sample 2 lies outside", lambda shards: shards.image_bytes(2))
        refused(record + 8, "<q", offset, "00000.tar: sample 2 lies outside", lambda shards: shards.caption(2))
    refused(record + 24, "<I", entry.bytes, "sample 2 lies outside", lambda shards: shards.image_bytes(2))
    for end in (0, 1 << 31, 100):
        refused(record + 36, "<I", end, "sample 2 has no key", lambda shards: shards.where(2))
    refused(entry.records + 40 * 4, "B", 0xFF, "key of sample 0 is not UTF-8", lambda shards: shards.shard_keys(0))
    path.write_bytes(whole)
    forge(path, directory=lambda content: content["tars"][0].__setitem__(1, 1 << 40))
    with pytest.raises(DataError, match=f"{INDEX} is damaged .*; run lift-fast data index again"):
        Shards(folder)
    at = whole.index(b'"00000.tar", 4, ') + len(b'"00000.tar", ')
    path.write_bytes(whole[:at] + b"3" + whole[at + 1 :])  # without the checksum
    with pytest.raises(DataError, match=f"{INDEX} is damaged; run lift-fast data index again"):
        Shards(folder)


def test_a_flipped_bit_is_an_error_on_first_use_of_its_tar(tmp_path):
    folder = make_set(tmp_path / "set", 12, per_shard=4).folder
    build_index(folder, 1, progress=False)
    path, entry = folder / INDEX, open_index(folder).entries[1]
    whole = path.read_bytes()
    sure = everything(Shards(folder))
    rng = random.Random(0)
    uses = [
        lambda shards, row: shards.image_bytes(row),
        lambda shards, row: shards.caption(row),
        lambda shards, row: shards.captions(row // 4),
        lambda shards, row: shards.where(row),
        lambda shards, row: shards.shard_keys(row // 4),
        lambda shards, row: shards.shard_hashes(row // 4),
    ]
    for trial in range(60):
        path.write_bytes(whole)
        flip_bit(path, entry.at + rng.randrange(entry.length))
        shards = Shards(folder)
        assert shards.caption(3) == sure[4][3][1] and shards.caption(8) == sure[4][8][1]  # of other tars
        use = uses[trial % len(uses)]
        for _ in range(2):  # not only once
            with pytest.raises(DataError, match=f"{INDEX} is damaged .*00001.tar.*; run lift-fast data index again"):
                use(shards, 4 + rng.randrange(4))
        assert shards.shard_keys(0) and shards.image_bytes(11)


def test_check_ends_with_an_error_on_a_flipped_bit(tmp_path, capfd):
    folder = make_set(tmp_path / "set", 12, per_shard=4).folder
    build_index(folder, 1, progress=False)
    flip_bit(folder / INDEX, open_index(folder).entries[2].at + 100)
    with pytest.raises(SystemExit) as stop:
        main(["data", "check", str(folder)])
    assert stop.value.code == 2 and "00002.tar is wrong); run lift-fast data index again" in capfd.readouterr().err


@pytest.mark.parametrize("how", ["cut", "over", "copied over"])
def test_an_index_that_changes_while_it_is_open(tmp_path, how):
    folder = make_set(tmp_path / "set", 12, per_shard=4).folder
    build_index(folder, 1, progress=False)
    path = folder / INDEX
    whole, shards = path.read_bytes(), Shards(folder)
    assert shards.caption(0) and shards.image_bytes(4)
    if how == "cut":
        os.truncate(path, 16)
    else:
        with open(path, "r+b") as file:  # in place, and of the same length
            file.write(bytes(len(whole)) if how == "over" else whole)
        os.utime(path, ns=(0, 0))
    for number, use in enumerate([shards.caption, shards.image_bytes, shards.where, shards.shard_keys]):
        with pytest.raises(DataError, match=f"{INDEX} cannot be read .*changed or was cut short.*data index again"):
            use(number % 3)


def test_what_a_killed_build_left_goes_and_nothing_else(tmp_path):
    folder = make_set(tmp_path / "set", 4, per_shard=4).folder
    old, other = folder / files._tagged(INDEX), folder / f"{INDEX}.4711.part"
    old.write_bytes(b"LIFT")
    other.write_bytes(b"of an earlier version")
    build_index(folder, 1, progress=False)
    assert not old.exists() and other.exists()


def test_an_index_that_is_replaced_stays_as_it_was_opened(tmp_path):
    folder = make_set(tmp_path / "set", 12, per_shard=4).folder
    build_index(folder, 1, progress=False)
    shards = Shards(folder)
    sure = everything(shards)
    (folder / INDEX).unlink()
    build_index(folder, 1, progress=False)
    assert everything(shards) == sure


def test_forked_processes_and_threads_read_one_index(tmp_path):
    folder = make_set(tmp_path / "set", 12, per_shard=4).folder
    build_index(folder, 1, progress=False)
    shards = Shards(folder)
    sure = everything(Shards(folder))
    stop = threading.Event()

    def read():
        while not stop.is_set():
            assert shards.caption(7) == sure[4][7][1]

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(10):
            child = os.fork()
            if not child:
                os._exit(everything(shards) != sure)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def test_an_index_of_brackets_takes_little_memory(tmp_path):
    folder = make_set(tmp_path / "set", 4, per_shard=4).folder
    directory = b'{"suffixes": [null, "txt"], "tars": [' + b"[]," * (1 << 20) + b"[]]}"
    tail = struct.pack("<QQQ8s", 8, len(directory), zlib.crc32(directory), b"LIFTIDX2")
    (folder / INDEX).write_bytes(b"LIFTIDX2" + directory + tail)
    tracemalloc.start()
    with pytest.raises(DataError, match=f"{INDEX} cannot be read .*brackets"):
        Shards(folder)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * len(directory)
    with open(folder / INDEX, "r+b") as file:  # a file of 1 TB, of which nothing is on the disk
        file.truncate(1 << 40)
        file.seek((1 << 40) - len(tail))
        file.write(struct.pack("<QQQ8s", 8, (1 << 40) - 8 - len(tail), 0, b"LIFTIDX2"))
    with pytest.raises(DataError, match=f"{INDEX} is damaged"):
        Shards(folder)


def test_many_small_tars_have_an_index_that_opens(tmp_path, monkeypatch):
    """Their directory is nearly all brackets, which parse_json refuses."""
    monkeypatch.setattr("lift_fast.foreign._FEW", 0)
    (tmp_path / "set").mkdir()
    for number in range(10):
        with tarfile.open(tmp_path / "set" / f"{number}.tar", "w") as tar:
            add(tar, "a.txt", b"a")
        os.utime(tmp_path / "set" / f"{number}.tar", ns=(0, 0))
    build_index(tmp_path / "set", 1, progress=False)
    assert len(Shards(tmp_path / "set")) == 10


@pytest.mark.parametrize(
    "directory",
    [
        b"",
        b"{}",
        b"7",
        b"[1]",
        b"[[]]",
        b'{"suffixes": [null, "txt"]}',
        b'{"suffixes": [null], "tars": []}',
        b'{"suffixes": [null, "txt"], "tars": 7}',
        b'[["00000.tar", 4, 1, 1, 8, 9, "x", []]]',
        b'[["00000.tar", -4, 1, 1, 8, 9, 0, []]]',
        b'[["00000.tar", 1e400, 1, 1, 8, 9, 0, []]]',
        b'[["00000.tar", 1, 1, 1, 8, 1152921504606846976, 0, []]]',
        b'[["00000.tar", 1, 1, 1, 16, 48, 0, []]]',
        b"[[1, 1, 1, 1, 8, 48, 0, []]]",
        b'[["00000.tar", 0, SIZE, TIME, 8, 0, 7, []], ["00000.tar", 0, SIZE, TIME, 8, 0, 7, []]]',
        b'[["00000.tar", 0, SIZE, TIME, 8, 0, 7]]',
        b'[["00000.tar", 0, SIZE, TIME, 8, 0, 7, 1]]',
        b'[["00000.tar", 0, SIZE, TIME, 8, 0, 7, [["unused file", "x", 0]]]]',
        b'[["00000.tar", 0, SIZE, TIME, 8, 0, 7, [["no cause", "x", 1]]]]',
        b'[["00000.tar", 0, SIZE, TIME, 8, 0, 7, [["unused file", 1, 1]]]]',
        b"[" * 100_000,
    ],
)
def test_a_directory_of_rubbish_with_a_good_checksum(tmp_path, directory):
    folder = make_set(tmp_path / "set", 4, per_shard=4).folder
    status, magic = (folder / "00000.tar").stat(), b"LIFTIDX2"
    if directory.startswith(b"[["):
        directory = b'{"suffixes": [null, "txt"], "tars": ' + directory + b"}"
    directory = directory.replace(b"SIZE", b"%d" % status.st_size).replace(b"TIME", b"%d" % status.st_mtime_ns)
    tail = struct.pack("<QQQ8s", 8, len(directory), zlib.crc32(directory), magic)
    (folder / INDEX).write_bytes(magic + directory + tail)
    with pytest.raises(DataError, match=f"{INDEX}.*run lift-fast data index again"):
        Shards(folder)
    assert build_index(folder, 1, progress=False).read == 1


def test_a_build_that_fails_leaves_what_was(tmp_path, monkeypatch):
    monkeypatch.setattr("lift_fast.data.index._PROCESSES_FROM", 1)
    folder = make_set(tmp_path / "set", 8, per_shard=4).folder
    build_index(folder, 1, progress=False)
    before = (folder / INDEX).read_bytes()
    (folder / "00002.tar").write_bytes(b"no tar")
    for processes in (1, 2):
        with pytest.raises(DataError, match="00002.tar is not a whole tar"):
            build_index(folder, processes, progress=False)
    assert (folder / INDEX).read_bytes() == before
    assert sorted(path.name for path in folder.iterdir()) == ["00000.tar", "00001.tar", "00002.tar", INDEX]
    with pytest.raises(DataError, match="no data set at"):
        build_index(tmp_path / "none")
    with pytest.raises(DataError, match=r"holds no \.tar"):
        build_index(tmp_path)


def test_an_index_that_cannot_be_written(tmp_path, monkeypatch):
    folder = make_set(tmp_path / "set", 8, per_shard=4).folder

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match="cannot write the index .*No space left on device"):
        build_index(folder, 1, progress=False)
    assert sorted(path.name for path in folder.iterdir()) == ["00000.tar", "00001.tar"]
