"""Tars as people have them: captions that are no text, names with dots, two images of a sample, tars that are cut,
compressed or joined. What is not read is counted and named, with an index and without."""

import functools
import gzip
import io
import json
import os
import random
import tarfile
import weakref

import pytest
from support.tiny_sets import keys_of, make_set, png

from lift_fast.cli.main import main
from lift_fast.data import reading
from lift_fast.data.captions import checked_captions
from lift_fast.data.index import INDEX, build_index
from lift_fast.data.options import DataOptions
from lift_fast.data.reading import read_parts, stamp_of
from lift_fast.data.samples import BadSample, BadText, Collection
from lift_fast.data.shards import Shards
from lift_fast.data.tars import NotWhole, members
from lift_fast.errors import ConfigError, DataError

SKIP = DataOptions(skip_bad=True)


def write_tar(path, files, **options):
    """files: (name, content) pairs. A name may be bytes that are not UTF-8."""
    path.parent.mkdir(exist_ok=True)
    options = {"format": tarfile.USTAR_FORMAT, "encoding": "utf-8", "errors": "surrogateescape", **options}
    with tarfile.open(path, "w", **options) as tar:
        for name, data in files:
            info = tarfile.TarInfo(os.fsdecode(name))
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def sample(key, caption=None, image=b"image"):
    return [(f"{key}.jpg", image), (f"{key}.txt", (caption or f"caption {key}").encode())]


def both_ways(folder, options=None):
    """The set without an index and with one."""
    yield Shards(folder, options=options)
    build_index(folder, 1, progress=False, options=options)
    yield Shards(folder, options=options)
    (folder / INDEX).unlink()


def end_of(path):
    """Where the end-of-archive mark begins."""
    with pytest.raises(NotWhole, match="end-of-archive mark is missing at byte") as error, path.open("rb") as file:
        data = file.read().rstrip(b"\0")
        cut = path.with_suffix(".cut")
        cut.write_bytes(data + bytes(-len(data) % 512))
        with cut.open("rb") as shorter:
            list(members(shorter.fileno(), cut.stat().st_size))
    cut.unlink()
    return int(str(error.value).rpartition(" ")[2])


# Captions are text, or the sample is bad.


@pytest.mark.parametrize(
    ("value", "cause", "words"),
    [
        (["a red dog", "a dog in the park"], "not text", "'captions' is a list of 2, not text"),
        ([], "not text", "a list of 0"),
        ({"en": "a dog"}, "not text", "an object"),
        (7, "not text", "the number 7"),
        (0, "not text", "the number 0"),
        (1.5, "not text", "the number 1.5"),
        (float("nan"), "not text", "NaN"),
        (float("inf"), "not text", "inf"),
        (True, "not text", "true or false"),
        (False, "not text", "true or false"),
        (None, "no caption", "has no caption 'captions'"),
        ("", "no caption", "has no caption"),
        (" \n\t\u00a0", "no caption", "has no caption"),
        ("half \ud83e", "not UTF-8", "half a Unicode character"),
    ],
)
def test_an_entry_of_the_json_that_is_no_text(tmp_path, value, cause, words):
    """Each was made into text by Python's str(), or the blank ones refused; `data check` said 0 bad."""
    files = [("a.jpg", b"x"), ("a.json", json.dumps({"captions": value}).encode())]
    write_tar(tmp_path / "x.tar", [*files, *sample("b"), ("b.json", b'{"captions": " fine "}')])
    for shards in both_ways(tmp_path):
        with pytest.raises(BadText, match=rf"x.tar: sample 'a'.*{words}") as error:
            shards.caption(0, "captions")
        assert error.value.cause == cause
        bad, fine = shards.captions(0, "captions")
        assert isinstance(bad, BadText) and str(bad) == str(error.value) and bad.cause == cause and fine == "fine"
        assert Collection([shards]).bad_captions("captions").keys() == {0}


