"""Image files with parquet, CSV, TSV and JSONL tables as a data set, and how open_data recognises each layout."""

import csv
import json
import os
import random

import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from support.tiny_caches import ENCODER
from support.tiny_sets import keys_of, make_set, png
from support.tiny_text import TinyEncoder

from lift_fast.cache import Cache, key_hash
from lift_fast.cache.parquet import import_parquet
from lift_fast.data.folders import ParquetImages
from lift_fast.data.open import open_data
from lift_fast.data.options import DataOptions
from lift_fast.data.rows import SHARD_ROWS
from lift_fast.data.samples import BadSample, Collection
from lift_fast.data.shards import Shards
from lift_fast.data.sources import open_source
from lift_fast.data.tables import TableImages
from lift_fast.errors import CacheMismatch, ConfigError, DataError
from lift_fast.text.embed import embed_share

SIZES = [5, 12, 1]
STEMS = [f"train-{number:05d}-of-00003" for number in range(3)]


def write_parquet(path, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.table(columns), path, row_group_size=4)


def keys_for(number):
    return [f"{row:012d}" for row in range(SIZES[number])]


def picture(number, row):
    return png(random.Random(100 * number + row), (4, 3))


def write_pictures(root):
    for number, stem in enumerate(STEMS):
        (root / stem).mkdir(parents=True)
        for row, key in enumerate(keys_for(number)):
            (root / stem / f"{key}.jpg").write_bytes(picture(number, row))


def write_captions(folder, **change):
    for number, stem in enumerate(STEMS):
        keys = keys_for(number)
        columns = {
            "url": [f"http://there/{key}" for key in keys],
            "re_caption": [f"long {number} {key}" for key in keys],
            "org_caption": [f"short {number} {key}" for key in keys],
            "key": keys,
            "extension": ["jpg"] * len(keys),
        }
        write_parquet(folder / f"{stem}.parquet", **columns | change)


def write_embeddings(folder):
    """As the authors' embed.py: a few rows a file, 10.parquet behind 9.parquet."""
    for number, stem in enumerate(STEMS):
        names = [f"{key}.jpg" for key in keys_for(number)]
        for file, name in enumerate(names):
            write_parquet(folder / stem / f"{file}.parquet", key=[name], embedding=[[float(number), float(file), 1.0]])


@pytest.fixture
def authors(tmp_path):
    """The three folders of LIFT's DATASET.md."""
    write_captions(tmp_path / "raw_captions")
    write_embeddings(tmp_path / "caption_embeddings")
    write_pictures(tmp_path / "images")
    return tmp_path


def check_pictures(data):
    i = 0
    for number, size in enumerate(SIZES):
        for row in range(size):
            assert data.image_bytes(i) == picture(number, row)
            i += 1
    assert i == len(data)


# the authors' layout


def test_the_authors_folders(authors):
    for data in (open_data(authors), open_data(authors / "raw_captions", authors / "images")):
        assert isinstance(data, ParquetImages) and data.folder == authors / "raw_captions"
        assert data.names == [f"{stem}.parquet" for stem in STEMS] and data.shard_sizes == SIZES and len(data) == 18
        assert [data.shard_keys(number) for number in range(3)] == [keys_for(number) for number in range(3)]
        assert data.shard_hashes(2).tolist() == [key_hash("000000000000")]
        assert data.caption(5) == "long 1 000000000000" and data.caption(17, "org_caption") == "short 2 000000000000"
        assert data.where(6) == f"{authors}/raw_captions/{STEMS[1]}.parquet: row 1, key '000000000001'"
        assert data.meta(0) == {}
        check_pictures(data)
        with pytest.raises(DataError, match="no column 'long'; choose with --field among: url, re_caption, org_"):
            data.caption(0, "long")
        for number in (-1, 18):
            with pytest.raises(IndexError, match="of 18"):
                data.image_bytes(number)
    assert Collection([data, data]).bad_captions("org_caption") == {}


def test_embeddings_name_the_pictures_too(authors):
    data = open_data(authors / "caption_embeddings", images=authors / "images")
    assert data.names == STEMS and data.shard_sizes == SIZES
    assert [data.shard_keys(number) for number in range(3)] == [keys_for(number) for number in range(3)]
    check_pictures(data)
    with pytest.raises(DataError, match="no column of captions .*re_caption.* among: key, embedding"):
        data.caption(0)


