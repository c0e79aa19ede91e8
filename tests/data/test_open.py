"""open_data takes each layout as users have it, and embedding, checking and training read the same samples from it."""

import json
import re

import pyarrow as pa
import pytest
from pyarrow import parquet
from support.tiny_sets import keys_of, make_set, png
from support.tiny_text import TinyEncoder

from lift_fast.cache import Cache
from lift_fast.data.check import check
from lift_fast.data.folders import ParquetImages
from lift_fast.data.loose import LooseFiles
from lift_fast.data.open import open_data, open_sets
from lift_fast.data.options import DataOptions
from lift_fast.data.shards import Shards
from lift_fast.data.sources import Source, open_source
from lift_fast.data.tables import TableImages
from lift_fast.errors import ConfigError, DataError
from lift_fast.text.embed import embed_share


def image(k):
    import random

    return png(random.Random(k), (4, 3))


def table(keys, kind="bytes"):
    images = [{"bytes": image(k), "path": f"{k}.png"} for k in range(len(keys))]
    if kind != "bytes":
        images = [f"{k}.png" for k in range(len(keys))]
    return pa.table({"file_name" if kind == "names" else "image": images, "text": [f"text {key}" for key in keys]})


def write_arrow(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, rows.schema) as writer:
        writer.write_table(rows, max_chunksize=2)


def images_in(folder, count):
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(count):
        (folder / f"{k}.png").write_bytes(image(k))


def csv_text(mark=","):
    return f"file_name{mark}text\n" + "".join(f"{k}.png{mark}text {k}\n" for k in range(5))


def hub(folder):
    (folder / "data").mkdir(parents=True)
    for number in range(2):
        rows = table(range(5)).slice(3 * number, 3)
        parquet.write_table(rows, folder / "data" / f"train-{number:05d}-of-00002.parquet")


def saved(folder):
    for number in range(2):
        write_arrow(folder / f"data-{number:05d}-of-00002.arrow", table(range(5)).slice(3 * number, 3))
    files = [{"filename": f"data-{number:05d}-of-00002.arrow"} for number in range(2)]
    (folder / "state.json").write_text(json.dumps({"_data_files": files, "_split": "train"}))
    (folder / "dataset_info.json").write_text("{}")


def with_metadata(folder, name):
    images_in(folder, 5)
    if name.endswith("parquet"):
        parquet.write_table(table(range(5), "names"), folder / name)
    elif name.endswith("jsonl"):
        rows = ({"file_name": f"{k}.png", "text": f"text {k}"} for k in range(5))
        (folder / name).write_text("\n".join(map(json.dumps, rows)))
    else:
        (folder / name).write_text(csv_text("\t" if name.endswith("tsv") else ","))


def loose(folder):
    images_in(folder, 5)
    for k in range(5):
        (folder / f"{k}.txt").write_text(f"text {k}")


