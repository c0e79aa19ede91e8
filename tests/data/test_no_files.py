"""What has the name of a file of a data set and is none: pipes, devices, sockets, folders, links in a circle; and files
that are far too long. Each is a typed error at once."""

import json
import os
import random
import socket
import struct
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet
from support.hostile import encoded, scene
from support.judged import judged
from support.tiny_sets import make_set

from lift_fast.data.check import check
from lift_fast.data.index import INDEX, build_index
from lift_fast.data.open import open_data
from lift_fast.data.options import DataOptions
from lift_fast.data.samples import BadSample
from lift_fast.errors import DataError, LiftFastError
from lift_fast.eval.layouts import open_benchmark
from lift_fast.eval.sets import open_set
from lift_fast.eval.templates import read_classnames, read_templates
from lift_fast.inference.preprocessing import Preprocessing

KINDS = ("pipe", "zeros", "terminal", "socket", "folder", "circle")


def put(kind: str, path: Path) -> None:
    """Puts something that is no file at a path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind in ("zeros", "terminal"):
        path.symlink_to("/dev/zero" if kind == "zeros" else "/dev/tty")
    elif kind == "socket":
        here = os.getcwd()
        os.chdir(path.parent)  # the name of a socket has 107 bytes at most
        try:
            with socket.socket(socket.AF_UNIX) as made:
                made.bind(path.name)
        finally:
            os.chdir(here)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(path.name)


def read_all(samples) -> str:
    """Reads all of a set. Raises DataError when nothing of it can be read."""
    bad = []
    for row in range(len(samples)):
        for read in (samples.image_bytes, samples.caption, samples.meta):
            try:
                read(row)
            except BadSample as error:
                bad.append(error)
    for number in range(len(samples.shard_sizes)):
        samples.captions(number)
    if not bad:
        raise AssertionError("it was read")
    raise DataError(f"counted: {bad[0].cause}: {bad[0].reason}")


def image() -> bytes:
    return encoded(scene(random.Random(0)), "PNG")


def of_files(folder, kind, name):
    folder.mkdir()
    for key in "ab":
        for suffix, data in {"png": image(), "txt": b"x", "json": b"{}"}.items():
            if f"{key}.{suffix}" != name:
                (folder / f"{key}.{suffix}").write_bytes(data)
    put(kind, folder / name)


def tar(folder, kind):
    make_set(folder, 4, per_shard=2)
    put(kind, folder / "00002.tar")
    open_data(folder)


def tar_indexed(folder, kind):
    make_set(folder, 4, per_shard=2)
    put(kind, folder / "00002.tar")
    build_index(folder, 1, progress=False)


def index(folder, kind):
    make_set(folder, 4, per_shard=2)
    put(kind, folder / INDEX)
    open_data(folder)


def table(suffix):
    def read(folder, kind):
        put(kind, folder / f"t.{suffix}")
        read_all(open_data(folder / f"t.{suffix}"))

    return read


def table_in_folder(suffix):
    def read(folder, kind):
        put(kind, folder / f"train-00000-of-00001.{suffix}")
        read_all(open_data(folder))

    return read


def state(folder, kind):
    put(kind, folder / "state.json")
    open_data(folder)


def image_of_table(folder, kind):
    put(kind, folder / "a.png")
    (folder / "t.csv").write_text("image,caption\na.png,x\n")
    read_all(open_data(folder / "t.csv", options=DataOptions(follow_links=True)))


def loose(name):
    def read(folder, kind):
        of_files(folder, kind, name)
        read_all(open_data(folder, options=DataOptions(follow_links=True)))

    return read


def benchmark(name):
    def read(folder, kind):
        put(kind, folder / name)
        if open_benchmark(folder / name) is None and open_benchmark(folder) is None:
            open_set(folder / name)

    return read


def classes(folder, kind):
    folder.mkdir()
    (folder / "a.png").write_bytes(image())
    put(kind, folder / "a.cls")
    open_set(folder, options=DataOptions(follow_links=True))


def text_file(reader):
    def read(folder, kind):
        put(kind, folder / "x.json")
        reader(folder / "x.json")

    return read


def picture(folder, kind):
    put(kind, folder / "x.png")
    Preprocessing(8, 8)(folder / "x.png")


PLACES = {
    "tar": tar,
    "tar of an index": tar_indexed,
    "index": index,
    **{f"table .{suffix}": table(suffix) for suffix in ("csv", "tsv", "jsonl", "parquet", "arrow")},
    **{f"folder of .{suffix}": table_in_folder(suffix) for suffix in ("parquet", "arrow")},
    "state.json": state,
    "image of a table": image_of_table,
    **{f"loose {name}": loose(name) for name in ("b.png", "b.txt", "b.json")},
    **{
        name: benchmark(name)
        for name in ("captions_val2017.json", "add_att.json", "results_1.token", "flickr_annotations_1.csv")
    },
    "class": classes,
    "templates": text_file(read_templates),
    "names of classes": text_file(read_classnames),
    "image of inference": picture,
}


@pytest.mark.attack
@pytest.mark.parametrize("place", PLACES)
def test_what_is_no_file_is_an_error_at_once(tmp_path, place):
    turn = [*PLACES].index(place)
    try_kinds(tmp_path, place, [KINDS[(turn + step) % len(KINDS)] for step in (0, 2)])


@pytest.mark.campaign
@pytest.mark.parametrize("place", PLACES)
def test_every_kind_of_no_file_is_an_error_at_once(tmp_path, place):
    try_kinds(tmp_path, place, KINDS)


def try_kinds(tmp_path, place, kinds):
    for kind in kinds:
        if kind == "folder" and place.startswith("loose"):
            continue  # a folder called b.png is searched like any other
        folder = tmp_path / kind / "data"
        folder.parent.mkdir()
        found = judged(lambda folder=folder, kind=kind: PLACES[place](folder, kind), seconds=10, most=100 << 20)
        assert found.outcome == "error", (kind, found)
        assert "data" in found.message or str(tmp_path) in found.message, found


def long_line(path):
    with open(path, "wb") as file:
        file.write(b"image,caption\n")
        file.truncate(1 << 40)


def open_quote(path):
    path.write_bytes(b'image,caption\n"' + b'\n","' * (1 << 24))


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_a_line_without_end(tmp_path, suffix):
    long_line(tmp_path / f"t.{suffix}")
    for skip in (False, True):
        found = judged(lambda skip=skip: open_data(tmp_path / f"t.{suffix}", options=DataOptions(skip_bad=skip)))
        assert found.outcome == "error" and str(tmp_path) in found.message
        assert suffix == "jsonl" or "a row that reaches line 2 has more than 33554432 bytes" in found.message


@pytest.mark.campaign
def test_a_row_without_end(tmp_path):
    open_quote(tmp_path / "t.csv")
    found = judged(lambda: open_data(tmp_path / "t.csv"))
    assert "a row that reaches line" in found.message


def test_a_json_of_brackets(tmp_path):
    (tmp_path / "captions_val2017.json").write_bytes(b"[" + b"[]," * (1 << 23) + b"[]]")
    found = judged(lambda: open_set(tmp_path / "captions_val2017.json"), most=200 << 20)
    assert found.outcome == "error" and "brackets" in found.message


@pytest.mark.parametrize("rows", [-1, 1 << 40, (1 << 62) + 1])
def test_a_parquet_file_that_says_it_has_other_rows(tmp_path, rows):
    """The numbers of its footer are varints: another one of the same length is put in their place."""
    path = tmp_path / "t.parquet"
    many = 1 << 20
    parquet.write_table(pa.table({"image": pa.nulls(many, pa.string()), "caption": pa.nulls(many, pa.string())}), path)
    data = path.read_bytes()
    (length,) = struct.unpack("<I", data[-8:-4])
    footer = data[-8 - length : -8]
    new = footer.replace(varint(many), varint(rows))
    assert new != footer
    path.write_bytes(data[: -8 - length] + new + struct.pack("<I", len(new)) + data[-4:])

    def read():
        samples = open_data(path, options=DataOptions(skip_bad=True))
        samples.captions(0)
        samples.shard_keys(0)

    found = judged(read, seconds=20)
    assert found.outcome == "error" and "t.parquet" in found.message


def varint(number: int) -> bytes:
    """A number as Thrift's compact protocol has it."""
    number = (number << 1) ^ (number >> 63)
    found = bytearray()
    while number > 127:
        found.append(number & 127 | 128)
        number >>= 7
    return bytes([*found, number])