@pytest.mark.parametrize(
    ("name", "content", "cause", "words"),
    [
        ("a.txt", "café".encode("latin-1"), "not UTF-8", "'txt' is not UTF-8 .*at byte 3.*; convert the file to UTF-8"),
        ("a.txt", "a dog".encode("utf-16"), "not UTF-8", "not UTF-8"),
        ("a.txt", b"\xed\xa0\xbd", "not UTF-8", "not UTF-8"),
        ("a.txt", b"", "no caption", "has no caption 'txt'"),
        ("a.txt", b"\xef\xbb\xbf \r\n", "no caption", "has no caption 'txt'"),
        ("a.md5", b"x", "no caption", "has no caption 'txt'"),  # there is no a.txt
        ("a.txt", b"x" * 101, "too large", "a text of 101 bytes; 100 are read at most"),
    ],
)
def test_a_txt_that_is_no_text(tmp_path, monkeypatch, name, content, cause, words):
    """Latin-1 became caf\ufffd."""
    monkeypatch.setattr("lift_fast.data.shards._MOST_TEXT", 100)
    write_tar(tmp_path / "x.tar", [("a.jpg", b"x"), (name, content), *sample("b", "fine")])
    for shards in both_ways(tmp_path):
        with pytest.raises(BadText, match=rf"x.tar: sample 'a'.*{words}") as error:
            shards.caption(0)
        assert error.value.cause == cause
        bad, fine = shards.captions(0)
        assert isinstance(bad, BadText) and str(bad) == str(error.value) and bad.cause == cause and fine == "fine"


@pytest.mark.parametrize(
    ("content", "cause", "words"),
    [
        (b"{", "does not parse", "its .json does not parse"),
        (b"", "does not parse", "its .json does not parse"),
        (b"[1]", "does not parse", "its .json is not an object"),
        (b"[" * 100_000, "does not parse", "its .json does not parse"),
        ('{"caption": "café"}'.encode("latin-1"), "not UTF-8", "its .json is not UTF-8"),
        (b"x" * 101_000, "too large", "a text of 101000 bytes"),
    ],
)
def test_a_json_that_is_none(tmp_path, monkeypatch, content, cause, words):
    monkeypatch.setattr("lift_fast.data.shards._MOST_TEXT", 100_000)
    write_tar(tmp_path / "x.tar", [*sample("a"), ("a.json", content), ("b.json", b'{"caption": "fine"}')])
    for shards in both_ways(tmp_path):
        for read in (shards.meta, functools.partial(shards.caption, field="caption")):
            with pytest.raises(BadText, match=rf"x.tar: sample 'a'.*{words}") as error:
                read(0)
            assert error.value.cause == cause
        bad, fine = shards.captions(0, "caption")
        assert str(bad) == str(error.value) and fine == "fine"
        assert shards.caption(0) == "caption a" and isinstance(shards.captions(0)[1], BadText)


def test_a_bad_caption_does_not_keep_its_shard_in_memory(tmp_path):
    """A run keeps the errors of all shards; through their frames they held every text of them."""

    class Value:
        pass

    value = Value()
    gone = weakref.ref(value)
    errors = checked_captions([b"\xff", value], "txt", str)
    del value
    assert len(errors) == 2 and gone() is None


def test_good_texts_are_read_as_written(tmp_path):
    texts = ["plain", "  spaces around\r\n", "\ufeffa mark before", "日本語 🦜", '"quoted" \\ / \0 nul', "line\nbreak"]
    files = [file for i, text in enumerate(texts) for file in sample(f"{i:03d}", text)]
    files += [(f"{i:03d}.json", json.dumps({"caption": text}).encode()) for i, text in enumerate(texts)]
    write_tar(tmp_path / "x.tar", files)
    for shards in both_ways(tmp_path):
        assert shards.captions(0) == [text.removeprefix("\ufeff").strip() for text in texts]
        assert shards.captions(0) == [shards.caption(i) for i in range(6)]
        assert shards.captions(0, "caption") == [shards.caption(i, "caption") for i in range(6)]
        assert shards.captions(0, "caption")[3] == "日本語 🦜"
        assert (shards.caption_field(), shards.caption_field("long"), shards.text_fields()) == ("txt", "long", ["txt"])
        assert shards.bad_keys(0) == {}


