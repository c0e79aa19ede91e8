"""Tables as users have them: quotes, delimiters, encodings, types and damage, and what --skip-bad leaves out.

Bad rows keep their numbers, and each is counted: rows in the file = rows used + rows with an error.
"""

import json
import os
import random

import pyarrow as pa
import pytest
from pyarrow import parquet
from support.tiny_sets import keys_of

from lift_fast.data.open import open_data
from lift_fast.data.options import DataOptions
from lift_fast.data.samples import BadSample, BadText
from lift_fast.data.sources import open_source
from lift_fast.data.tables import TableImages
from lift_fast.errors import ConfigError, DataError

SKIP = DataOptions(skip_bad=True)


def written(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def captions_of(data, field="txt"):
    """All captions, with the cause in place of one that is bad; those read one by one and by shard must agree."""
    found = [c for number in range(len(data.shard_sizes)) for c in data.captions(number, field)]
    for i, caption in enumerate(found):
        if isinstance(caption, BadText):
            with pytest.raises(BadText) as error:
                data.caption(i, field)
            assert (error.value.cause, error.value.reason) == (caption.cause, caption.reason)
        else:
            assert data.caption(i, field) == caption
    assert len(found) == len(data)
    return [c.cause if isinstance(c, BadText) else c for c in found]


def rows_of(path, **options):
    return captions_of(open_data(path, options=DataOptions(**options), captions_only=True))


# captions that are no text


VALUES = [["a red dog", "a dog in the park"], {"en": "a"}, 7, 1.5, True, float("nan"), None, "", " \n", "\ud83e", "a"]
CAUSES = [*["not text"] * 6, *["no caption"] * 3, "not UTF-8", "a"]


def test_captions_that_are_no_text_are_refused_in_jsonl(tmp_path):
    """Line 1: none becomes Python's text."""
    path = written(tmp_path / "c.jsonl", "".join(json.dumps({"caption": value}) + "\n" for value in VALUES))
    assert rows_of(path, skip_bad=True) == CAUSES
    with pytest.raises(BadText, match="row 0, line 1, key '0': 'caption' is a list of 2, not text; .*--skip-bad"):
        open_source(path).read(0)


@pytest.mark.parametrize(
    ("values", "cause"),
    [
        (pa.array([["a", "b"]]), "not text"),
        (pa.array([{"en": "a"}]), "not text"),
        (pa.array([7]), "not text"),
        (pa.array([float("nan")]), "not text"),
        (pa.array([True]), "not text"),
        (pa.array([None], pa.string()), "no caption"),
        (pa.nulls(1), "no caption"),
        (pa.array([b"caf\xe9"]).view(pa.string()), "not UTF-8"),
        (pa.array([b"caf\xe9"]), "not UTF-8"),
        (pa.array(["a"]).dictionary_encode(), "a"),
        (pa.array([b"caf\xe9"]).view(pa.string()).dictionary_encode(), "not UTF-8"),
        (pa.array(["a"], pa.large_string()), "a"),
        (pa.array([b"a"]), "a"),
    ],
)
@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_captions_that_are_no_text_are_refused_in_columns(tmp_path, suffix, values, cause):
    table = pa.table({"caption": values, "image": ["a.png"]})
    path = tmp_path / f"c.{suffix}"
    parquet.write_table(table, path) if suffix == "parquet" else write_arrow(path, table)
    assert rows_of(path) == [cause]


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
def test_lines_that_are_not_utf8(tmp_path, kind):
    lines = {
        "csv": [b"file_name,caption", b"a,one", b"b,caf\xe9", b'c,"x', b'\xff"', b"d,two"],
        "tsv": [b"file_name\tcaption", b"a\tone", b"b\tcaf\xe9", b'c\t"x\xff"', b"d\ttwo"],
        "jsonl": [b'{"caption": "one"}', b'{"caption": "caf\xe9"}', b"\xff", b'{"caption": "two"}'],
    }
    path = written(tmp_path / f"c.{kind}", b"\n".join(lines[kind]))
    with pytest.raises(DataError, match="line [23] is not UTF-8 .*--skip-bad"):
        open_source(path).read(0)
    bad = 3 if kind == "csv" else 2  # where a quote may have joined rows, each line is a bad row
    assert rows_of(path, skip_bad=True) == ["one", *["not UTF-8"] * bad, "two"]


# quotes


SWALLOWED = 'file_name\tcaption\na.jpg\t"quoted start\nb.jpg\tmiddle\nc.jpg\tend quote"\nd.jpg\tlast\n'


def test_a_quote_in_a_tsv_is_a_character(tmp_path):
    """Line 2: the quotes of different rows made three rows one sample."""
    data = open_data(written(tmp_path / "c.tsv", SWALLOWED))
    assert captions_of(data) == ['"quoted start', "middle", 'end quote"', "last"]
    assert [row["file_name"] for row in map(data.meta, range(4))] == ["a.jpg", "b.jpg", "c.jpg", "d.jpg"]


def test_a_csv_whose_quote_swallows_rows_is_refused(tmp_path):
    path = written(tmp_path / "c.csv", SWALLOWED.replace("\t", ","))
    with pytest.raises(DataError, match="a quote opens at line 2 and closes at line 4, .* --quoting none .*--skip-bad"):
        open_data(path)
    assert rows_of(path, skip_bad=True) == [*["does not parse"] * 3, "last"]
    assert rows_of(path, quoting="none") == ['"quoted start', "middle", 'end quote"', "last"]
    assert rows_of(path, quoting="minimal") == ["quoted start\nb.jpg,middle\nc.jpg,end quote", "last"]


@pytest.mark.parametrize(
    "rows",
    [
        ['a.jpg,"two\nlines"'],
        ['a.jpg,"A dog\nruns, then sleeps"'],  # as many delimiters as a row, and no image's name before them
        ['a.jpg,"one, two\n\nthree"', 'b.jpg,"x\r\ny"'],
        ['"a.jpg","say ""so""\nagain"'],
    ],
)
def test_captions_of_several_lines_are_read_and_counted(tmp_path, rows):
    data = open_data(written(tmp_path / "c.csv", "\n".join(["file_name,caption", "z.jpg,first", *rows, "y.jpg,last"])))
    found = captions_of(data)
    assert len(found) == 2 + len(rows) and found[0] == "first" and found[-1] == "last"
    assert data.remarks() == [
        f"{data.folder}: rows that span several lines, in double quotes: {len(rows)}, the first at line 3"
    ]


def test_a_quote_that_stays_open(tmp_path):
    path = written(tmp_path / "c.csv", 'file_name,caption\na.jpg,one\nb.jpg,"two\nc.jpg,three\nd.jpg,four\n')
    with pytest.raises(DataError, match="line 3 does not parse .a double quote opens there and does not close"):
        open_data(path)
    assert rows_of(path, skip_bad=True) == ["one", "does not parse", "three", "four"]


def test_a_quote_that_stays_open_over_many_bytes(tmp_path, monkeypatch):
    """A row may have fewer characters than a field at most, and more bytes than a row at most."""
    monkeypatch.setattr("lift_fast.data.rows._MOST_BYTES", 1000)
    lines = ["file_name,text", "a.png,x", 'b.png,"y', *(f"{i}.png,红色的圆" for i in range(100))]
    (tmp_path / "t.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    with pytest.raises(DataError, match="line 3 does not parse .a double quote opens there and does not close"):
        open_data(tmp_path / "t.csv")
    data = open_data(tmp_path / "t.csv", options=DataOptions(skip_bad=True))
    assert len(data) == 102 and data.caption(101) == "红色的圆"
    with pytest.raises(BadText, match="does not parse"):
        data.caption(1)


@pytest.mark.parametrize("last", ['d.jpg,"x",4', 'd.jpg,x" y,4'])
def test_a_quote_that_joins_bad_rows_loses_none(tmp_path, last):
    """Each line that it joined is counted."""
    text = f'image,caption,n\na.jpg,"open,1\nb.jpg,two,2\nc.jpg,three\n{last}\ne.jpg,five,5\n'
    found = rows_of(written(tmp_path / "c.csv", text), skip_bad=True)
    assert len(found) == 5 and found[-1] == "five" and found[0] == "does not parse"


def test_a_quote_that_swallows_bad_rows_among_good_ones_is_refused(tmp_path):
    """That a swallowed line is no row does not make the quote one: others name images."""
    text = 'image,caption,n\na.jpg,"open,1\n\nb.jpg,two\nc.jpg,three,3\nd.jpg,close",4\ne.jpg,five,5\n'
    path = written(tmp_path / "c.csv", text)
    with pytest.raises(DataError, match="opens at line 2 and closes at line 6, and lines between look like rows"):
        open_data(path)
    assert rows_of(path, skip_bad=True) == [*["does not parse"] * 4, "five"]


def test_a_row_of_several_lines_and_the_wrong_number_of_fields_is_one_row(tmp_path):
    path = written(tmp_path / "c.csv", 'image,caption\na.jpg,"one\nmore",x\nb.jpg,two\n')
    assert rows_of(path, skip_bad=True) == ["does not parse", "two"]


def test_quotes_that_a_tsv_keeps_are_told(tmp_path):
    path = written(tmp_path / "c.tsv", 'image\tcaption\na\t"say ""so"""\nb\t"c" and "d\n')
    data = open_data(path)
    assert captions_of(data) == ['"say ""so"""', '"c" and "d']
    assert data.remarks() == [
        f"{path}: rows with quotes around a field, which --quoting minimal removes: 1, the first at line 2"
    ]
    assert rows_of(path.with_name("c.tsv"), quoting="minimal", skip_bad=True) == ['say "so"', "does not parse"]


def test_a_tsv_with_a_quoted_header_is_quoted(tmp_path):
    path = written(tmp_path / "c.tsv", '"image"\t"caption"\n"a"\t"say ""so"""\n"b"\t"x\ty"\n')
    assert rows_of(path) == ['say "so"', "x\ty"]


# delimiters, lengths, columns


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("c.csv", "filepath\ttitle\na.jpg\tone, two; three\n"),  # open_clip's
        ("c.csv", "filepath;title\na.jpg;one, two\tthree\n"),
        ("c.csv", 'filepath,title\na.jpg,"one, two; three"\n'),
        ("c.csv", '"filepath, all";title\na.jpg;x\n'),
    ],
)
def test_the_header_tells_the_delimiter(tmp_path, name, text):
    """Line 9."""
    data = open_data(written(tmp_path / name, text), options=DataOptions(image_column=None), captions_only=True)
    assert len(data.columns) == 2 and data.caption_field() == "title"