@pytest.mark.parametrize("how", ["cut", "over"])
def test_an_arrow_file_that_is_cut_while_it_is_mapped(tmp_path, how):
    """Reading behind the end of a mapped file would be a signal."""
    path = tmp_path / "t.arrow"
    content = pa.table({"image": [os.urandom(1 << 16) for _ in range(20)], "caption": [f"c{k}" for k in range(20)]})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, content.schema) as writer:
        writer.write_table(content)
    samples = open_data(path)
    assert samples.image_bytes(19) == content["image"][19].as_py() and samples.caption(1) == "c1"
    if how == "cut":
        os.truncate(path, 4096)
    else:
        with open(path, "r+b") as file:
            file.write(bytes(path.stat().st_size))
        os.utime(path, ns=(0, 0))

    def read(what):
        return lambda: what(19) if what != samples.captions else what(0)

    for what in (samples.caption, samples.captions, samples.meta):
        found = judged(read(what))
        assert found.outcome == "error" and "has changed since the data set was opened" in found.message
    found = judged(read(samples.image_bytes), errors=(LiftFastError, BadSample))
    assert found.outcome == "error" and "unreadable" in found.message


def test_check_lists_a_json_that_does_not_parse(tmp_path):
    for suffix, data in {"png": image(), "txt": b"x", "json": b'{"long": '}.items():
        (tmp_path / f"a.{suffix}").write_bytes(data)
    (tmp_path / "b.png").write_bytes(image())
    (tmp_path / "b.txt").write_bytes(b"x")
    (tmp_path / "b.json").write_bytes(b"[" * 100_000)
    found = check(tmp_path, progress=False)
    assert found["bad"] == 2 and found["causes"] == {"does not parse": 2}
    assert all("its .json does not parse" in line["reason"] for line in found["first"])


def test_too_many_open_files_are_not_bad_samples(tmp_path, monkeypatch):
    folder = make_set(tmp_path / "set", 4, per_shard=2).folder
    samples = open_data(folder)

    def full(path, *_):
        raise OSError(24, "Too many open files", str(path))

    monkeypatch.setattr("lift_fast.data.reading.regular_descriptor", full)
    with pytest.raises(DataError, match="too many files are open; raise the limit with ulimit -n") as error:
        samples.image_bytes(0)
    assert not isinstance(error.value, BadSample)


def test_state_json_names_files_of_its_folder(tmp_path):
    for name in ("../x.arrow", "/etc/passwd", 7, "a/b.arrow", ""):
        (tmp_path / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
        with pytest.raises(DataError, match="state.json does not parse"):
            open_data(tmp_path)