def test_captions_of_a_shard_that_changed_or_cannot_be_read(tmp_path):
    shards = make_set(tmp_path / "set", 8, per_shard=4)
    stamps = [shards.shard_stamp(number) for number in range(2)]
    assert Shards(shards.folder).shard_stamp(1) == stamps[1] != stamps[0]
    path = shards.paths[1]
    data = path.read_bytes()
    path.write_bytes(data)
    os.utime(path, ns=(0, 0))
    with pytest.raises(DataError, match=r"00001.tar: the shard cannot be read \(it changed or was cut short\)"):
        shards.captions(1)
    path.unlink()
    with pytest.raises(DataError, match=r"00001.tar: the shard cannot be read \(No such file"):
        shards.captions(1)
    assert shards.captions(0) == [f"caption {i}" for i in range(4)]
    path.write_bytes(data)
    assert Shards(shards.folder).shard_stamp(1) != stamps[1]


def test_parts_of_a_file_however_they_lie(tmp_path, monkeypatch):
    """Near parts are read at once; parts may overlap, be empty, and come in any order."""
    monkeypatch.setattr(reading, "_GAP", 20)
    monkeypatch.setattr(reading, "_AT_ONCE", 100)
    rng = random.Random(0)
    data = rng.randbytes(5000)
    path = tmp_path / "x"
    path.write_bytes(data)
    for _ in range(200):
        parts = [(rng.randrange(4000), rng.choice([0, 1, 30, 500])) for _ in range(rng.choice([0, 1, 40]))]
        if rng.random() < 0.7:
            parts.sort()
        assert read_parts(path, stamp_of(path.stat()), parts) == [data[at : at + size] for at, size in parts]
    with pytest.raises(OSError, match="cut short"):
        read_parts(path, stamp_of(path.stat()), [(4990, 11)])
    with pytest.raises(OSError, match="changed"):
        read_parts(path, (5000, 1), [(0, 1)])


# Files without a use are counted.


def test_names_with_dots(tmp_path):
    """This was "1 sample, 0 bad": the sample 22.05 vanished."""
    write_tar(tmp_path / "x.tar", [*sample("22"), *sample("22.05"), *sample("23")])
    for shards in both_ways(tmp_path):
        assert keys_of(shards) == ["22", "23"] and shards.caption(0) == "caption 22"
        (problem,) = shards.problems
        assert (problem.where, problem.cause, problem.count) == (str(tmp_path / "x.tar"), "unused file", 2)
        assert problem.reason.endswith(": 22.05.jpg, 22.05.txt") and "--image-suffix" in problem.reason