def test_a_header_that_does_not_tell_the_delimiter(tmp_path):
    path = written(tmp_path / "c.csv", "filepath\ttitle; subtitle\na.jpg\tone, two\n")
    with pytest.raises(DataError, match="its header has tab and semicolon; .* --delimiter"):
        open_data(path)
    data = open_data(path, options=DataOptions(delimiter="tab"))
    assert captions_of(data, "title; subtitle") == ["one, two"]
    assert rows_of(written(tmp_path / "d.csv", "image|txt\na|b,c\n"), delimiter="|") == ["b,c"]
    assert rows_of(written(tmp_path / "d.tsv", "image,txt\na,b\n"), delimiter=",") == ["b"]


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
def test_long_captions(tmp_path, kind):
    """Line 9: csv's own limit is 131 072 characters."""
    text = "long " * 100_000
    line = json.dumps({"image": "a", "caption": text}) if kind == "jsonl" else None
    mark = "," if kind == "csv" else "\t"
    path = written(tmp_path / f"c.{kind}", line or f"image{mark}caption\na{mark}{text}\n")
    assert rows_of(path) == [text.strip()]


@pytest.mark.parametrize("caption", ["txt", "caption", "text", "title", "re_caption"])
@pytest.mark.parametrize("image", ["file_name", "filepath", "filename", "image", "path", "image_path"])
def test_columns_that_are_guessed(tmp_path, image, caption):
    (tmp_path / "a.png").write_bytes(b"x")
    row = {"url": "http://there/a.png", image: "a.png", caption: "one"}
    csv = written(tmp_path / "c.csv", f"{','.join(row)}\n{','.join(row.values())}\n")
    parquet.write_table(pa.table({name: [value] for name, value in row.items()}), tmp_path / "c.parquet")
    for path in (csv, written(tmp_path / "c.jsonl", json.dumps(row)), tmp_path / "c.parquet"):
        data = open_data(path)
        assert data.image_bytes(0) == b"x" and data.caption(0) == "one" and data.caption_field() == caption
        assert f"captions from the column {caption!r}, keys" in str(open_source(path))


