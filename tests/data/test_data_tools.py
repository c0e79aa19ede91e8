"""lift_fast.data.{stats,check,pack}, on data sets with everything that can be wrong."""

import csv
import io
import json
import os
import random
import tarfile
import threading
from collections import Counter
from itertools import count
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet
from support import complete  # noqa: F401
from support.hostile import encoded, exif, hostile, scene
from support.tiny_sets import make_set

from lift_fast.data.check import check
from lift_fast.data.images import decode, read_header
from lift_fast.data.index import INDEX, build_index
from lift_fast.data.open import open_data
from lift_fast.data.options import DataOptions
from lift_fast.data.pack import pack, safe_key
from lift_fast.data.samples import BadSample
from lift_fast.data.shards import Shards
from lift_fast.data.stats import CaptionCounts, stats
from lift_fast.errors import ConfigError, DataError

SKIP_BAD = DataOptions(skip_bad=True)


def write_tar(path: Path, files: list[tuple[str, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def members_of(folder: Path) -> list[tuple[str, bytes]]:
    """(name, bytes) of every file of every tar, in order."""
    found = []
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            found += [(member.name, tar.extractfile(member).read()) for member in tar]
    return found


def hostile_set(folder: Path, per_shard: int = 40) -> dict[str, tuple[bytes, str | None]]:
    """Tars of every hostile picture, whatever it is named; the cases by the keys they have."""
    cases = {f"k{i:03d}": case for i, case in enumerate(hostile(random.Random(0)).values())}
    files = [
        [(f"{key}.jpg", data), (f"{key}.txt", f"caption of {key}".encode()), (f"{key}.json", b'{"n": 1}')]
        for key, (data, _) in cases.items()
    ]
    for k in range(0, len(files), per_shard):
        write_tar(folder / f"{k // per_shard:05d}.tar", sum(files[k : k + per_shard], []))
    return cases


def jpeg(seed: int, width: int = 48, height: int = 36, **settings) -> bytes:
    return encoded(scene(random.Random(seed), width, height), "JPEG", **settings)


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def table_set(folder: Path, rows: list[dict[str, str]], suffix: str = "csv") -> None:
    """Images with a metadata file; the image that a row names is made from the row's number."""
    folder.mkdir()
    for i, row in enumerate(rows):
        path = folder / row["file_name"]
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(jpeg(i))
    with open(folder / f"metadata.{suffix}", "w", newline="") as file:
        if suffix == "jsonl":
            file.writelines(json.dumps(row) + "\n" for row in rows)
        else:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="," if suffix == "csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)


def authors_set(folder: Path) -> None:
    """LIFT's authors' layout: two parquet files of two captions, and an image for each row."""
    (folder / "captions").mkdir(parents=True)
    for number in range(2):
        name = f"train-{number:05d}-of-00002"
        keys = [f"{3 * number + i:012d}" for i in range(3)]
        (folder / name).mkdir()
        for i, key in enumerate(keys):
            (folder / name / f"{key}.jpg").write_bytes(jpeg(3 * number + i))
        columns = {"key": keys, "re_caption": [f"long {key}" for key in keys], "org_caption": ["short", "short", ""]}
        table = pa.table({**columns, "extension": ["jpg"] * 3, "score": [0.5] * 3})
        parquet.write_table(table, folder / "captions" / f"{name}.parquet")


# stats


def test_stats_of_a_small_set(tmp_path):
    def sample(i: int, data: bytes, caption: str, meta: dict) -> list[tuple[str, bytes]]:
        return [(f"k{i}.jpg", data), (f"k{i}.txt", caption.encode()), (f"k{i}.json", json.dumps(meta).encode())]

    sizes = [(100, 300), (300, 224), (500, 700)]
    pictures = [jpeg(i, *size) for i, size in enumerate(sizes)]
    turned = encoded(scene(random.Random(3), 400, 250), "JPEG", exif=exif(6))  # upright it is 250 x 400
    png = encoded(scene(random.Random(4), 1000, 10), "PNG")
    captions = ["a", "bbb", "a", "", "dddd"]
    files = [
        sample(i, data, caption, {"long": 10 * caption, "width": 3, "url": "x"})
        for i, (data, caption) in enumerate(zip([*pictures, turned, png], captions, strict=True))
    ]
    write_tar(tmp_path / "d/0.tar", files[0] + files[1])
    write_tar(tmp_path / "d/1.tar", files[2] + files[3] + files[4] + sample(5, b"no picture", "eeeee", {})[:2])
    figures = stats(open_data(tmp_path / "d"), None, progress=False)
    assert json.loads(json.dumps(figures)) == figures
    assert (figures["samples"], figures["sampled"], figures["shards"]) == (6, 6, 2)
    assert (figures["smallest_shard"], figures["largest_shard"]) == (2, 4)
    assert figures["bytes"] == sum(path.stat().st_size for path in (tmp_path / "d").glob("*.tar"))
    assert figures["picture_bytes"] == sum(map(len, (*pictures, turned, png, b"no picture")))
    assert figures["formats"] == {"jpeg": 4, "png": 1} and figures["bad"] == {"not a picture": 1}
    assert figures["width"] == {"min": 100, "median": 300, "max": 1000}
    assert figures["height"] == {"min": 10, "median": 300, "max": 700}
    assert figures["below_224"] == pytest.approx(2 / 5)
    assert set(figures["captions"]) == {"txt", "long", "url"}  # "width" is no text
    assert figures["captions"]["txt"] == {"samples": 5, "median": 3, "p95": 5, "max": 5, "repeats": pytest.approx(0.2)}
    assert figures["captions"]["long"]["median"] == 10 and figures["captions"]["long"]["samples"] == 4
    assert figures["captions"]["url"]["repeats"] == pytest.approx(0.8)
    assert figures["no_text"] == 0


def test_stats_reads_a_random_sample_and_decodes_nothing(tmp_path, monkeypatch):
    make_set(tmp_path / "d", 500, per_shard=100)
    samples = open_data(tmp_path / "d")
    read = []
    monkeypatch.setattr("lift_fast.data.images._decode", None)
    real = samples.image_bytes
    monkeypatch.setattr(samples, "image_bytes", lambda row: read.append(row) or real(row))
    figures = stats(samples, 100, threads=3, progress=False)
    assert figures["sampled"] == len(set(read)) == 100 and figures["samples"] == 500
    parts = Counter(row // 100 for row in read)
    assert set(parts) == set(range(5)) and max(parts.values()) < 50  # from all of it
    assert figures["captions"]["txt"]["samples"] == 100
    assert stats(samples, 10**9, progress=False)["sampled"] == 500
    with pytest.raises(ConfigError, match="at least 1"):
        stats(samples, 0)


def test_stats_count_bad_ones_as_training_does(tmp_path):
    cases = hostile_set(tmp_path / "d")
    figures = stats(open_data(tmp_path / "d"), progress=False)
    seen = Counter()
    for data, _ in cases.values():
        try:
            read_header(data)
        except BadSample as error:
            seen[error.cause] += 1
    assert figures["bad"] == dict(seen) and sum(figures["formats"].values()) == len(cases) - seen.total()


def test_a_set_without_text_or_pictures(tmp_path):
    write_tar(tmp_path / "d/0.tar", [("a.json", b"{"), ("b.json", b"[]"), ("c.txt", b" \n")])
    figures = stats(open_data(tmp_path / "d"), progress=False)
    assert figures["bad"] == {"missing": 3} and figures["no_text"] == 3 and figures["captions"] == {}
    assert figures["width"] is figures["below_224"] is None


def test_metadata_of_another_kind_in_every_sample(tmp_path):
    entries = [(f"{i}.json", json.dumps({f"field {i}": "x"}).encode()) for i in range(300)]
    write_tar(tmp_path / "d/0.tar", entries)
    assert len(stats(open_data(tmp_path / "d"), progress=False)["captions"]) == 100


def test_stats_of_the_other_layouts(tmp_path):
    table_set(tmp_path / "t", [{"file_name": f"{i}.jpg", "caption": "c" * i, "key": f"k{i}"} for i in range(4)], "tsv")
    figures = stats(open_data(tmp_path / "t"), progress=False)
    assert figures["formats"] == {"jpeg": 4} and figures["bytes"] is None
    assert figures["captions"]["caption"] == {"samples": 3, "median": 2, "p95": 3, "max": 3, "repeats": 0.0}
    authors_set(tmp_path / "a")
    figures = stats(open_data(tmp_path / "a"), progress=False)
    assert figures["samples"] == 6 and figures["shards"] == 2 and figures["formats"] == {"jpeg": 6}
    assert set(figures["captions"]) == {"re_caption", "org_caption"}
    assert figures["captions"]["org_caption"] == {"samples": 4, "median": 5, "p95": 5, "max": 5, "repeats": 0.75}


def test_repeats_are_estimated_in_bounded_memory(monkeypatch):
    monkeypatch.setattr("lift_fast.data.stats._DISTINCT", 1000)
    found = CaptionCounts()
    for i in range(40_000):
        found.add(f"caption {i % 20_000}")
    assert len(found._kept) <= 1000
    assert found.report()["repeats"] == pytest.approx(0.5, abs=0.06)


# check


@pytest.mark.parametrize("threads", [1, 5])
def test_check_finds_every_bad_picture_by_its_cause(tmp_path, threads):
    cases = hostile_set(tmp_path / "d")
    with open(tmp_path / "bad.jsonl", "w") as file:
        figures = check(tmp_path / "d", bad=file, threads=threads, progress=False)
    bad = {key: cause for key, (_, cause) in cases.items() if cause}
    lines = lines_of(tmp_path / "bad.jsonl")
    assert [(line["sample"].split("'")[1], line["cause"]) for line in lines] == list(bad.items())
    assert [line["row"] for line in lines] == [list(cases).index(key) for key in bad]
    assert all(line["reason"] and set(line) == {"sample", "row", "cause", "reason"} for line in lines)
    assert figures["samples"] == len(cases) and figures["bad"] == len(bad) and figures["first"] == lines[:5]
    assert figures["causes"] == dict(Counter(bad.values())) and figures["images_per_s"] > 0


def test_check_of_a_clean_set(tmp_path):
    make_set(tmp_path / "d")
    figures = check(tmp_path / "d", progress=False)
    assert figures["bad"] == 0 and figures["causes"] == {} and figures["first"] == []
    assert (figures["samples"], figures["shards"], figures["damaged_shards"]) == (10, 3, 0)


def test_check_reads_the_captions_asked_for(tmp_path):
    good = jpeg(0)
    write_tar(
        tmp_path / "d/0.tar",
        [
            *[("a.jpg", good), ("a.txt", b"x"), ("a.json", b'{"long": "y"}')],
            *[("b.jpg", good), ("b.txt", b" \n"), ("b.json", b'{"long": "y"}')],
            *[("c.jpg", b""), ("c.json", b"{")],
        ],
    )
    figures = check(tmp_path / "d", progress=False)
    assert figures["bad"] == 2 and figures["causes"] == {"no caption": 2, "empty": 1, "does not parse": 1}
    assert figures["first"][0]["sample"].endswith("sample 'b'") and "no caption 'txt'" in figures["first"][0]["reason"]
    figures = check(tmp_path / "d", "long", progress=False)
    assert figures["bad"] == 1 and figures["causes"] == {"does not parse": 1, "empty": 1}
    assert "does not parse" in figures["first"][1]["reason"]


def test_check_finds_names_that_occur_twice_in_a_tar(tmp_path):
    good = jpeg(0)
    first = [("p/a.jpg", good), ("p/a.txt", b"x"), ("b.jpg", good), ("b.txt", b"x")]
    write_tar(tmp_path / "d/0.tar", [*first, ("p/a.jpg", good), ("c.jpg", good), ("c.txt", b"x")])
    write_tar(tmp_path / "d/1.tar", [("b.jpg", good), ("b.txt", b"x")])  # another shard's keys are its own
    figures = check(tmp_path / "d", progress=False)
    assert figures["samples"] == 4 and figures["bad"] == 1 and figures["causes"] == {"repeated key": 1}
    assert (
        figures["first"][0]["sample"].endswith("sample 'p/a'") and "a.jpg occurs twice" in figures["first"][0]["reason"]
    )


def test_check_of_the_other_layouts(tmp_path):
    rows = [{"file_name": f"{i}.jpg", "caption": "x", "key": f"k{i % 4}"} for i in range(6)]
    table_set(tmp_path / "t", rows)
    (tmp_path / "t/2.jpg").unlink()
    (tmp_path / "t/3.jpg").write_bytes(b"")
    figures = check(tmp_path / "t", progress=False)
    assert figures["causes"] == {"repeated key": 2, "missing": 1, "empty": 1} and figures["bad"] == 4
    assert [line["row"] for line in figures["first"]] == [2, 3, 4, 5]
    assert "'k0'" in figures["first"][2]["reason"]
    authors_set(tmp_path / "a")
    figures = check(tmp_path / "a", "org_caption", progress=False)
    assert figures["causes"] == {"no caption": 2} and figures["samples"] == 6 and figures["shards"] == 2
    assert [line["row"] for line in figures["first"]] == [2, 5]
    for path in (tmp_path / "t", tmp_path / "a"):
        with pytest.raises(DataError, match="no column 'long'"):
            check(path, "long", progress=False)


@pytest.mark.parametrize("indexed", [True, False])
def test_check_goes_on_past_damaged_tars(tmp_path, indexed):
    make_set(tmp_path / "d", count=20, per_shard=4, broken={9})
    if indexed:
        build_index(tmp_path / "d", 1, progress=False)
    for name, part in ("00001.tar", slice(0, 3000)), ("00003.tar", slice(512, None)):
        path = tmp_path / "d" / name
        path.write_bytes(path.read_bytes()[part])
    (tmp_path / "d/00004.tar").write_bytes(random.Random(0).randbytes(5000))
    with open(tmp_path / "bad.jsonl", "w") as file:
        figures = check(tmp_path / "d", bad=file, progress=False)
    assert figures["damaged_shards"] == 3 and figures["causes"] == {"damaged shard": 3, "not a picture": 1}
    # Of 00001.tar one sample lies before the cut.
    assert (figures["samples"], figures["shards"], figures["bad"]) == (9, 5, 1)
    lines = lines_of(tmp_path / "bad.jsonl")
    assert [Path(line["sample"]).name for line in lines[:3]] == ["00001.tar", "00003.tar", "00004.tar"]
    assert [line["row"] for line in lines] == [None, None, None, 6]
    assert "'s0-009'" in lines[3]["sample"]


def test_check_sees_damage_behind_a_fresh_index(tmp_path):
    make_set(tmp_path / "d", 8, per_shard=4)
    build_index(tmp_path / "d", 1, progress=False)
    tar = tmp_path / "d/00001.tar"
    status, data = tar.stat(), bytearray(tar.read_bytes())
    data[1024:1536] = random.Random(0).randbytes(512)  # the header of the first caption
    tar.write_bytes(data)
    os.utime(tar, ns=(status.st_atime_ns, status.st_mtime_ns))
    figures = check(tmp_path / "d", progress=False)
    assert figures["causes"] == {"damaged shard": 1} and figures["samples"] == 8 and figures["bad"] == 0
    assert figures["damaged_shards"] == 1
    assert figures["first"][0]["sample"] == str(tar) and "no header" in figures["first"][0]["reason"]


def test_check_of_what_is_no_data_set(tmp_path):
    with pytest.raises(DataError, match="no data set at"):
        check(tmp_path / "nowhere", progress=False)
    make_set(tmp_path / "d")
    build_index(tmp_path / "d", 1, progress=False)
    make_set(tmp_path / "e", seed=1)
    (tmp_path / "e/00000.tar").rename(tmp_path / "d/00009.tar")
    with pytest.raises(DataError, match="out of date"):  # no damaged tar: the error is not skipped
        check(tmp_path / "d", progress=False)


def test_names_that_are_no_unicode_can_be_printed(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"file_name": "\\ud800.jpg", "caption": "x"}\n')
    figures = check(tmp_path / "t.jsonl", progress=False)
    assert figures["bad"] == 1 and "\\ud800" in figures["first"][0]["reason"].encode().decode()


def test_threads_end_with_a_failure(tmp_path, monkeypatch):
    make_set(tmp_path / "d", 200)

    def broken(data, header):
        raise AssertionError("a bug")

    monkeypatch.setattr("lift_fast.data.check.decode", broken)
    before = threading.active_count()
    with pytest.raises(AssertionError, match="a bug"):
        check(tmp_path / "d", threads=4, progress=False)
    assert threading.active_count() == before


# pack


def test_pack_leaves_out_the_bad_and_copies_bytes(tmp_path):
    cases = hostile_set(tmp_path / "d")
    figures = pack(open_data(tmp_path / "d"), tmp_path / "out", samples_per_shard=30, progress=False)
    good = {key: data for key, (data, cause) in cases.items() if cause is None}
    assert figures["samples"] == len(good) and figures["bad"] == len(cases) - len(good)
    assert figures["shards"] == -(-len(good) // 30) == len(list((tmp_path / "out").glob("*.tar")))
    lines = lines_of(tmp_path / "out/bad.jsonl")
    assert Counter(line["cause"] for line in lines) == figures["causes"]
    packed = members_of(tmp_path / "out")
    assert [name for name, _ in packed if name.endswith(".txt")] == [f"{key}.txt" for key in good]
    for name, data in packed:
        key, _, suffix = name.partition(".")
        if suffix == "txt":
            assert data.decode() == f"caption of {key}"
        elif suffix == "json":
            assert json.loads(data) == {"n": 1}
        else:
            header = read_header(good[key])
            assert suffix == {"jpeg": "jpg", "gif": "png", "bmp": "png"}.get(header.format, header.format)
            if header.format in ("gif", "bmp"):
                np.testing.assert_array_equal(decode(data, read_header(data)), decode(good[key], header))
            else:
                assert data == good[key]
    # The packed set is clean, has a fresh index, and no other file is left.
    assert check(tmp_path / "out", progress=False)["causes"] == {}
    assert build_index(tmp_path / "out", 1, progress=False).read == 0
    assert {path.name for path in tmp_path.iterdir()} == {"d", "out"}
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".tar", ".jsonl", Path(INDEX).suffix}


def test_pack_resizes_what_is_larger(tmp_path):
    pictures = {
        "wide": jpeg(0, 400, 100),
        "small": jpeg(1, 300, 32),
        "turned": encoded(scene(random.Random(2), 90, 60), "JPEG", exif=exif(6)),
        "png": encoded(scene(random.Random(3), 64, 128), "PNG"),
        "long": encoded(scene(random.Random(4), 65_535, 33), "PNG"),  # longer than a JPEG may be
    }
    write_tar(tmp_path / "d/0.tar", [e for k, v in pictures.items() for e in ((f"{k}.png", v), (f"{k}.txt", b"x"))])
    figures = pack(open_data(tmp_path / "d"), tmp_path / "out", size=32, quality=90, progress=False)
    assert figures["resized"] == 4 and figures["bad"] == 0
    packed = {name: data for name, data in members_of(tmp_path / "out") if name.endswith(("g", "p"))}
    sizes = {name: Image.open(io.BytesIO(data)).size for name, data in packed.items()}
    assert sizes == {
        "wide.jpg": (128, 32),
        "small.jpg": (300, 32),
        "turned.jpg": (32, 48),
        "png.jpg": (32, 64),
        "long.jpg": (round(65_535 * 32 / 33), 32),
    }
    assert packed["small.jpg"] == pictures["small"]
    source = decode(pictures["wide"], read_header(pictures["wide"]))
    want = np.asarray(Image.fromarray(source).resize((128, 32), Image.Resampling.LANCZOS), dtype=int)
    got = decode(packed["wide.jpg"], read_header(packed["wide.jpg"])).astype(int)
    assert np.abs(got - want).mean() < 3
    worse = pack(open_data(tmp_path / "d"), tmp_path / "worse", size=32, quality=20, progress=False)
    assert worse["resized"] == 4
    assert len(dict(members_of(tmp_path / "worse"))["wide.jpg"]) < len(packed["wide.jpg"])


def test_pack_takes_the_first_caption_there_is(tmp_path):
    good = jpeg(0)
    write_tar(
        tmp_path / "d/0.tar",
        [
            *[("a.jpg", good), ("a.txt", b"short"), ("a.json", b'{"long": "longer", "n": 2}')],
            *[("b.jpg", good), ("b.txt", b"short"), ("b.json", b'{"long": ""}')],
            *[("c.jpg", good), ("c.json", b'{"n": 1}')],
        ],
    )
    figures = pack(open_data(tmp_path / "d"), tmp_path / "out", ["long", "txt"], progress=False)
    assert figures["samples"] == 2 and figures["causes"] == {"no caption": 1}
    packed = dict(members_of(tmp_path / "out"))
    assert (packed["a.txt"], packed["b.txt"]) == (b"longer", b"short")
    assert json.loads(packed["a.json"]) == {"n": 2, "txt": "short"}  # nothing is lost
    assert json.loads(packed["b.json"]) == {"long": ""}


def test_packing_again_changes_the_shards_alone(tmp_path):
    before = make_set(tmp_path / "d", 10, per_shard=4)
    pack(open_data(tmp_path / "d"), tmp_path / "out", samples_per_shard=3, progress=False)
    after = Shards(tmp_path / "out")
    assert after.shard_sizes == [3, 3, 3, 1] and members_of(tmp_path / "d") == members_of(tmp_path / "out")
    assert [after.caption(i, "long") for i in range(10)] == [before.caption(i, "long") for i in range(10)]


def test_keys_are_made_safe_and_stay_apart(tmp_path):
    for key in ("a", "000000012", "Ünïcode ключ", "x" * 80, "a-2", "with space"):
        assert safe_key(key) == key
    odd = ["", ".", "a.b", "a/b", "a_b.", "./a", "x" * 81, "x" * 82, "é" * 60, "a\nb", "a\0b", "\ud800", "-/-", "a.c"]
    made = [safe_key(key) for key in odd]
    assert len(set(made)) == len(odd)
    assert all(name.isascii() and len(name) <= 80 and not set("./\n\0") & set(name) for name in made)
    assert safe_key("a/b") == safe_key("a/b") and safe_key("a/b").startswith("a_b-")

    good = jpeg(0)
    files = [("p/a.jpg", "1"), ("p/b.jpg", "2"), ("q/a.jpg", "3"), ("a.jpg", "4")]
    entries = [entry for name, text in files for entry in ((name, good), (f"{name[:-4]}.txt", text.encode()))]
    write_tar(tmp_path / "d/0.tar", entries)
    pack(open_data(tmp_path / "d"), tmp_path / "out", progress=False)
    packed = dict(members_of(tmp_path / "out"))
    assert packed["a.txt"] == b"4" and packed["a.json"] == b"{}"
    assert json.loads(packed[f"{safe_key('q/a')}.json"]) == {"source_key": "q/a"}


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl"])
def test_pack_of_a_folder_of_pictures(tmp_path, suffix):
    names = ["a.jpg", "sub/a.jpg", "b.jpg", "c.jpg"]
    rows = [
        {"file_name": name, "caption": f"about {name}", "key": key, "n": str(i)}
        for i, (name, key) in enumerate(zip(names, ["k", "k", "k.x", ""], strict=True))
    ]
    table_set(tmp_path / "d", rows, suffix)
    figures = pack(open_data(tmp_path / "d", options=SKIP_BAD), tmp_path / "out", progress=False)
    assert figures["samples"] == 4 and figures["bad"] == 0
    packed = dict(members_of(tmp_path / "out"))
    keys = ["k", "k-2", safe_key("k.x"), "3"]  # without a key its row
    assert [name for name in packed if name.endswith(".jpg")] == [f"{key}.jpg" for key in keys]
    for i, key in enumerate(keys):
        assert packed[f"{key}.jpg"] == jpeg(i) and packed[f"{key}.txt"].decode() == f"about {names[i]}"
        meta = json.loads(packed[f"{key}.json"])
        assert (meta["file_name"], meta["n"]) == (names[i], str(i)) and "caption" not in meta
        assert meta.get("source_key") == [None, "k", "k.x", None][i]


def test_pack_of_the_authors_layout(tmp_path):
    authors_set(tmp_path / "a")
    figures = pack(open_data(tmp_path / "a"), tmp_path / "out", progress=False)
    assert figures["samples"] == 6
    packed = dict(members_of(tmp_path / "out"))
    for i in range(6):
        key = f"{i:012d}"
        assert packed[f"{key}.jpg"] == jpeg(i) and packed[f"{key}.txt"].decode() == f"long {key}"
        assert json.loads(packed[f"{key}.json"]) == ({} if i % 3 == 2 else {"org_caption": "short"})
    figures = pack(open_data(tmp_path / "a"), tmp_path / "short", ["org_caption"], progress=False)
    assert figures["samples"] == 4 and figures["causes"] == {"no caption": 2}
    with pytest.raises(DataError, match="no column 'nothing'"):
        pack(open_data(tmp_path / "a"), tmp_path / "x", ["org_caption", "nothing"], progress=False)


def test_a_key_that_its_shard_holds_gets_a_number(tmp_path):
    good = jpeg(0)
    for shard, keys in enumerate((["a", "a-2"], ["a", "b"], ["a"])):
        write_tar(tmp_path / f"d/{shard}.tar", [e for k in keys for e in ((f"{k}.jpg", good), (f"{k}.txt", b"x"))])
    pack(open_data(tmp_path / "d"), tmp_path / "one", progress=False)
    names = [name[:-4] for name, _ in members_of(tmp_path / "one") if name.endswith(".jpg")]
    assert names == ["a", "a-2", "a-3", "b", "a-4"]
    pack(open_data(tmp_path / "d"), tmp_path / "two", samples_per_shard=2, progress=False)
    names = [name[:-4] for name, _ in members_of(tmp_path / "two") if name.endswith(".jpg")]
    assert names == ["a", "a-2", "a", "b", "a"]


def test_a_pack_that_fails_leaves_nothing(tmp_path, monkeypatch):
    make_set(tmp_path / "d", 30)
    samples = open_data(tmp_path / "d")

    calls = count()

    def stopped(data, header):
        if next(calls) == 20:
            raise KeyboardInterrupt
        return decode(data, header)

    with monkeypatch.context() as patch:
        patch.setattr("lift_fast.data.pack.decode", stopped)
        with pytest.raises(KeyboardInterrupt):
            pack(samples, tmp_path / "out", samples_per_shard=4, threads=2, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["d"]

    def full(folder, **settings):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("lift_fast.data.pack.build_index", full)
        with pytest.raises(OSError, match="No space"):
            pack(samples, tmp_path / "out", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["d"]
    assert pack(samples, tmp_path / "deep/er/out", progress=False)["samples"] == 30


def test_what_pack_refuses(tmp_path):
    make_set(tmp_path / "d", 3, broken={0, 1, 2})
    samples = open_data(tmp_path / "d")
    with pytest.raises(DataError, match="none of its 3 samples is good; the first: .*'s0-000': not a picture"):
        pack(samples, tmp_path / "out", progress=False)
    with pytest.raises(DataError, match="exists already"):
        pack(samples, tmp_path / "d", progress=False)
    for settings in ({"samples_per_shard": 0}, {"size": 0}, {"quality": 0}, {"quality": 101}, {"fields": ()}):
        with pytest.raises(ConfigError, match="at least 1|100 at most|name of the captions"):
            pack(samples, tmp_path / "out", progress=False, **settings)
    assert [path.name for path in tmp_path.iterdir()] == ["d"]
