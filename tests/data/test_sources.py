"""Sources of captions: each kind as other tools write it, and bad data reported with its place."""

import csv
import json
import sys

import pyarrow as pa
import pytest
from pyarrow import parquet
from support.tiny_sets import make_set

from lift_fast.data.options import DataOptions
from lift_fast.data.shards import ShardWriter
from lift_fast.data.sources import open_source
from lift_fast.errors import ConfigError, DataError

AWKWARD = [
    "plain",
    'with "quotes", commas',
    "two\nlines",
    "two\r\nlines",
    "naïve 日本語 🦜",
    "  spaced  ",
    "tab\there",
    "'",
]


def everything(source):
    """keys, captions of all shards; what each shard says must agree with its size."""
    assert len(source.names) == len(source.sizes) == len(set(source.names))
    keys, captions = [], []
    for number, size in enumerate(source.sizes):
        some, texts, bad = source.read(number)
        assert not bad
        assert len(some) == len(texts) == size
        keys, captions = keys + some, captions + texts
    return keys, captions


def write_csv(path, rows, **options):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, **options).writerows(rows)
    return path


# tars


def test_tars(tmp_path):
    make_set(tmp_path / "data", 10, per_shard=4)
    source = open_source(tmp_path / "data")
    assert (source.names, source.sizes) == (["00000.tar", "00001.tar", "00002.tar"], [4, 4, 2])
    assert everything(source) == ([f"s0-{i:03d}" for i in range(10)], [f"caption {i}" for i in range(10)])
    assert str(source) == f"10 samples in 3 tar shards at {tmp_path}/data, captions from their .txt"
    assert source.read(1)[1][0] == "caption 4"
    long = open_source(tmp_path / "data", "long")
    assert long.read(1)[1][0] == "long caption 4" and long.field == "long" and "'long' of their .json" in str(long)


def test_a_tar_s_missing_caption(tmp_path):
    with ShardWriter(tmp_path / "data") as writer:
        writer.write("a", b"", "fine", {"long": "fine"})
        writer.write("b", b"", " \n", {"long": "\ud800"})
    source = open_source(tmp_path / "data")
    with pytest.raises(DataError, match="00000.tar: sample 'b' has no caption 'txt'"):
        source.read(0)
    with pytest.raises(DataError, match="00000.tar: sample 'b': half a Unicode character"):
        open_source(tmp_path / "data", "long").read(0)


# parquet


def write_parquet(path, row_group_size=None, **columns):
    path.parent.mkdir(exist_ok=True)
    parquet.write_table(pa.table(columns), path, row_group_size=row_group_size)
    return path


def test_a_folder_of_parquet(tmp_path):
    folder = tmp_path / "set"
    write_parquet(folder / "b.parquet", key=["3"], re_caption=["three"], more=[1])
    write_parquet(
        folder / "a.parquet", row_group_size=1, re_caption=["one", "two"], key=["1", "2"], org_caption=["x", "y"]
    )
    source = open_source(folder)
    assert (source.names, source.sizes, source.field) == (["a.parquet", "b.parquet"], [2, 1], "re_caption")
    assert everything(source) == (["1", "2", "3"], ["one", "two", "three"])
    assert "3 rows in 2 parquet files" in str(source) and "'re_caption', keys from 'key'" in str(source)
    with pytest.raises(
        DataError, match=r"b.parquet has no column 'org_caption'; choose with --field among: key, re_ca"
    ):
        open_source(folder, "org_caption")


def test_many_row_groups_and_column_types(tmp_path):
    texts = [f"{AWKWARD[i % len(AWKWARD)]}{i}" for i in range(100)]
    types = [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())]
    for number, kind in enumerate(types):
        path = write_parquet(tmp_path / f"{number}.parquet", 7, text=pa.array(texts).cast(kind), id=list(range(100)))
        source = open_source(path, "text", DataOptions(key="id"))
        assert everything(source) == ([str(i) for i in range(100)], [text.strip() for text in texts])


def test_rows_without_keys_count_through_the_files(tmp_path):
    for name, rows in (("a", 2), ("b", 3)):
        write_parquet(tmp_path / f"{name}.parquet", re_caption=[f"{name}{i}" for i in range(rows)])
    source = open_source(tmp_path)
    assert everything(source)[0] == ["0", "1", "2", "3", "4"]
    assert str(source).endswith("keys: the rows' numbers")
    write_parquet(tmp_path / "a.parquet", re_caption=["x"], key=["k"])
    with pytest.raises(DataError, match="b.parquet has no column 'key'; choose with --key among: re_caption"):
        open_source(tmp_path)