def test_of_several_columns_the_first_is_taken_and_named(tmp_path):
    path = written(tmp_path / "c.csv", "title,image,caption,file_name\nlong,b,short,a\n")
    data = open_data(path)
    assert data.image_column == "file_name" and data.caption(0) == "short" and data.caption(0, "title") == "long"
    assert "captions from the column 'caption' (there is also 'title')" in str(open_source(path))
    assert open_data(path, options=DataOptions(image_column="image")).image_column == "image"
    with pytest.raises(DataError, match="no column 'pixels'; choose with --image-column among: title, image"):
        open_data(path, options=DataOptions(image_column="pixels"))


def test_a_url_is_no_image(tmp_path):
    path = written(tmp_path / "c.csv", "url,caption\nhttp://there/a.png,one\n")
    with pytest.raises(DataError, match="names no images: .*--image-column among: url, caption"):
        open_data(path)
    data = open_data(path, captions_only=True)
    with pytest.raises(BadSample, match="names no images") as error:
        data.image_bytes(0)
    assert captions_of(data) == ["one"] and error.value.cause == "missing"


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_absolute_names_need_an_option(tmp_path, kind):
    """Line 9: it is named in the message."""
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(b"x")
    names = [str(tmp_path / "images" / "a.png"), "../images/a.png"]
    path = tmp_path / "set" / f"c.{kind}"
    written(path, "image,caption\n" + "".join(f"{name},c\n" for name in names))
    if kind == "parquet":
        parquet.write_table(pa.table({"image": names, "caption": ["c", "c"]}), path)
    data = open_data(path)
    for i in range(2):
        with pytest.raises(BadSample, match="leads out of .*/set; --absolute-paths allows such names") as error:
            data.image_bytes(i)
        assert error.value.cause == "unreadable"
    allowed = open_data(path, options=DataOptions(absolute_paths=True))
    assert [allowed.image_bytes(i) for i in range(2)] == [b"x", b"x"]