def test_caches_made_either_way_fit_data_opened_either_way(authors):
    embed_share(open_source(authors / "raw_captions"), authors / "embedded", TinyEncoder(), progress=False)
    import_parquet(authors / "caption_embeddings", authors / "imported", "f32", ENCODER, "re_caption", False)
    captions = open_data(authors)
    embeddings = open_data(authors / "caption_embeddings", authors / "images")
    for name in ("embedded", "imported"):
        for data in (captions, embeddings):
            Cache(authors / name).check_keys(data)
    # Row i of the cache is the text of picture i.
    rows = Cache(authors / "imported").vectors(torch.arange(18))
    assert rows[:, :2].int().tolist() == [[number, row] for number in range(3) for row in range(SIZES[number])]
    write_parquet(authors / "raw_captions" / f"{STEMS[1]}.parquet", key=keys_for(1)[::-1], extension=["jpg"] * 12)
    with pytest.raises(CacheMismatch, match=r"data shard 00001 .* row 0, key '000000000011'"):
        Cache(authors / "embedded").check_keys(open_data(authors))


def test_pictures_beside_the_captions(tmp_path):
    write_captions(tmp_path / "a" / "captions")
    write_pictures(tmp_path / "a")
    write_captions(tmp_path / "b")
    write_pictures(tmp_path / "b")  # as img2dataset leaves them
    (tmp_path / "b" / STEMS[0] / "more.parquet").touch()  # the folders of images are not listed
    for folder in ("a", "b"):
        check_pictures(open_data(tmp_path / folder))


def test_names_without_an_extension_column(tmp_path):
    write_parquet(tmp_path / "00000.parquet", key=["1", "2", "3.jpeg", "4.x"], caption=["a", "b", "c", None])
    (tmp_path / "00000").mkdir()
    for name in ("1.webp", "3.jpeg", "4.x.png"):
        (tmp_path / "00000" / name).write_text(name)
    data = open_data(tmp_path)
    assert [data.image_bytes(i) for i in (0, 2, 3)] == [b"1.webp", b"3.jpeg", b"4.x.png"]
    with pytest.raises(BadSample, match="missing: there is no .*00000/2"):
        data.image_bytes(1)
    assert data.shard_keys(0) == ["1", "2", "3.jpeg", "4.x"]
    with pytest.raises(DataError, match="00000.parquet: row 3, key '4.x' has no caption 'caption'"):
        data.caption(3, "caption")


@pytest.mark.parametrize(
    ("key", "extension", "cause"),
    [
        ("gone", "jpg", "missing"),
        ("../secret", "txt", "unreadable"),
        ("x/../../secret", "txt", "unreadable"),
        ("../00000b/secret", "txt", "unreadable"),
        ("/etc/passwd", "", "unreadable"),
        ("/etc/passwd", "x/../../passwd", "unreadable"),
        ("a", "/../../../secret.txt", "unreadable"),
        ("..", "", "missing"),
        ("a\0b", "jpg", "unreadable"),
        ("folder", "jpg", "unreadable"),
        ("pipe", "jpg", "unreadable"),
        ("loop", "jpg", "unreadable"),
        ("locked.jpg/x", "jpg", "missing"),
        ("n" * 300, "jpg", "unreadable"),
        ("n" * 300, "", "unreadable"),
        ("", "jpg", "missing"),
        (None, "jpg", "missing"),
        ("large", "jpg", "too large"),
    ],
)
def test_hostile_and_dead_names(tmp_path, monkeypatch, key, extension, cause):
    monkeypatch.setattr("lift_fast.data.reading.MOST_BYTES", 1000)
    root = tmp_path / "00000"
    (root / "folder.jpg").mkdir(parents=True)
    (tmp_path / "00000b").mkdir()
    for secret in (tmp_path / "secret.txt", tmp_path / "00000b" / "secret.txt"):
        secret.write_text("secret")
    os.mkfifo(root / "pipe.jpg")
    (root / "loop.jpg").symlink_to("loop.jpg")
    (root / "locked.jpg").write_text("x")
    (root / "large.jpg").write_bytes(bytes(1001))
    write_parquet(tmp_path / "00000.parquet", key=pa.array([key], pa.string()), extension=[extension])
    with pytest.raises(BadSample) as error:
        open_data(tmp_path).image_bytes(0)
    assert error.value.cause == cause


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (["a", None], "row 1 has no key"),
        (["a", "b", "a"], "row 2 has the key 'a', as .* row 0 has"),
        ([1.5, 2.5], "row 0 has the key 1.5, neither text nor a whole number"),
    ],
)
def test_bad_keys_are_told_with_their_place(tmp_path, keys, words):
    write_parquet(tmp_path / "p.parquet", key=keys)
    (tmp_path / "p").mkdir()
    with pytest.raises(DataError, match=f"p.parquet: {words}"):
        open_data(tmp_path).shard_hashes(0)


