"""Links and names that lead out of a folder of images: nothing behind them is read or printed unasked."""

import json
import os
import random

import pyarrow as pa
import pytest
from pyarrow import parquet
from support.hostile import encoded, scene
from support.judged import judged_command
from support.tiny_sets import make_set

from lift_fast.data.check import check
from lift_fast.data.links import Folder
from lift_fast.data.loose import LooseFiles, holds_images
from lift_fast.data.open import open_data
from lift_fast.data.options import DataOptions
from lift_fast.data.samples import BadSample, BadText
from lift_fast.errors import DataError
from lift_fast.eval.sets import open_set
from lift_fast.inference.features import image_files

SECRET = b"the first line of a file of the system\n"
ANY = DataOptions(follow_links=True)


@pytest.fixture
def outside(tmp_path, rng):
    """A folder next to that of the data, with a text and an image."""
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "secret").write_bytes(SECRET)
    (folder / "x.png").write_bytes(encoded(scene(rng), "PNG"))
    (folder / "x.txt").write_text("a caption")
    return folder


@pytest.fixture
def rng():
    return random.Random(0)


@pytest.fixture
def data(tmp_path, rng):
    folder = tmp_path / "data"
    folder.mkdir()
    for key in "ab":
        (folder / f"{key}.png").write_bytes(encoded(scene(rng), "PNG"))
        (folder / f"{key}.txt").write_text(f"caption {key}")
    return folder


def test_files_that_are_links(data, outside):
    (data / "c.png").symlink_to(outside / "secret")
    (data / "c.txt").symlink_to(outside / "secret")
    (data / "d.png").symlink_to(data / "a.png")  # within
    (data / "d.txt").symlink_to("b.txt")
    (data / "d.json").symlink_to("../outside/secret")
    samples = LooseFiles(data)
    with pytest.raises(BadSample, match="c.png is a link that leads out of .*/data; --follow-links") as error:
        samples.image_bytes(2)
    assert error.value.cause == "unreadable"
    with pytest.raises(BadText, match="c.txt is a link that leads out of") as error:
        samples.caption(2)
    with pytest.raises(BadText, match="d.json is a link that leads out of"):
        samples.meta(3)
    assert error.value.cause == "unreadable" and isinstance(samples.captions(0)[2], BadText)
    assert samples.image_bytes(3) == samples.image_bytes(0) and samples.caption(3) == "caption b"
    asked = LooseFiles(data, ANY)
    assert asked.image_bytes(2) == SECRET and asked.caption(2) == SECRET.decode().strip()
    assert samples.shard_keys(0) == asked.shard_keys(0)  # so that a cache fits either


def test_no_byte_of_a_linked_file_is_printed(data, outside):
    (data / "c.png").symlink_to(outside / "secret")
    (data / "c.txt").symlink_to(outside / "secret")
    (data / "c.json").symlink_to(outside / "secret")
    table = data / "metadata.csv"
    for lines in (None, "file_name,text\na.png,x\nc.png,x\n../outside/secret,x\n"):
        if lines:
            table.write_text(lines)
        found = judged_command(["data", "check", data, "--bad", data.parent / "bad.jsonl"])
        printed = found.value.out + found.value.err + (data.parent / "bad.jsonl").read_text()
        assert found.value.status == 1 and "leads out" in printed
        assert not any(SECRET.decode()[at : at + 5] in printed for at in range(0, 30, 5))


def test_a_folder_that_is_a_link(data, outside):
    (data / "linked").symlink_to(outside)
    with pytest.raises(DataError, match="data/linked cannot be read .*a link that leads out of.*--skip-bad leaves it"):
        LooseFiles(data)
    samples = LooseFiles(data, DataOptions(skip_bad=True))
    assert samples.shard_keys(0) == ["a", "b"]
    assert [(problem.cause, "leads out" in problem.reason) for problem in samples.problems] == [("unreadable", True)]
    assert LooseFiles(data, ANY).shard_keys(0) == ["a", "b", "linked/x"]
    (data / "linked").unlink()
    (data / "again").symlink_to(data)  # a loop
    (data / "sub").mkdir()
    (data / "sub2").symlink_to(data / "sub")
    os.link(outside / "x.png", data / "sub/x.png")  # a hard link is a file like any other
    (data / "sub/x.txt").write_text("x")
    assert LooseFiles(data).shard_keys(0) == ["a", "b", "sub/x", "sub2/x"]
    (data / "self.png").symlink_to("self.png")
    with pytest.raises(BadSample, match="unreadable"):
        LooseFiles(data).image_bytes(2)


def test_a_set_that_is_a_link(data, outside, tmp_path):
    (tmp_path / "set").symlink_to(data)
    samples = open_data(tmp_path / "set")
    assert samples.caption(0) == "caption a" and samples.image_bytes(1)
    (tmp_path / "only").mkdir()
    (tmp_path / "only/links").symlink_to(outside)
    assert not holds_images(tmp_path / "only") and holds_images(tmp_path / "only", ANY)


def test_a_cache_of_the_hub(tmp_path, rng):
    """Its files are links from snapshots/REVISION to blobs."""
    repository = tmp_path / "datasets--owner--name"
    snapshot, blobs = repository / "snapshots/0123", repository / "blobs"
    (snapshot / "images").mkdir(parents=True)
    blobs.mkdir()
    for number, (name, content) in enumerate(
        {
            "images/a.png": encoded(scene(rng), "PNG"),
            "images/a.txt": b"x",
            "images/metadata.csv": b"file_name\na.png\n",
        }.items()
    ):
        (blobs / str(number)).write_bytes(content)
        (snapshot / name).symlink_to(os.path.relpath(blobs / str(number), (snapshot / name).parent))
    assert open_data(snapshot / "images").image_bytes(0)
    (snapshot / "images/metadata.csv").unlink()
    assert open_data(snapshot).image_bytes(0) and open_data(snapshot).caption(0) == "x"
    (repository / "token").write_bytes(SECRET)
    (snapshot / "images/a.txt").unlink()
    (snapshot / "images/a.txt").symlink_to(repository / "token")
    with pytest.raises(BadText, match="leads out of"):
        open_data(snapshot).caption(0)