# keys


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_keys_are_decided_in_one_place(tmp_path, kind):
    """Line 10: options.key, else the column key, else the row's number; for images and for captions alike."""
    for name, wanted in ("id", ["0", "1"]), ("key", ["x", "y"]):
        rows = [{"file_name": f"{k}.png", name: k, "caption": k} for k in "xy"]
        path = tmp_path / f"{name}.{kind}"
        if kind == "parquet":
            parquet.write_table(pa.Table.from_pylist(rows), path)
        elif kind == "jsonl":
            written(path, "\n".join(map(json.dumps, rows)))
        else:
            written(path, "\n".join([",".join(rows[0]), *(",".join(row.values()) for row in rows)]))
        assert keys_of(open_data(path)) == open_source(path).read(0).keys == wanted
        options = DataOptions(key="file_name")
        assert keys_of(open_data(path, options=options)) == open_source(path, options=options).read(0).keys
        assert keys_of(open_data(path, options=options)) == ["x.png", "y.png"]
        for wrong in (open_data, open_source):
            with pytest.raises(DataError, match="no column 'nothing'; choose with --key among: "):
                wrong(path, options=DataOptions(key="nothing"))


def test_bad_keys_with_skip_bad(tmp_path):
    keys = ["a", None, "", 7, "a", True, 1.5, "\ud83e", "b"]
    path = written(tmp_path / "c.jsonl", "\n".join(json.dumps({"key": k, "caption": "c", "image": "i"}) for k in keys))
    with pytest.raises(DataError, match="row 1, line 2 has no key"):
        open_data(path).shard_keys(0)
    data = open_data(path, options=SKIP)
    assert data.shard_keys(0) == ["a", "", "", "7", "a", "", "", "", "b"]
    causes = {row: error.cause for row, error in data.bad_keys(0).items()}
    assert causes == {1: "no key", 2: "no key", 4: "repeated key", 5: "no key", 6: "no key", 7: "no key"}
    read = open_source(path, options=SKIP).read(0)
    assert list(read.bad) == list(causes) and read.captions == ["c"] * 9
    assert len(data.shard_hashes(0)) == 9