def test_text_that_is_no_utf8(tmp_path):
    raw = pa.array([b"fine", b"\xff"], pa.binary())
    write_parquet(tmp_path / "p.parquet", key=["a", "b"], re_caption=raw.view(pa.string()))
    (tmp_path / "p").mkdir()
    data = open_data(tmp_path)
    assert data.caption(0) == "fine"
    with pytest.raises(DataError, match="p.parquet: row 1, key 'b': 're_caption' is not UTF-8 .invalid start byte"):
        data.caption(1)


def test_keys_of_other_types(tmp_path):
    kinds = [pa.large_string(), pa.dictionary(pa.int32(), pa.string()), pa.int64()]
    for number, kind in enumerate(kinds):
        write_parquet(tmp_path / f"{number}.parquet", key=pa.array(["7", "8"]).cast(kind))
    (tmp_path / "2").mkdir()
    (tmp_path / "2" / "8.jpg").write_text("x")
    data = open_data(tmp_path)
    assert keys_of(data) == ["7", "8"] * 3 and data.image_bytes(5) == b"x"


def test_parquet_folders_that_are_not_whole(tmp_path):
    write_parquet(tmp_path / "p.parquet", re_caption=["a"])
    with pytest.raises(DataError, match="expected a folder .*/p with the images of p.parquet"):
        open_data(tmp_path)
    (tmp_path / "p").mkdir()
    with pytest.raises(DataError, match="p.parquet has no column 'key' .*: re_caption"):
        open_data(tmp_path)
    write_parquet(tmp_path / "p.parquet", key=pa.array([], pa.string()))
    with pytest.raises(DataError, match="1 parquet files hold no row"):
        open_data(tmp_path)
    write_parquet(tmp_path / "p.parquet", key=["a"], re_caption=["x"])
    write_parquet(tmp_path / "q.parquet", key=["a"])
    data = open_data(tmp_path)
    with pytest.raises(DataError, match="q.parquet has no column 're_caption'; choose with --field among: key"):
        data.caption(1)
    write_parquet(tmp_path / "q.parquet", key=["a", "b"])
    with pytest.raises(DataError, match="q.parquet has changed"):
        data.shard_keys(1)
    (tmp_path / "p.parquet").write_text("no")
    with pytest.raises(DataError, match="p.parquet is not a whole parquet file"):
        open_data(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty holds no parquet file"):
        open_data(tmp_path / "empty", tmp_path)


def test_captions_that_are_kept_are_bounded(authors, monkeypatch):
    monkeypatch.setattr("lift_fast.data.columns.KEPT_BYTES", 1)
    data = open_data(authors)
    for i in (0, 17, 1, 6):
        assert data.caption(i).startswith("long")
        assert len(data._table._kept) == 1


# one table


def test_a_parquet_file_that_is_lost_while_training_is_bad_samples(authors):
    """The run continues."""
    data = open_data(authors)
    (authors / "raw_captions" / f"{STEMS[1]}.parquet").unlink()
    with pytest.raises(BadSample) as caught:
        data.image_bytes(SIZES[0] + 3)
    assert caught.value.cause == "unreadable" and STEMS[1] in caught.value.reason
    assert data.where(SIZES[0] + 3).endswith(f"{STEMS[1]}.parquet: row 3")
    assert data.image_bytes(2) == picture(0, 2)


def write_table(path, columns, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        lines = [json.dumps(dict(zip(columns, row, strict=True))) for row in rows]
        path.write_text("\n\n".join(lines), encoding="utf-8-sig")
    else:
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",").writerows([columns, *rows])
    return path


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
@pytest.mark.parametrize("column", ["file_name", "filepath", "image", "path"])
def test_pictures_that_a_table_names(tmp_path, kind, column):
    captions = ["one", ' "two",\n\r\n2 ', "drei\u2028日本🦜", "4\t"]
    (tmp_path / "sub").mkdir()
    names = ["a.png", "sub/b.png", "./sub/../c.png", str(tmp_path / "d.png")]
    for number, name in enumerate(names):
        (tmp_path / name).write_text(str(number))
    rows = [(caption, name, f"title {name}") for caption, name in zip(captions, names, strict=True)]
    path = write_table(tmp_path / f"set.{kind}", ("caption", column, "title"), rows)
    data = open_data(path, options=DataOptions(quoting="minimal" if kind == "tsv" else "auto"))
    assert isinstance(data, TableImages) and data.shard_sizes == [4] and data.folder == path
    for i in (3, 1, 0, 2):
        assert data.image_bytes(i) == str(i).encode()
        assert data.caption(i) == data.caption(i, "caption") == captions[i].strip()
        assert data.caption(i, "title") == f"title {names[i]}"
        assert data.meta(i) == {"caption": captions[i], column: names[i], "title": f"title {names[i]}"}
    assert data.shard_keys(0) == ["0", "1", "2", "3"] and data.where(2) == f"{path}: row 2"
    with pytest.raises(IndexError):
        data.image_bytes(4)


@pytest.mark.parametrize("keyed", [True, False])
@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
def test_a_cache_made_from_the_table_fits(tmp_path, kind, keyed):
    rows = [(f"k{i}", f"{i}.png", f"caption {i}\n") for i in range(11)]
    columns = ("key" if keyed else "id", "file_name", "text")
    path = write_table(tmp_path / f"metadata.{kind}", columns, rows)
    options = DataOptions(shard_rows=4, quoting="minimal" if kind == "tsv" else "auto")
    embed_share(open_source(path, "text", options), tmp_path / "cache", TinyEncoder(), progress=False)
    data = open_data(tmp_path, options=options)
    assert data.names == [f"metadata.{kind}#{number:05d}" for number in range(3)]
    Cache(tmp_path / "cache").check_keys(data)
    assert keys_of(data) == [f"k{i}" if keyed else str(i) for i in range(11)]
    rows[9], rows[10] = rows[10], rows[9]
    write_table(path, columns, rows)
    if keyed:
        with pytest.raises(CacheMismatch, match="row 1, key 'k10'"):
            Cache(tmp_path / "cache").check_keys(open_data(path, options=options))


def test_the_shards_are_as_long_as_those_of_captions(tmp_path):
    rows = [(f"{i}.png", str(i)) for i in range(2 * SHARD_ROWS + 1)]
    path = write_table(tmp_path / "c.csv", ("file_name", "caption"), rows)
    assert open_data(path).shard_sizes == open_source(path).sizes == [SHARD_ROWS, SHARD_ROWS, 1]
    data = open_data(path)
    assert [data.caption(i) for i in (0, SHARD_ROWS, 2 * SHARD_ROWS)] == ["0", "10000", "20000"]


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("gone.png", "missing"),
        ("", "missing"),
        ("../secret", "unreadable"),
        ("/etc/passwd", "unreadable"),
        ("a/../../secret", "unreadable"),
        (".", "unreadable"),
        ("folder", "unreadable"),
    ],
)
@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_names_in_tables_that_lead_nowhere(tmp_path, kind, name, cause):
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "set" / "folder").mkdir(parents=True)
    data = open_data(write_table(tmp_path / "set" / f"x.{kind}", ("image",), [(name,), ("b",)]))
    with pytest.raises(BadSample) as error:
        data.image_bytes(0)
    assert error.value.cause == cause