LAYOUTS = {
    "hub": hub,
    "saved": saved,
    "parquet": lambda folder: folder.mkdir() or parquet.write_table(table(range(5)), folder / "x.parquet"),
    "csv": lambda folder: with_metadata(folder, "metadata.csv"),
    "tsv": lambda folder: with_metadata(folder, "metadata.tsv"),
    "jsonl": lambda folder: with_metadata(folder, "metadata.jsonl"),
    "metadata.parquet": lambda folder: with_metadata(folder, "metadata.parquet"),
    "files": loose,
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_one_set_in_every_layout(tmp_path, name):
    """Line 9: embed, data check and training read it by one piece of code, so that the cache fits."""
    LAYOUTS[name](tmp_path / "set")
    data = open_data(tmp_path / "set")
    assert isinstance(data, LooseFiles if name == "files" else TableImages) and len(data) == 5
    assert [data.image_bytes(i) for i in range(5)] == [image(k) for k in range(5)]
    assert [data.caption(i) for i in range(5)] == [f"text {k}" for k in range(5)]
    assert sum((data.captions(k) for k in range(len(data.shard_sizes))), []) == [f"text {k}" for k in range(5)]
    assert check(tmp_path / "set", progress=False)["causes"] == {}
    source = open_source(tmp_path / "set")
    assert (source.names, source.sizes) == (data.names, data.shard_sizes)
    embed_share(source, tmp_path / "cache", TinyEncoder(), progress=False)
    Cache(tmp_path / "cache").check_keys(data)


@pytest.mark.parametrize("name", [*LAYOUTS, "tars"])
def test_a_source_of_samples_that_are_open(tmp_path, name):
    if name == "tars":
        make_set(tmp_path / "set", 5)
    else:
        LAYOUTS[name](tmp_path / "set")
    data = open_data(tmp_path / "set")
    source = Source(data)
    assert source.read(0) == open_source(tmp_path / "set").read(0) and not source.read(0).bad
    assert source.where(0, 1) == data.where(1) and source.stamp(0) == data.shard_stamp(0)
    with pytest.raises(DataError):
        Source(data, "no such field").read(0)


def test_keys_of_a_cache_are_found_again(tmp_path):
    """Line 10: embed --key file_name made a cache that training refused."""
    with_metadata(tmp_path / "set", "metadata.csv")
    options = DataOptions(key="file_name", shard_rows=2)
    embed_share(open_source(tmp_path / "set", options=options), tmp_path / "cache", TinyEncoder(), progress=False)
    cache = Cache(tmp_path / "cache")
    data = open_data(tmp_path / "set", options=DataOptions(skip_bad=True).merged(cache.manifest.read))
    assert keys_of(data) == [f"{k}.png" for k in range(5)] and data.shard_sizes == [2, 2, 1]
    cache.check_data(data)


# splits


def test_of_several_splits_one_is_named(tmp_path):
    hub(tmp_path / "hub")
    parquet.write_table(table(range(7, 9)), tmp_path / "hub" / "data" / "test-00000-of-00001.parquet")
    for path in (tmp_path / "hub", tmp_path / "hub" / "data"):
        words = f"{tmp_path}/hub/data holds the splits test, train; name the one to read: {tmp_path}/hub/data/test"
        with pytest.raises(DataError, match=re.escape(words)):
            open_data(path)
        assert len(open_data(path / "train")) == 5
        assert open_source(path / "test").read(0).captions == ["text 7", "text 8"]
    with pytest.raises(DataError, match="no data set at .*hub/val; expected"):
        open_data(tmp_path / "hub" / "val")
    saved(tmp_path / "dict" / "train")
    (tmp_path / "dict" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    with pytest.raises(DataError, match="holds the splits train; name the one to read: .*/dict/train"):
        open_data(tmp_path / "dict")
    assert len(open_data(tmp_path / "dict" / "train")) == 5
    for split in ("train", "test"):
        with_metadata(tmp_path / "folders" / split, "metadata.csv")
    with pytest.raises(DataError, match="holds the splits test, train; name the one to read: .*/folders/test"):
        open_data(tmp_path / "folders")
    assert len(open_data(tmp_path / "folders" / "train")) == 5
    with_metadata(tmp_path / "one" / "train", "metadata.csv")
    assert open_data(tmp_path / "one").image_bytes(4) == image(4)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"_data_files": [{}]}', '{"_data_files": [7]}', b"\xff"])
def test_a_state_that_does_not_parse(tmp_path, text):
    saved(tmp_path / "set")
    (tmp_path / "set" / "state.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=r"state.json does not parse .*; name the .arrow files themselves"):
        open_data(tmp_path / "set")
    assert len(open_data(tmp_path / "set" / "data-00000-of-00002.arrow")) == 3


def test_the_order_of_saved_files_is_that_of_their_list(tmp_path):
    saved(tmp_path / "set")
    files = [{"filename": f"data-{number:05d}-of-00002.arrow"} for number in (1, 0)]
    (tmp_path / "set" / "state.json").write_text(json.dumps({"_data_files": files}))
    assert open_data(tmp_path / "set").captions(0) == ["text 3", "text 4"]


# images and captions


def test_captions_alone(tmp_path):
    rows = pa.table({"id": ["a", "b"], "caption": ["one", "two"]})
    (tmp_path / "set").mkdir()
    for name in ("set/0.parquet", "c.parquet"):
        parquet.write_table(rows, tmp_path / name)
    write_arrow(tmp_path / "c.arrow", rows)
    (tmp_path / "c.csv").write_text("id,caption\na,one\nb,two\n")
    for name in ("set", "c.parquet", "c.arrow", "c.csv"):
        with pytest.raises(DataError, match="names no images: expected a column file_name, .*: id, caption"):
            open_data(tmp_path / name)
        assert open_data(tmp_path / name, captions_only=True).captions(0) == ["one", "two"]


def test_parquet_with_folders_of_images_stays_the_authors_layout(tmp_path):
    rows = pa.table({"key": ["0", "1"], "re_caption": ["one", "two"], "url": ["http://x", "http://y"]})
    parquet.write_table(rows, tmp_path / "train-00000-of-00001.parquet")
    with pytest.raises(DataError, match="no images for the parquet files at .*: expected a folder"):
        open_data(tmp_path)
    assert open_source(tmp_path).read(0).keys == ["0", "1"]
    images_in(tmp_path / "train-00000-of-00001", 2)
    for path in (tmp_path, tmp_path / "train-00000-of-00001.parquet"):
        data = open_data(path)
        assert isinstance(data, ParquetImages) and data.image_bytes(1) == image(1)
        assert data.captions(0) == ["one", "two"] and data.text_fields() == ["re_caption", "url"]
    data = open_data(tmp_path, options=DataOptions(key="url"))
    assert data.shard_keys(0) == ["http://x", "http://y"] and data.image_bytes(0) == image(0)


def test_names_in_parquet_with_images_elsewhere(tmp_path):
    (tmp_path / "set").mkdir()
    parquet.write_table(table(range(5), "names"), tmp_path / "set" / "0.parquet")
    images_in(tmp_path / "images", 5)
    for path in (tmp_path / "set", tmp_path / "set" / "0.parquet"):
        assert open_data(path, tmp_path / "images").image_bytes(4) == image(4)


def test_several_sets_with_options_for_each(tmp_path):
    make_set(tmp_path / "tars", 3)
    with_metadata(tmp_path / "csv", "metadata.csv")
    paths = [tmp_path / "tars", tmp_path / "csv"]
    data = open_sets(paths, options=[DataOptions(), DataOptions(key="file_name", shard_rows=2)])
    assert isinstance(data.sets[0], Shards) and data.shard_sizes == [3, 2, 2, 1]
    assert open_sets(paths, options=DataOptions(shard_rows=4)).shard_sizes == [3, 4, 1]
    assert open_sets(paths).shard_sizes == [3, 5]
    with pytest.raises(ConfigError, match="hold their images"):
        open_sets(paths, [tmp_path, tmp_path])


def test_what_is_found_bad_does_not_move_the_others(tmp_path):
    """Rows of the cache stay rows of the data when some are bad."""
    with_metadata(tmp_path / "set", "metadata.csv")
    lines = csv_text().splitlines()
    lines[2] = "1.png, "
    lines[4] = "3.png,a,b"
    (tmp_path / "set" / "metadata.csv").write_text("\n".join(lines))
    source = open_source(tmp_path / "set", options=DataOptions(skip_bad=True))
    read = source.read(0)
    assert read.captions == ["text 0", None, "text 2", None, "text 4"]
    assert {row: error.cause for row, error in read.bad.items()} == {1: "no caption", 3: "does not parse"}
    embed_share(source, tmp_path / "cache", TinyEncoder(), progress=False)
    cache = Cache(tmp_path / "cache")
    assert cache.skipped(0).tolist() == [1, 3]
    cache.check_data(open_data(tmp_path / "set", options=DataOptions(skip_bad=True)))