# bad rows


def test_rows_that_do_not_parse_are_bad_rows(tmp_path):
    """Line 8: one of them stopped everything."""
    csv = written(tmp_path / "c.csv", 'image,caption\na,one\nb\n\nc,"x" y\nd,1,2\ne,\nf,six\n')
    with pytest.raises(DataError, match="c.csv: line 3 has 1 fields and the header has 2; --skip-bad"):
        open_data(csv)
    assert rows_of(csv, skip_bad=True) == ["one", *["does not parse"] * 3, "no caption", "six"]
    lines = [
        "{",
        '{"image": "a", "caption": "one"}',
        "[1]",
        "",
        '{"caption": null}',
        "7",
        "[" * 100_000,
        '{"caption": "x"}',
    ]
    path = written(tmp_path / "c.jsonl", "\n".join(lines))
    with pytest.raises(DataError, match="c.jsonl: line 1 does not parse"):
        open_data(path)
    causes = ["does not parse", "one", "does not parse", "no caption", "does not parse", "does not parse", "x"]
    assert rows_of(path, skip_bad=True) == causes
    data = open_data(path, options=SKIP)
    for i in (0, 2):
        with pytest.raises(BadSample) as error:
            data.image_bytes(i)
        assert error.value.cause == "does not parse"


@pytest.mark.parametrize("shard_rows", [1, 2, 7, 1000])
def test_no_row_is_lost_and_none_is_another_s(tmp_path, shard_rows):
    """Random tables with bad rows in every place of a shard."""
    rng = random.Random(shard_rows)
    bad = ["{0}.png", "{0}.png,caption {0},more", '{0}.png,"open" {0}', "{0}.png,caf\udce9", "{0}.png, "]
    good = ["{0}.png,caption {0}", '{0}.png,"caption {0}"', '{0}.png,"caption {0}"\n\n']
    wanted, lines = [], ["file_name,caption"]
    for i in range(200):
        is_bad = rng.random() < 0.3
        lines.append(rng.choice(bad if is_bad else good).format(i))
        wanted.append(None if is_bad else f"caption {i}")
    path = written(tmp_path / "c.csv", "\n".join(lines).encode(errors="surrogateescape"))
    data = open_data(path, options=DataOptions(skip_bad=True, shard_rows=shard_rows))
    found = captions_of(data)
    assert [text if text.startswith("caption") else None for text in found] == wanted
    assert keys_of(data) == [str(i) for i in range(200)]
    assert all(data.meta(i)["file_name"] == f"{i}.png" for i, text in enumerate(wanted) if text)


# parquet and Arrow


def write_arrow(path, table, rows=3):
    path.parent.mkdir(parents=True, exist_ok=True)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=rows)


IMAGES = pa.array(
    [{"bytes": b"one", "path": "a.png"}, {"bytes": None, "path": "b.png"}, {"bytes": b"", "path": None}, None],
    pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
)