@pytest.mark.parametrize(
    ("names", "unused"),
    [
        (["a.jpg", "a.png", "a.txt"], ["a.jpg"]),  # png counts before jpg
        (["a.png", "a.jpg", "a.txt"], ["a.jpg"]),
        (["a.jpg", "a.JPG", "a.txt"], ["a.jpg"]),
        (["a.txt", "a.TXT", "a.jpg"], ["a.txt"]),
        (["a.json", "a.Json", "a.jpg"], ["a.json"]),
        (["a.bmp", "a.jpg", "a.gif", "a.webp", "a.png"], ["a.bmp", "a.gif", "a.webp", "a.jpg"]),
        (["a.jpg", "a.txt", "a.tiff", "a.heic", "a.AVIF"], ["a.tiff", "a.heic", "a.AVIF"]),
        (["a.jpg", "a.text"], ["a.text"]),
        (["a.jpg", "a.caption"], ["a.caption"]),
        (["a.jpg", "a.cls"], ["a.cls"]),
        (["a.cls", "a.jpg", "a.txt"], []),  # a class beside a caption is no second caption
        (["a.jpg", "a.txt", "a.seg.png", "a.meta.json"], ["a.seg.png", "a.meta.json"]),
        (["a.jpg", "a.txt", ".b.jpg", ".jpg", "x/.c.txt"], [".b.jpg", ".jpg", "x/.c.txt"]),
        (["a.jpg", "a.txt", "._a.jpg", "x/._a.txt"], []),  # attributes that macOS adds
        (["a.jpg", "a.txt", "README", "LICENSE.md", "a.npy", "a.md5", "jpg", "x/jpg"], []),
        (["a.jpg", "a.txt", "a.jpg"], []),  # one name twice: the last one counts, and data check says so
        (["a.png", "a.jpg", "a.txt", "a.png"], ["a.jpg"]),
        (["v1.0/a.jpg", "v1.0/a.txt", "./b.jpg", "./b.txt"], []),  # dots of folders
    ],
)
def test_files_that_no_sample_uses(tmp_path, names, unused):
    write_tar(tmp_path / "x.tar", [(name, name.encode()) for name in names])
    for shards in both_ways(tmp_path):
        assert [problem.cause for problem in shards.problems] == ["unused file"] * bool(unused)
        if unused:
            assert shards.problems[0].count == len(unused)
            assert shards.problems[0].reason.rpartition(": ")[2].split(", ") == unused


def test_files_of_other_kinds_make_no_sample(tmp_path):
    """A README.md was a sample without image and caption, which ended `embed`."""
    names = ["README.md", "dataset.yaml", "b.md5", "c.05.jpg", "d.cls"]
    write_tar(tmp_path / "x.tar", [*sample("a"), *((name, b"x") for name in names)])
    for shards in both_ways(tmp_path):
        assert keys_of(shards) == ["a"]
        (problem,) = shards.problems  # what looks like an image or a caption is still counted
        assert problem.count == 2 and problem.reason.endswith(": c.05.jpg, d.cls")


def test_links_are_told(tmp_path):
    """GNU tar writes the second of two hard links, and a symbolic one, as names without data: images that vanish."""
    (tmp_path / "set").mkdir()
    with tarfile.open(tmp_path / "set" / "x.tar", "w") as tar:
        for name, data in sample("a"):
            (tmp_path / name).write_bytes(data)
            tar.add(tmp_path / name, name)
        for name, make in (("b.jpg", os.link), ("c.jpg", os.symlink), ("d", os.link), ("e.md5", os.link)):
            make(tmp_path / "a.jpg", tmp_path / name)
            tar.add(tmp_path / name, name)
    for shards in both_ways(tmp_path / "set"):
        (problem,) = shards.problems
        assert problem.count == 2 and problem.reason.endswith(": b.jpg (a link), c.jpg (a link)")
        assert keys_of(shards) == ["a"]


def test_five_files_are_named(tmp_path):
    names = [f"a.{i}{'x' * 300 * (i == 1)}.jpg" for i in range(1000)]
    write_tar(tmp_path / "x.tar", [*sample("a"), *((name, b"") for name in names)], format=tarfile.PAX_FORMAT)
    for shards in both_ways(tmp_path):
        (problem,) = shards.problems
        assert problem.count == 1000
        assert problem.reason.endswith(f": a.0.jpg, a.1{'x' * 97}…, a.2.jpg, a.3.jpg, a.4.jpg and 995 more")
    build_index(tmp_path, 1, progress=False)
    assert (tmp_path / INDEX).stat().st_size < 64 * 1000 + 1000  # the index does not hold all names