@pytest.mark.parametrize(
    ("captions", "keys", "words"),
    [
        (["a", None], ["x", "y"], "row 1, key 'y' has no caption 're_caption'"),
        (["a", " \t"], ["x", "y"], "row 1, key 'y' has no caption"),
        ([1, 2], ["x", "y"], "row 0, key 'x': 're_caption' is the number 1, not text"),
        ([b"a", b"\xff"], ["x", "y"], "row 1, key 'y': 're_caption' is not UTF-8"),
        ([["a"], []], ["x", "y"], "row 0, key 'x': 're_caption' is a list of 1, not text"),
        (["a", "b"], ["x", None], "row 1 has no key"),
        (["a", "b"], ["x", ""], "row 1 has no key"),
        (["a", "b"], [1.5, 2.5], "row 0 has the key 1.5, neither text nor a whole number"),
        (["a", "b", "c"], ["x", "y", "x"], r"row 2 has the key 'x', as .*row 0 has"),
    ],
)
def test_bad_rows_are_told_with_their_place(tmp_path, captions, keys, words):
    path = write_parquet(tmp_path / "set" / "p.parquet", re_caption=captions, key=keys)
    with pytest.raises(DataError, match=f"p.parquet: {words}"):
        open_source(path.parent).read(0)


def test_parquet_that_is_none(tmp_path):
    path = write_parquet(tmp_path / "p.parquet", re_caption=["a"] * 100)
    whole = path.read_bytes()
    for broken in (b"", whole[:-9], whole[50:]):
        path.write_bytes(broken)
        with pytest.raises(DataError, match="p.parquet is not a whole parquet file"):
            open_source(path).read(0)
    path.write_bytes(whole)
    source = open_source(path)
    path.write_bytes(b"x" * (len(whole) // 2) + whole[len(whole) // 2 :])
    with pytest.raises(DataError, match="p.parquet is not a whole parquet file"):
        source.read(0)
    write_parquet(path, re_caption=["a"] * 99)
    with pytest.raises(DataError, match="has changed since the data set was opened"):
        source.read(0)
    write_parquet(path, re_caption=pa.array([], pa.string()))
    with pytest.raises(DataError, match="holds no sample"):
        open_source(path)


def test_without_pyarrow_the_extra_is_named(tmp_path, monkeypatch):
    path = write_parquet(tmp_path / "p.parquet", re_caption=["a"])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(
        DataError, match=r"needs pyarrow to be read; install it with: pip install 'lift-fast\[parquet\]'"
    ):
        open_source(path)


# CSV, TSV, JSONL


@pytest.mark.parametrize("shard_rows", [1, 3, 100])
@pytest.mark.parametrize("kind", ["csv", "crlf", "tsv", "jsonl"])
def test_odd_quoting_and_unicode_in_every_cut(tmp_path, kind, shard_rows):
    keys = [f"clé {i}" for i in range(len(AWKWARD))]
    path = tmp_path / f"captions.{'csv' if kind == 'crlf' else kind}"
    if kind == "jsonl":
        rows = zip(keys, AWKWARD, strict=True)
        path.write_text("\n\n".join(json.dumps({"caption": c, "key": k}, ensure_ascii=False) for k, c in rows))
    else:
        rows = [("n", "caption", "key"), *zip(range(len(keys)), AWKWARD, keys, strict=True)]
        end = "\r\n" if kind == "crlf" else "\n"
        write_csv(path, rows, delimiter="\t" if kind == "tsv" else ",", lineterminator=end)
    options = DataOptions(shard_rows=shard_rows, quoting="minimal" if kind == "tsv" else "auto")
    source = open_source(path, options=options)
    assert source.sizes == [min(shard_rows, len(keys) - at) for at in range(0, len(keys), shard_rows)]
    assert source.names[0] == f"{path.name}#00000"
    want = [text.strip() for text in AWKWARD]
    assert everything(source) == (keys, want)
    last = len(source.sizes) - 1  # any shard by itself, in any order
    assert source.read(last)[0] == keys[last * shard_rows :]


def test_a_byte_order_mark_blank_lines_and_no_last_newline(tmp_path):
    path = tmp_path / "c.csv"
    path.write_bytes(b"\xef\xbb\xbfcaption,b\r\n\r\none,1\r\n\n\ntwo,2")
    source = open_source(path)
    assert everything(source) == (["0", "1"], ["one", "two"])
    path = tmp_path / "c.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"caption": "one"}\r\n \n{"caption": "two"}')
    assert everything(open_source(path, options=DataOptions(shard_rows=1))) == (["0", "1"], ["one", "two"])


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("c.csv", "caption,b\none,1\ntwo\n", "line 3 has 1 fields and the header has 2"),
        ("c.csv", 'caption\n"one" more\n', "line 2 does not parse"),
        ("c.csv", 'caption\none\n"two\n', "line 3 does not parse"),
        ("c.csv", "caption\rone\r", "line 1 does not parse"),
        ("c.csv", "caption\n" + "x" * (1 << 24) + "x", "line 2 does not parse"),
        ("c.csv", "", "holds no sample"),
        ("c.csv", "caption\n", "holds no sample"),
        ("c.csv", "a,b\n1,2\n", "no column of captions .*; choose with --field among: a, b"),
        ("c.csv", "caption,caption\n1,2\n", "several columns 'caption'"),
        ("c.csv", "caption,key\n ,k\n", "line 2, key 'k' has no caption 'caption'"),
        ("c.csv", "caption,key\na,k\nb,k\n", "line 3 has the key 'k', as .*line 2 has"),
        ("c.csv", 'caption,key\n"a\nb",k\n,l\n', "line 4, key 'l' has no caption"),
        ("c.csv", b"caption\n\xff\n", "line 2 is not UTF-8"),
        ("c.jsonl", '{"caption": "a"}\n{"caption": \n', "line 2 does not parse"),
        ("c.jsonl", '{"caption": "a"}\n[1]\n', "line 2 does not parse .*not a JSON object"),
        ("c.jsonl", '{"caption": "a"}\n{}\n', "line 2, key '1' has no caption"),
        ("c.jsonl", '{"caption": "a"}\n{"caption": 7}\n', "line 2, key '1': 'caption' is the number 7, not text"),
        ("c.jsonl", '{"caption": "a", "key": 1}\n{"caption": "b"}\n', "line 2 has no key"),
        ("c.jsonl", '{"caption": "a", "key": true}\n', "line 1 has the key True"),
        ("c.jsonl", '{"caption": "\\ud83e"}\n', "line 1, key '0': half a Unicode character"),
        ("c.jsonl", '{"words": "a"}\n', "no column of captions .*; choose with --field among: words"),
        ("c.jsonl", "[" * 100_000, "line 1 does not parse"),
        ("c.jsonl", "\n\n", "holds no sample"),
        ("c.jsonl", b"\xff\n", "line 1 is not UTF-8"),
    ],
)
def test_bad_text_files_are_told_with_their_place(tmp_path, name, text, words):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=f"{name}.*{words}"):
        open_source(path).read(0)