@pytest.mark.parametrize("name", ["image", "jpg"])
@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_images_in_a_column(tmp_path, suffix, name):
    """Line 9: {bytes, path} is the usual form on the Hub; embed took it, data check and train did not."""
    (tmp_path / "b.png").write_bytes(b"two")
    table = pa.table({name: IMAGES, "text": list("abcd"), "label": [3, 1, 4, 1]})
    path = tmp_path / f"c.{suffix}"
    parquet.write_table(table, path, row_group_size=3) if suffix == "parquet" else write_arrow(path, table)
    data = open_data(path)
    assert [data.image_bytes(i) for i in (2, 0, 1)] == [b"", b"one", b"two"]
    with pytest.raises(BadSample, match=f"row 3 has no {name!r}") as error:
        data.image_bytes(3)
    assert error.value.cause == "missing"
    assert captions_of(data) == list("abcd") and data.meta(2) == {"text": "c", "label": 4}


def test_images_as_bytes_go_before_names(tmp_path):
    path = tmp_path / "c.parquet"
    parquet.write_table(pa.table({"file_name": ["a.png"], "image": [b"x"], "caption": ["c"]}), path)
    assert open_data(path).image_bytes(0) == b"x"
    named = open_data(path, options=DataOptions(image_column="file_name"))
    with pytest.raises(BadSample, match="there is no .*a.png"):
        named.image_bytes(0)
    parquet.write_table(pa.table({"image": [["a.png"]], "caption": ["c"]}), path)
    with pytest.raises(DataError, match="names no images"):
        open_data(path)
    with pytest.raises(DataError, match="the column 'image' is list.*, not images or their names"):
        open_data(path, options=DataOptions(image_column="image"))


def test_a_parquet_image_reads_one_row_group(tmp_path, monkeypatch):
    path = tmp_path / "c.parquet"
    images = [bytes([k]) * 1000 for k in range(100)]
    parquet.write_table(pa.table({"image": images, "caption": list(map(str, range(100)))}), path, row_group_size=10)
    monkeypatch.setattr("lift_fast.data.columns.KEPT_BYTES", 25_000)
    data = open_data(path)
    for i in random.Random(0).choices(range(100), k=300):
        assert data.image_bytes(i) == images[i]
        assert sum(kept.bytes for kept in data._table._kept.values()) <= 25_000


def four(tmp_path, number):
    path = tmp_path / f"{number}.parquet"
    rows = [f"{number}-{row}" for row in range(4)]
    parquet.write_table(pa.table({"image": rows, "caption": rows}), path, row_group_size=2, use_dictionary=False)
    return path


@pytest.mark.parametrize("damage", ["no file", "cut", "pages", "no column"])
def test_a_damaged_parquet_file_among_several(tmp_path, damage):
    """Line 8: the others are read, and what is lost has a place and a cause."""
    paths = [four(tmp_path, number) for number in range(3)]
    whole = [f"{number}-{row}" for number in range(3) for row in range(4)]
    data = paths[1].read_bytes()
    if damage == "no file":
        paths[1].unlink()
        paths[1].symlink_to("nothing")
    elif damage == "cut":
        paths[1].write_bytes(data[:-20])
    elif damage == "pages":
        at = parquet.read_metadata(paths[1]).row_group(0).column(1).data_page_offset
        paths[1].write_bytes(data[:at] + b"\xff" * 10 + data[at + 10 :])
    else:
        parquet.write_table(pa.table({"image": ["x"]}), paths[1])
    with pytest.raises(DataError, match="1.parquet"):
        open_source(tmp_path).read(1)
    found = open_data(tmp_path, options=SKIP)
    texts = captions_of(found)
    if damage in ("no file", "cut"):
        assert found.shard_sizes == [4, 0, 4] and texts == whole[:4] + whole[8:]
        (problem,) = found.problems
        assert problem.cause == "damaged shard" and problem.where == str(paths[1])
    else:
        lost = 2 if damage == "pages" else 1
        assert texts == [*whole[:4], *["damaged shard"] * lost, *(whole[6:] if lost == 2 else whole[8:])]
    assert keys_of(found) == [str(i) for i in range(len(texts))]