def test_every_file_is_used_or_counted(tmp_path):
    """Random names: images and texts in = those of samples + those that are counted."""
    rng = random.Random(0)
    suffixes = ["jpg", "JPG", "png", "txt", "TXT", "json", "tiff", "05.jpg", "05.txt", "caption", "md5", "cls"]
    for trial in range(60):
        keys = ["a", "b", "a.b", "x/a", "1.5", ".c", b"caf\xe9", "日"]
        names = {
            (os.fsencode(rng.choice(keys)) + b"." + rng.choice(suffixes).encode()): None
            for _ in range(rng.randrange(30))
        }
        names = [name for name in names if not name.endswith((b".md5", b".cls"))] + [b"z.jpg"]
        folder = tmp_path / str(trial)
        write_tar(folder / "x.tar", [(name, name) for name in names], format=tarfile.PAX_FORMAT)
        for shards in both_ways(folder, SKIP):
            used = {shards._read(0, place) for row in range(len(shards)) for place in places(shards, row)}
            assert len(used) + sum(problem.count for problem in shards.problems) == len(names)


def places(shards, row):
    return [place for what in range(3) if (place := shards._index.place(0, row, what))]


def test_other_files_in_a_folder_of_tars(tmp_path):
    """Compressed and unfinished tars were ignored in silence, as were images that lie beside the tars."""
    make_set(tmp_path / "set")
    unused = ["00003.tar.gz", "00004.tgz", "00005.TAR", "00006.tar.part", "00007.tar.zst", "one.jpg", "two.PNG"]
    for name in [*unused, "00000.tar.sha256", "00000_stats.json", "notes.txt", "bad.jsonl", "00000.parquet"]:
        (tmp_path / "set" / name).write_bytes(b"x")
    for shards in both_ways(tmp_path / "set"):
        assert len(shards) == 10
        (problem,) = shards.problems
        assert (problem.where, problem.cause, problem.count) == (str(tmp_path / "set"), "unused file", 7)
        assert problem.reason.endswith(f": {', '.join(unused[:5])} and 2 more")


# Options choose the suffixes.


def test_other_suffixes(tmp_path):
    files = [("a.input.jpg", b"in"), ("a.target.jpg", b"out"), ("a.caption.txt", b"long"), ("a.txt", b"short")]
    write_tar(
        tmp_path / "x.tar",
        [*files, ("b.INPUT.JPG", b"in b"), ("b.Caption.Txt", b"long b"), ("c.jpg", b"c"), ("c.json", b"{}")],
    )
    for given in (("input.jpg", "caption.txt"), (".Input.JPG", ".caption.txt")):
        options = DataOptions(image_suffix=given[0], text_suffix=given[1])
        for shards in both_ways(tmp_path, options):
            assert [shards.image_bytes(i) for i in range(2)] == [b"in", b"in b"]
            assert shards.captions(0)[:2] == [shards.caption(0), shards.caption(1)] == ["long", "long b"]
            assert shards.problems[0].count == 3 and shards.problems[0].reason.endswith(": a.target.jpg, a.txt, c.jpg")
            with pytest.raises(BadSample, match=rf"missing: .*'c' has no image \({given[0]}\)"):
                shards.image_bytes(2)
            with pytest.raises(BadText, match=rf"'c' has no caption '{given[1]}'"):
                shards.caption(2)
    (shards, _) = both_ways(tmp_path, DataOptions(text_suffix="cls"))
    assert isinstance(shards.captions(0)[0], BadText)


def test_classes_as_captions(tmp_path):
    write_tar(tmp_path / "x.tar", [("a.jpg", b"x"), ("a.cls", b"7"), ("b.jpg", b"x"), ("b.cls", b"11\n")])
    for shards in both_ways(tmp_path, DataOptions(text_suffix="cls")):
        assert shards.captions(0) == ["7", "11"] and not shards.problems
    for shards in both_ways(tmp_path):
        assert shards.problems[0].count == 2 and [text.cause for text in shards.captions(0)] == ["no caption"] * 2