def test_a_file_that_changes_between_counting_and_reading(tmp_path):
    path = write_csv(tmp_path / "c.csv", [["caption"], ["one"], ["two"]])
    source = open_source(path)
    write_csv(path, [["caption"], ["one"]])
    with pytest.raises(DataError, match="has changed while it was read"):
        source.read(0)


# which it is


def test_what_is_nothing_of_ours(tmp_path):
    with pytest.raises(DataError, match="no data set at"):
        open_source(tmp_path / "none")
    with pytest.raises(DataError, match="is no data set, it holds nothing; expected a folder of .tar shards"):
        open_source(tmp_path)
    (tmp_path / "c.txt").write_text("x")
    with pytest.raises(
        DataError, match=r"c.txt is no data set; expected .*.csv, .tsv, .jsonl, .ndjson, .parquet or .arrow file"
    ):
        open_source(tmp_path / "c.txt")


def test_settings_of_no_use_are_refused(tmp_path):
    make_set(tmp_path / "data", 2)
    with pytest.raises(ConfigError, match="--key names a column"):
        open_source(tmp_path / "data", options=DataOptions(key="id"))
    with pytest.raises(ConfigError, match="--shard-rows cuts one CSV"):
        open_source(tmp_path / "data", options=DataOptions(shard_rows=5))
    path = write_csv(tmp_path / "c.csv", [["caption"], ["one"]])
    with pytest.raises(ConfigError, match="shard_rows is 0"):
        open_source(path, options=DataOptions(shard_rows=0))
    with pytest.raises(DataError, match="no column 'id'; choose with --key"):
        open_source(path, options=DataOptions(key="id"))


def test_tars_go_before_the_parquet_beside_them(tmp_path):
    make_set(tmp_path / "data", 2)
    write_parquet(tmp_path / "data" / "00000.parquet", re_caption=["a"])  # img2dataset writes both
    assert open_source(tmp_path / "data").names == ["00000.tar"]