def test_class_names_next_to_tars_in_a_cache_of_the_hub(tmp_path):
    repository = tmp_path / "datasets--owner--name"
    (repository / "blobs").mkdir(parents=True)
    (repository / "blobs/0").write_text("cat\n")
    snapshot = make_set(repository / "snapshots/0123", 4, per_shard=4).folder
    (snapshot / "classnames.txt").symlink_to("../../blobs/0")
    for folder in (snapshot, snapshot.parent):
        assert not Folder(folder).leads_out(snapshot / "classnames.txt")


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_images_that_a_table_names(data, outside, kind):
    (data / "c.png").symlink_to(outside / "secret")
    (data / "folder").symlink_to(outside)
    names = ["a.png", "c.png", "folder/x.png", "../outside/x.png", str(outside / "x.png"), "c.png/../a.png"]
    rows = [{"image": name, "caption": "x"} for name in names]
    path = data / f"t.{kind}"
    if kind == "parquet":
        parquet.write_table(pa.Table.from_pylist(rows), path)
    elif kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    else:
        path.write_text("image,caption\n" + "".join(f"{name},x\n" for name in names))

    def read(options=None):
        samples = open_data(path, options=options)
        found = []
        for row in range(len(samples)):
            try:
                found.append(samples.image_bytes(row)[:4])
            except BadSample as error:
                assert error.cause == "unreadable" and "leads out of" in error.reason
                found.append(None)
        return found

    png = b"\x89PNG"
    assert read() == [png, None, None, None, None, png]
    assert read(ANY) == [png, SECRET[:4], png, None, None, png]
    assert read(DataOptions(absolute_paths=True)) == [png, SECRET[:4], png, png, png, png]


def test_the_folders_of_the_authors_layout(tmp_path, outside, rng):
    (tmp_path / "captions").mkdir()
    rows = [{"key": key, "extension": "png", "re_caption": "x"} for key in ("a", "b")]
    for stem in ("s-0", "s-1"):
        parquet.write_table(pa.Table.from_pylist(rows), tmp_path / f"captions/{stem}.parquet")
    (tmp_path / "images/s-0").mkdir(parents=True)
    (tmp_path / "images/s-0/a.png").write_bytes(encoded(scene(rng), "PNG"))
    (tmp_path / "images/s-0/b.png").symlink_to(outside / "x.png")
    (tmp_path / "images/s-1").symlink_to(outside)
    (outside / "a.png").write_bytes(b"x")
    samples = open_data(tmp_path)
    assert samples.image_bytes(0)
    for row in (1, 2):
        with pytest.raises(BadSample, match="leads out of"):
            samples.image_bytes(row)
    assert open_data(tmp_path, options=ANY).image_bytes(2) == b"x"


def test_images_that_a_benchmark_lists(data, outside, rng):
    (data / "c.jpg").symlink_to(outside / "secret")
    (data / "a.jpg").write_bytes(encoded(scene(rng), "JPEG"))
    images = [{"id": number, "file_name": name} for number, name in enumerate(("a.jpg", "c.jpg"))]
    annotations = [{"id": number, "image_id": number, "caption": "x"} for number in (0, 1)]
    (data / "captions_val2017.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    found = open_set(data / "captions_val2017.json", data)
    assert found.data.image_bytes(0)
    with pytest.raises(BadSample, match="leads out of"):
        found.data.image_bytes(1)
    assert open_set(data / "captions_val2017.json", data, options=ANY).data.image_bytes(1) == SECRET


def test_images_of_a_folder_that_a_command_is_given(data, outside):
    assert image_files([data]) == [data / "a.png", data / "b.png"]
    (data / "c.png").symlink_to(outside / "x.png")
    with pytest.raises(DataError, match="c.png is a link that leads out of .*; name that file, or the folder of"):
        image_files([data])
    assert image_files([data / "c.png"]) == [data / "c.png"]


def test_classes_next_to_tars_and_images(tmp_path, outside, rng):
    folder = make_set(tmp_path / "set", 4, per_shard=4).folder
    assert open_set(folder).questions.captions
    (tmp_path / "files").mkdir()
    for key in "ab":
        (tmp_path / f"files/{key}.png").write_bytes(encoded(scene(rng), "PNG"))
        (tmp_path / f"files/{key}.cls").symlink_to(outside / "secret")
    with pytest.raises(DataError, match="leads out of"):
        open_set(tmp_path / "files")


def test_names_that_no_file_can_have(data):
    folder = Folder(data)
    for name in ("a\0b", "\ud800", "x" * 5000, "", ".", ".."):
        try:
            path = folder.file(name)
        except BadSample as error:
            assert error.cause == "unreadable"
        else:
            assert str(path).startswith(f"{data}/")


def test_tars_and_tables_may_be_links(tmp_path):
    folder = make_set(tmp_path / "real", 4, per_shard=2).folder
    (tmp_path / "farm").mkdir()
    for tar in sorted(folder.glob("*.tar")):
        (tmp_path / "farm" / tar.name).symlink_to(tar)
    assert len(open_data(tmp_path / "farm")) == 4
    assert check(tmp_path / "farm", progress=False)["bad"] == 0