def test_a_cut_arrow_file(tmp_path):
    table = pa.table({"image": list("abcdef"), "caption": list("abcdef")})
    write_arrow(tmp_path / "c.arrow", table, 2)
    size = (tmp_path / "c.arrow").stat().st_size
    rows = set()
    for cut in range(1, size - 700, 7):
        write_arrow(tmp_path / "c.arrow", table, 2)
        os.truncate(tmp_path / "c.arrow", size - cut)
        with pytest.raises(DataError, match="c.arrow is not a whole Arrow file"):
            open_data(tmp_path / "c.arrow")
        try:
            data = open_data(tmp_path / "c.arrow", options=SKIP)
        except DataError:
            rows.add(0)
            continue
        assert captions_of(data) == list("abcdef")[: len(data)]
        assert data.problems[0].reason.endswith(f"its first {len(data)} rows are read")
        rows.add(len(data))
    assert {2, 4, 6} <= rows


def test_an_arrow_file_whose_offsets_lie_outside_it(tmp_path):
    """It is mapped: unchecked offsets would read other memory."""
    path = tmp_path / "c.arrow"
    write_arrow(path, pa.table({"image": ["aa", "bb"], "caption": ["x" * 5, "y" * 5]}), 2)
    data = bytearray(path.read_bytes())
    at = data.index((5).to_bytes(4, "little") + (10).to_bytes(4, "little"))
    data[at + 4 : at + 8] = (1 << 30).to_bytes(4, "little")
    path.write_bytes(bytes(data))
    with pytest.raises(DataError, match="c.arrow is not a whole Arrow file"):
        open_data(path).captions(0)
    assert captions_of(open_data(path, options=SKIP)) == ["damaged shard"] * 2


def test_files_without_rows(tmp_path):
    """Line 8: a shard may be empty, not the whole set."""
    empty = pa.table({"image": pa.array([], pa.string()), "caption": pa.array([], pa.string())})
    parquet.write_table(empty, tmp_path / "1.parquet")
    with pytest.raises(DataError, match="holds no sample"):
        open_data(tmp_path)
    four(tmp_path, 0)
    four(tmp_path, 2)
    data = open_data(tmp_path)
    assert data.shard_sizes == [4, 0, 4] and data.captions(1) == [] and data.shard_keys(1) == []
    assert data.caption(4) == "2-0" and len(data.shard_hashes(1)) == 0


def test_stamps_change_with_the_files(tmp_path):
    """Line 4: captions need not be compared while sizes and times of their files are the same."""
    table = written(tmp_path / "c.csv", "image,caption\na,b\n")
    for path, number in (table, 0), (tmp_path / "p", 1):
        if number:
            path.mkdir()
            four(path, 0)
            four(path, 1)
        stamp = open_data(path).shard_stamp(number)
        assert open_data(path).shard_stamp(number) == stamp
        file = path / "1.parquet" if number else path
        os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
        assert open_data(path).shard_stamp(number) != stamp


# options


def test_shards_have_as_many_rows_as_asked(tmp_path):
    path = written(tmp_path / "c.csv", "image,caption\n" + "a,b\n" * 7)
    assert open_data(path, options=DataOptions(shard_rows=3)).shard_sizes == [3, 3, 1]


def test_options_of_other_layouts(tmp_path):
    """Embedding refuses them, for they would be a mistake; training ignores what a cache recorded of other files."""
    four(tmp_path, 0)
    for options in (
        DataOptions(delimiter=";"),
        DataOptions(quoting="none"),
        DataOptions(shard_rows=3),
        DataOptions(text_suffix="cls"),
    ):
        with pytest.raises(ConfigError):
            open_source(tmp_path, options=options)
        assert len(open_data(tmp_path, options=options)) == 4
    with pytest.raises(ConfigError, match="--delimiter and --quoting are for CSV and TSV"):
        open_source(written(tmp_path / "c.jsonl", '{"caption": "a"}'), options=DataOptions(delimiter=";"))