@pytest.mark.parametrize("suffixes", [("txt", None), ("cap.json", "cap.json"), (None, "json"), ("json", None)])
def test_suffixes_that_do_not_differ(tmp_path, suffixes):
    write_tar(tmp_path / "x.tar", sample("a"))
    with pytest.raises(ConfigError, match="the suffixes of image .* must differ"):
        Shards(tmp_path, options=DataOptions(image_suffix=suffixes[0], text_suffix=suffixes[1]))


def test_an_index_of_other_suffixes_is_refused_and_replaced(tmp_path):
    write_tar(tmp_path / "x.tar", [*sample("a"), ("a.input.jpg", b"in"), ("a.cls", b"7")])
    build_index(tmp_path, 1, progress=False)
    wanted = DataOptions(image_suffix="input.jpg", text_suffix="cls")
    with pytest.raises(
        DataError,
        match=rf"{INDEX} was written with no --image-suffix and --text-suffix txt, and this command has --image-suffix "
        "input.jpg and --text-suffix cls; run lift-fast data index again with the same",
    ):
        Shards(tmp_path, options=wanted)
    assert Shards(tmp_path, options=DataOptions(text_suffix=".TXT")).caption(0) == "caption a"
    assert build_index(tmp_path, 1, progress=False, options=wanted).read == 1
    assert build_index(tmp_path, 1, progress=False, options=wanted).read == 0
    assert Shards(tmp_path, options=wanted).image_bytes(0) == b"in"
    with pytest.raises(DataError, match="was written with --image-suffix input.jpg and --text-suffix cls"):
        Shards(tmp_path)


def test_an_index_of_the_former_version_says_so(tmp_path):
    make_set(tmp_path / "set")
    build_index(tmp_path / "set", 1, progress=False)
    path = tmp_path / "set" / INDEX
    path.write_bytes(path.read_bytes().replace(b"LIFTIDX2", b"LIFTIDX1"))
    with pytest.raises(DataError, match="is of another version of lift-fast; run lift-fast data index again"):
        Shards(tmp_path / "set")
    assert build_index(tmp_path / "set", 1, progress=False).read == 3
    assert len(Shards(tmp_path / "set")) == 10


# Damaged tars.


def damaged(path, kind):
    """Damages a tar of three samples; what is then read of it, and words of the problem."""
    data, end = path.read_bytes(), end_of(path)
    if kind == "cut":  # in the caption of the last sample
        path.write_bytes(data[: data.index(b"caption c") + 4])
        return ["a", "b", "c"], "its member at byte .* reaches beyond the end"
    if kind == "no end mark":
        path.write_bytes(data[:end])
        return ["a", "b", "c"], f"its end-of-archive mark is missing at byte {end}"
    if kind == "half an end mark":
        path.write_bytes(data[: end + 700])
        return ["a", "b", "c"], f"its end-of-archive mark is missing at byte {end}"
    if kind == "no header":
        at = data.index(b"b.txt")
        path.write_bytes(data[:at] + b"\xff" * 512 + data[at + 512 :])
        return ["a", "b"], f"no header of a member at byte {at}"
    if kind == "joined":
        path.write_bytes(data[: end + 1024] + data.replace(b"a.", b"d."))
        return ["a", "b", "c"], f"there is data behind its end at byte {end + 1024}, as when tars are joined"
    if kind == "empty":
        path.write_bytes(b"")
        return [], "its end-of-archive mark is missing at byte 0"
    if kind == "gzip":
        path.write_bytes(gzip.compress(data))
        return [], "it is compressed with gzip; decompress it with gzip -dc"
    if kind == "zstd":
        path.write_bytes(b"\x28\xb5\x2f\xfd" + data[:1000])
        return [], "it is compressed with zstd; decompress it with zstd -dc"
    if kind == "Git LFS":
        path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 10\n")
        return [], "it is a pointer of Git LFS; fetch the file with git lfs pull"
    if kind == "a page":
        path.write_bytes(b"<html>404 not found</html>")
        return [], "no header of a member at byte 0"
    assert kind == "zeros"
    path.write_bytes(data[: data.index(b"b.jpg")] + bytes(20 << 20))
    return ["a"], f"there are only zeros from byte {data.index(b'b.jpg')} on, as when a download broke off"