def test_bad_tables(tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_text('{"image": "a"}\n{"image": 7}\n{"other": 1}\n{"image": \n')
    data = open_data(path)
    for i in (1, 2):
        with pytest.raises(BadSample, match=f"missing: .*row {i} has no 'image'"):
            data.image_bytes(i)
    with pytest.raises(BadSample, match="row 3, line 4 does not parse") as error:
        data.image_bytes(3)
    assert error.value.cause == "does not parse"
    with pytest.raises(DataError, match="row 3, line 4 does not parse"):
        data.meta(3)
    with pytest.raises(DataError, match="no column of captions .*; choose with --field among: image"):
        data.caption(0)
    path.write_text('{"image": "a", "key": "k"}\n{"image": "b", "key": "k"}\n')
    with pytest.raises(BadSample, match="unreadable: .*changed"):  # since it was opened
        data.image_bytes(0)
    with pytest.raises(DataError, match="row 1, line 2 has the key 'k', as .*row 0, line 1 has"):
        open_data(path).shard_keys(0)
    for text, words in (
        ("caption\nx\n", "names no images: expected a column file_name, .*, path or image_path; .*: caption"),
        ("image\n", "holds no sample"),
        ("", "names no images"),
        ("image,b\n1\n", "line 2 has 1 fields"),
    ):
        (tmp_path / "c.csv").write_text(text)
        with pytest.raises(DataError, match=words):
            open_data(tmp_path / "c.csv")


def test_pictures_of_a_table_elsewhere(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_text("x")
    path = write_table(tmp_path / "tables" / "c.csv", ("filepath",), [("a.png",)])
    assert open_data(path, images=tmp_path / "images").image_bytes(0) == b"x"
    path.rename(path.with_name("metadata.csv"))
    assert open_data(path.parent, images=tmp_path / "images").image_bytes(0) == b"x"


# which it is


def test_tars_are_opened(tmp_path):
    make_set(tmp_path / "data", 2)
    write_parquet(tmp_path / "data" / "00000.parquet", key=["a"])  # img2dataset writes both
    assert isinstance(open_data(str(tmp_path / "data")), Shards)
    with pytest.raises(ConfigError, match="the tar shards at .* hold their images"):
        open_data(tmp_path / "data", images=tmp_path)


def test_what_is_nothing_of_ours(tmp_path):
    with pytest.raises(DataError, match="no data set at .*none; expected a folder of .tar shards; a folder with meta"):
        open_data(tmp_path / "none")
    with pytest.raises(DataError, match="it holds nothing; expected"):
        open_data(tmp_path)
    for number in range(7):
        (tmp_path / f"{number}.txt").touch()
    with pytest.raises(DataError, match="it holds 0.txt, 1.txt, 2.txt, 3.txt, 4.txt and 2 more; expected"):
        open_data(tmp_path)
    with pytest.raises(DataError, match="0.txt is no data set; expected"):
        open_data(tmp_path / "0.txt")
    for name in ("metadata.csv", "metadata.jsonl"):
        (tmp_path / name).touch()
    with pytest.raises(DataError, match="holds metadata.csv and metadata.jsonl; name the one to read"):
        open_data(tmp_path)


def test_a_table_that_is_written_over_while_it_is_open(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("file_name,caption\n0.png,a\n1.png,b\n")
    table = TableImages(path)
    assert table.caption(0) == "a"
    path.write_text("file_name,caption\n1.png,b\n0.png,a\n")
    with pytest.raises(DataError, match="changed"):
        table.caption(0)


@pytest.mark.parametrize("blank", ["\x0c", "\u00a0", "\x1f"])
def test_lines_of_other_space_are_blank(tmp_path, blank):
    path = tmp_path / "a.jsonl"
    lines = ['{"file_name": "0.png", "caption": "a"}', blank, '{"file_name": "1.png", "caption": "b"}']
    path.write_text("\n".join(lines))
    assert TableImages(path).caption(1) == "b"


def test_a_column_that_a_table_has_twice(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("file_name,file_name,caption\n0.png,1.png,a\n")
    with pytest.raises(DataError, match="several columns 'file_name'; choose with --image-column"):
        TableImages(path)