def test_the_class_opens_one_file(tmp_path):
    path = written(tmp_path / "c.csv", "image,caption\na,b\n")
    assert TableImages(path, tmp_path / "elsewhere").root == tmp_path / "elsewhere"


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet", "arrow"])
def test_damaged_bytes_are_errors_of_ours(tmp_path, kind):
    rng, path = random.Random(2), tmp_path / f"c.{kind}"
    rows = [{"image": f"{k}.png", "caption": f'caption "{k}"', "key": f"k{k}"} for k in range(9)]
    if kind == "parquet":
        parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=3)
    elif kind == "arrow":
        write_arrow(path, pa.Table.from_pylist(rows))
    elif kind == "jsonl":
        written(path, "\n".join(map(json.dumps, rows)))
    else:
        quoted = ['"' + row["caption"].replace('"', '""') + '"' for row in rows]
        lines = [f"{row['image']},{text},{row['key']}" for row, text in zip(rows, quoted, strict=True)]
        written(path, "\n".join(["image,caption,key", *lines]))
    whole = path.read_bytes()
    for turn in range(600):
        damaged = bytearray(whole)
        for _ in range(rng.choice([1, 1, 3])):
            damaged[rng.randrange(len(damaged))] = rng.choice([*b'"\n,\r\0', 255, rng.randrange(256)])
        path.write_bytes(damaged)
        try:
            source = open_source(path, options=SKIP if turn % 2 else None)
            for number, size in enumerate(source.sizes):
                read = source.read(number)
                assert len(read.keys) == len(read.captions) == size
                assert {row for row, text in enumerate(read.captions) if text is None} <= read.bad.keys()
        except DataError:
            continue


def test_names_of_columns_that_are_not_utf8(tmp_path):
    for path in (tmp_path / "c.arrow", tmp_path / "c.parquet"):
        table = pa.table({"image": ["a"], "caption": ["b"]})
        write_arrow(path, table) if path.suffix == ".arrow" else parquet.write_table(table, path, store_schema=False)
        path.write_bytes(path.read_bytes().replace(b"caption", b"capt\xffon"))
        with pytest.raises(DataError, match="is not a whole (Arrow|parquet) file"):
            open_data(path)


def test_a_page_with_fewer_rows_than_its_file_says(tmp_path):
    path = tmp_path / "c.parquet"
    parquet.write_table(pa.table({"image": list("abc"), "caption": list("xyz")}), path)
    data = bytearray(path.read_bytes())
    at = parquet.read_metadata(path).row_group(0).column(1).data_page_offset
    at = data.index(b"\x2c\x15\x06", at)  # the number of values in the page, as a zigzag varint
    data[at + 2] = 4
    path.write_bytes(data)
    with pytest.raises(DataError, match="2 of 3 rows of 'caption' can be read"):
        open_data(path).captions(0)
    assert captions_of(open_data(path, options=SKIP)) == ["damaged shard"] * 3


@pytest.mark.parametrize("kind", ["csv", "parquet", "arrow"])
@pytest.mark.parametrize("twice", ["key", "image", "caption"])
def test_a_column_that_occurs_twice(tmp_path, kind, twice):
    names = ["key", "image", "caption", twice]
    columns = {"key": ["k", "l"], "image": ["a.png", "a.png"], "caption": ["x", "y"]}
    path = tmp_path / f"t.{kind}"
    table = pa.Table.from_arrays([pa.array(columns[name]) for name in names], names=names)
    if kind == "parquet":
        parquet.write_table(table, path)
    elif kind == "arrow":
        write_arrow(path, table)
    else:
        rows = [",".join(columns[name][row] for name in names) for row in range(2)]
        written(path, "\n".join([",".join(names), *rows]))
    (tmp_path / "a.png").write_bytes(b"x")
    for skip in (False, True):
        with pytest.raises(DataError, match=f"has several columns '{twice}'"):
            samples = open_data(path, options=DataOptions(skip_bad=skip))
            samples.captions(0)