KINDS = ["cut", "no end mark", "half an end mark", "no header", "joined", "empty", "gzip", "zstd", "Git LFS"]


@pytest.mark.parametrize("kind", [*KINDS, "a page", "zeros"])
def test_a_damaged_tar_among_three(tmp_path, kind):
    for number, keys in enumerate(("ef", "abc", "gh")):
        write_tar(tmp_path / f"{number}.tar", [file for key in keys for file in sample(key)])
    keys, words = damaged(tmp_path / "1.tar", kind)
    for read in (3, 0):  # without an index, then with one
        with pytest.raises(
            DataError, match=rf"1.tar is not a whole tar \({words}.*\); write or copy it again, or pass --sk"
        ):
            Shards(tmp_path)
        with pytest.raises(DataError, match=rf"1.tar is not a whole tar \({words}"):
            build_index(tmp_path, 1, progress=False)
        shards = Shards(tmp_path, options=SKIP)
        assert keys_of(shards) == ["e", "f", *keys, "g", "h"] and shards.shard_sizes == [2, len(keys), 2]
        (problem,) = shards.problems
        assert (problem.where, problem.cause, problem.count) == (str(tmp_path / "1.tar"), "damaged shard", 1)
        found = f"the {len(keys)} samples before that are read" if keys else "no sample is read"
        assert problem.reason.endswith(found)
        captions = [text for number in range(3) for text in shards.captions(number)]
        for i, key in enumerate(keys_of(shards)):
            assert shards.image_bytes(i) == b"image"
            if (key, kind) in (("c", "cut"), ("b", "no header")):  # an ordinary sample without a caption
                assert isinstance(captions[i], BadText) and captions[i].cause == "no caption"
            else:
                assert captions[i] == f"caption {key}"
        # The index holds the damage too: opening it is the same.
        built = build_index(tmp_path, 1, progress=False, options=SKIP)
        assert built.problems == shards.problems and built.read == read


def test_a_tar_cut_anywhere_keeps_what_lies_before(tmp_path):
    """At every cut each sample is read as it was, lacks a file, or is lost to the cut, which is told."""
    rng = random.Random(0)
    files = [file for i in range(4) for file in sample(f"{i}", image=png(rng))]
    path = write_tar(tmp_path / "x.tar", files)
    write_tar(tmp_path / "y.tar", sample("y"))
    data, end, content = path.read_bytes(), end_of(path), dict(files)
    with path.open("rb") as file:
        whole = list(members(file.fileno(), len(data)))
    for size in [*range(0, end + 1024, 512), *rng.sample(range(end + 1024), 100)]:
        path.write_bytes(data[:size])
        with pytest.raises(DataError, match="x.tar is not a whole tar"):
            Shards(tmp_path)
        shards = Shards(tmp_path, options=SKIP)
        assert [problem.cause for problem in shards.problems] == ["damaged shard"]
        left = [member.name.decode() for member in whole if member.offset + member.size <= size]
        assert keys_of(shards) == [*dict.fromkeys(name[0] for name in left), "y"]
        for i, key in enumerate(keys_of(shards)[:-1]):
            assert shards.image_bytes(i) == content[f"{key}.jpg"]
            text = shards.captions(0)[i]
            assert text == f"caption {key}" if f"{key}.txt" in left else text.cause == "no caption"
    path.write_bytes(data[: end + 1024])
    assert len(Shards(tmp_path)) == 5 and not Shards(tmp_path).problems


def test_a_name_that_is_not_utf8(tmp_path):
    """One such name ended every command."""
    write_tar(tmp_path / "x.tar", [*sample("a"), (b"caf\xe9.jpg", b"x"), (b"caf\xe9.txt", b"x"), *sample("b")])
    for _ in range(2):
        with pytest.raises(
            DataError, match=r"x.tar: the name of a file in it is not UTF-8 \(caf\\xe9.jpg, .*--skip-bad"
        ):
            Shards(tmp_path)
        shards = Shards(tmp_path, options=SKIP)
        assert keys_of(shards) == ["a", "b"]
        (problem,) = shards.problems
        assert (problem.cause, problem.count) == ("not UTF-8", 2)
        assert problem.reason.endswith(r": caf\xe9.jpg, caf\xe9.txt")
        build_index(tmp_path, 1, progress=False, options=SKIP)


def test_a_set_of_which_nothing_can_be_read(tmp_path):
    (tmp_path / "x.tar").write_bytes(gzip.compress(bytes(10_240)))
    with pytest.raises(DataError, match=r"1 tar shards hold no sample \(.*x.tar: it is compressed with gzip"):
        Shards(tmp_path, options=SKIP)


def test_empty_tars_among_others(tmp_path):
    for number in (0, 2, 4):
        write_tar(tmp_path / f"{number}.tar", [])
    write_tar(tmp_path / "1.tar", sample("a"))
    write_tar(tmp_path / "3.tar", sample("b"))
    for shards in both_ways(tmp_path):
        assert shards.shard_sizes == [0, 1, 0, 1, 0] and keys_of(shards) == ["a", "b"]
        assert [shards.captions(number) for number in range(5)] == [[], ["caption a"], [], ["caption b"], []]
        assert [shards.shard_hashes(number).numel() for number in range(5)] == [0, 1, 0, 1, 0]
        assert not shards.problems and shards.caption(1) == "caption b"


@pytest.mark.parametrize("processes", [1, 2])
def test_damage_is_refused_by_any_number_of_processes(tmp_path, processes, monkeypatch):
    monkeypatch.setattr("lift_fast.data.index._PROCESSES_FROM", 1)
    for number in range(3):
        write_tar(tmp_path / f"{number}.tar", sample(f"{number}"))
    (tmp_path / "1.tar").write_bytes((tmp_path / "1.tar").read_bytes()[:1536])
    with pytest.raises(DataError, match="1.tar is not a whole tar"):
        build_index(tmp_path, processes, progress=False)
    assert build_index(tmp_path, processes, progress=False, options=SKIP).samples == 3
    with pytest.raises(DataError, match="1.tar is not a whole tar"):  # also when nothing has to be read again
        build_index(tmp_path, processes, progress=False)


# The command.


def run(*words):
    try:
        return main([str(word) for word in words])
    except SystemExit as error:
        return error.code


def test_the_command_tells_what_it_leaves_out(tmp_path, capsys):
    write_tar(tmp_path / "0.tar", [*sample("22"), *sample("22.05")])
    write_tar(tmp_path / "1.tar", sample("a"))
    (tmp_path / "1.tar").write_bytes((tmp_path / "1.tar").read_bytes()[:1536])
    assert run("data", "index", tmp_path) == 2
    assert "1.tar is not a whole tar" in capsys.readouterr().err
    assert not (tmp_path / INDEX).exists()
    assert not run("data", "index", tmp_path, "--skip-bad")
    out, err = capsys.readouterr()
    assert "2 samples in 2 shards" in out
    assert "22.05.jpg, 22.05.txt" in err and "its member at byte 1024 reaches beyond the end" in err
    assert not run("data", "index", tmp_path, "--skip-bad", "--image-suffix", "05.jpg", "--text-suffix", "05.txt")
    assert (
        Shards(tmp_path, options=DataOptions(True, image_suffix="05.jpg", text_suffix="05.txt")).caption(0)
        == "caption 22.05"
    )
    assert run("data", "check", tmp_path) not in (0, None)
    assert "--image-suffix" in capsys.readouterr().err
