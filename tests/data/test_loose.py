"""lift_fast.data.loose: folders of images with captions next to them, and class folders."""

import json
import os
import random
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.hostile import encoded, scene

from lift_fast.data.loose import LooseFiles, holds_images
from lift_fast.data.open import open_data
from lift_fast.data.options import DataOptions
from lift_fast.data.samples import BadSample, BadText
from lift_fast.data.sources import open_source
from lift_fast.errors import ConfigError, DataError


def write(folder: Path, files: dict[str, bytes | str]) -> Path:
    """Writes files, name -> content, and returns the folder."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def names(folder: Path, *names: str) -> Path:
    """Writes files that hold their names."""
    return write(folder, {name: name for name in names})


def keys(samples: LooseFiles) -> list[str]:
    return [key for number in range(len(samples.names)) for key in samples.shard_keys(number)]


def unused(samples: LooseFiles) -> dict[str, int]:
    """Reason and names -> count of every problem, all of them unused files."""
    assert all(problem.cause == "unused file" for problem in samples.problems)
    assert all(problem.where == str(samples.folder) for problem in samples.problems)
    return {problem.reason: problem.count for problem in samples.problems}


# images with captions next to them


def test_dotted_names_pair_by_their_last_suffix(tmp_path):
    """Line 3 of the issue for loose files: 22.jpg and 22.05.jpg are two samples."""
    samples = LooseFiles(names(tmp_path, "22.jpg", "22.txt", "22.05.jpg", "22.05.txt", "a.b/c.d.png", "a.b/c.d.txt"))
    assert keys(samples) == ["22", "22.05", "a.b/c.d"]
    assert samples.captions(0) == ["22.txt", "22.05.txt", "a.b/c.d.txt"]
    assert [samples.image_bytes(i) for i in range(3)] == [b"22.jpg", b"22.05.jpg", b"a.b/c.d.png"]
    assert samples.problems == []


def test_samples_are_in_the_order_of_folders_and_names(tmp_path):
    files = [f"{key}.{suffix}" for key in ("b/2", "b/10", "z", "a/x/1", "a/y", "c") for suffix in ("txt", "jpg")]
    samples = LooseFiles(names(tmp_path, *files), DataOptions(shard_rows=4))
    assert keys(samples) == ["c", "z", "a/y", "a/x/1", "b/10", "b/2"]
    assert samples.shard_sizes == [4, 2] and len(samples) == 6
    assert samples.captions(1) == ["b/10.txt", "b/2.txt"] and samples.caption(4) == "b/10.txt"
    assert samples.where(5) == f"{tmp_path}: sample 'b/2'"
    with pytest.raises(IndexError):
        samples.image_bytes(6)


def test_the_json_is_metadata_and_may_hold_captions(tmp_path):
    meta = {"long": "a long one", "list": ["a", "b"], "n": 3}
    files = {
        "a.jpg": "",
        "a.txt": "x",
        "a.json": json.dumps(meta),
        "b.jpg": "",
        "b.json": "{",
        "c.png": "",
        "c.txt": "",
    }
    samples = LooseFiles(write(tmp_path, files | {"d.jpg": "", "d.json": b'{"long": "caf\xe9"}', "e.jpg": ""}))
    assert samples.meta(0) == meta and samples.meta(2) == {}
    assert samples.caption(0, "long") == "a long one"
    causes = [c.cause if isinstance(c, BadText) else c for c in samples.captions(0, "long")]
    assert causes == ["a long one", "does not parse", "no caption", "not UTF-8", "no caption"]
    with pytest.raises(BadText, match="'list' is a list of 2, not text"):
        samples.caption(0, "list")
    with pytest.raises(BadText, match="its .json does not parse"):
        samples.meta(1)
    assert samples.text_fields() == ["txt"] and samples.caption_field("long") == "long"
    with pytest.raises(DataError, match="no column 'long'; choose the caption field among: txt"):
        LooseFiles(names(tmp_path / "plain", "a.jpg", "a.txt")).caption_field("long")


def test_what_a_sample_lacks_is_told_by_its_cause(tmp_path):
    """A sample without image or caption stays one: it is counted when it is read."""
    files = {"a.jpg": "x", "a.txt": "good", "b.jpg": "x", "c.txt": "alone", "d.jpg": "x", "d.txt": " \n"}
    files |= {"e.jpg": "x", "e.txt": b"caf\xe9", "f.tiff": b"II*\0", "f.txt": "t"}
    samples = LooseFiles(write(tmp_path, files))
    causes = [c.cause if isinstance(c, BadText) else c for c in samples.captions(0)]
    assert causes == ["good", "no caption", "alone", "no caption", "not UTF-8", "t"]
    with pytest.raises(BadSample, match="missing: .*sample 'c' has no image"):
        samples.image_bytes(2)
    assert samples.image_bytes(5) == b"II*\0"  # counted as unsupported when it is decoded
    (tmp_path / "a.jpg").unlink()
    (tmp_path / "a.txt").unlink()
    with pytest.raises(BadSample, match="missing: there is no"):
        samples.image_bytes(0)
    with pytest.raises(BadText, match="there is no"):
        samples.caption(0)


def test_files_that_no_sample_uses_are_counted_and_named(tmp_path):
    names(tmp_path, *(f"{key}.{suffix}" for key in ("a", "s/b") for suffix in ("jpg", "txt", "json")))
    names(
        tmp_path, "a.png", "a.JPG", "a.TXT", "a.caption", "s/lost.json", "README", "x.py", ".hidden.jpg", ".git/y.jpg"
    )
    samples = LooseFiles(tmp_path)
    assert keys(samples) == ["a", "s/b"] and samples.image_bytes(0) == b"a.png"
    second, suffix = "a second image or caption of a sample", "other suffixes than those that are read"
    found = unused(samples)
    assert sum(found.values()) == 5
    assert [reason for reason in found if reason.startswith(suffix)][0].endswith(": a.caption")
    assert [reason for reason in found if reason.startswith("metadata without")][0].endswith(": s/lost.json")
    assert found[next(reason for reason in found if reason.startswith(second))] == 3
    many = names(tmp_path / "many", *(f"{i}.{suffix}" for i in range(9) for suffix in ("jpg", "png", "txt")))
    assert unused(LooseFiles(many)) == {f"{second}: 0.jpg, 1.jpg, 2.jpg and 6 more": 9}


def test_a_json_of_something_else_is_no_sample(tmp_path):
    samples = LooseFiles(names(tmp_path, "a.jpg", "a.txt", "dataset.json"))
    assert keys(samples) == ["a"] and samples.problems == []


def test_suffixes_can_be_chosen(tmp_path):
    files = ("x.input.jpg", "x.output.jpg", "x.cls", "x.txt", "y.v1.input.JPG", "y.v1.cls", "z.jpg")
    samples = LooseFiles(names(tmp_path, *files), DataOptions(image_suffix="input.jpg", text_suffix="cls"))
    assert keys(samples) == ["x", "y.v1"] and samples.captions(0) == ["x.cls", "y.v1.cls"]
    assert samples.image_bytes(1) == b"y.v1.input.JPG"
    (reason, count), *more = unused(samples).items()
    assert reason.endswith(": x.output.jpg, x.txt, z.jpg") and count == 3 and not more
    labelled = LooseFiles(names(tmp_path / "cls", "a.jpg", "a.txt", "a.cls"))
    assert labelled.problems == []  # a class label next to a caption is no second caption
    with pytest.raises(ConfigError, match="must differ"):
        LooseFiles(tmp_path, DataOptions(image_suffix="txt"))


def test_names_that_are_not_utf_8(tmp_path):
    path = os.fsencode(names(tmp_path, "a.jpg", "a.txt")) + b"/caf\xe9"
    try:
        for suffix in (b".jpg", b".txt"):
            with open(path + suffix, "wb") as file:
                file.write(b"content")
    except OSError:
        pytest.skip("this file system takes no such name")
    samples = LooseFiles(tmp_path)
    with pytest.raises(BadText, match="half a Unicode character"):
        samples.shard_keys(0)
    samples = LooseFiles(tmp_path, DataOptions(skip_bad=True))
    assert samples.shard_keys(0) == ["a", ""] and [e.cause for e in samples.bad_keys(0).values()] == ["no key"]
    assert samples.caption(1) == "content" and samples.image_bytes(1) == b"content"
    assert len(samples.shard_hashes(0)) == 2


def test_links_to_a_folder_above_are_not_followed_for_ever(tmp_path):
    names(tmp_path / "d", "a.jpg", "a.txt", "sub/b.jpg", "sub/b.txt")
    names(tmp_path / "other", "c.jpg", "c.txt")
    (tmp_path / "d/sub/loop").symlink_to(tmp_path / "d")
    (tmp_path / "d/linked").symlink_to(tmp_path / "other")
    (tmp_path / "d/broken.txt").symlink_to(tmp_path / "nothing")
    samples = LooseFiles(tmp_path / "d", DataOptions(follow_links=True))
    assert keys(samples) == ["a", "broken", "linked/c", "sub/b"]
    with pytest.raises(BadText, match="there is no"):
        samples.caption(1)
    assert holds_images(tmp_path / "d")


def test_a_folder_that_cannot_be_listed(tmp_path, monkeypatch):
    names(tmp_path, "a.jpg", "a.txt", "closed/b.jpg", "closed/b.txt")
    scandir = os.scandir

    def refusing(path):
        if "closed" in str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(DataError, match="closed.* cannot be read .Permission denied.; --skip-bad leaves it out"):
        LooseFiles(tmp_path)
    samples = LooseFiles(tmp_path, DataOptions(skip_bad=True))
    assert keys(samples) == ["a"]
    assert [(problem.cause, Path(problem.where).name) for problem in samples.problems] == [("unreadable", "closed")]


def test_the_stamp_changes_with_a_caption(tmp_path):
    samples = LooseFiles(names(tmp_path, "a.jpg", "a.txt", "b.jpg", "b.txt", "b.json"), DataOptions(shard_rows=1))
    before = [samples.shard_stamp(number) for number in range(2)]
    assert before == [LooseFiles(tmp_path, DataOptions(shard_rows=1)).shard_stamp(number) for number in range(2)]
    (tmp_path / "b.txt").write_text("another")
    assert samples.shard_stamp(0) == before[0] and samples.shard_stamp(1) != before[1]
    later = samples.shard_stamp(1)
    (tmp_path / "b.json").unlink()
    assert samples.shard_stamp(1) != later
    (tmp_path / "a.jpg").write_text("images are not captions")
    assert samples.shard_stamp(0) == before[0]


def test_memory_is_the_keys_and_a_few_bytes(tmp_path):
    for folder in range(10):
        names(tmp_path, *(f"{folder}/{i:06d}.{suffix}" for i in range(500) for suffix in ("jpg", "txt")))
    LooseFiles(tmp_path)
    tracemalloc.start()
    samples = LooseFiles(tmp_path)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(samples) == 5000 and held < 5000 * 32 + 20_000


# class folders


def test_class_folders(tmp_path):
    """Line 9 of the issue: the caption is the name of the folder, and the metadata has it as the label."""
    samples = LooseFiles(names(tmp_path, "tabby cat/2.PNG", "tabby cat/1.jpg", "dog/a.b.jpeg"))
    assert keys(samples) == ["dog/a.b", "tabby cat/1", "tabby cat/2"]
    assert samples.captions(0) == ["dog", "tabby cat", "tabby cat"] and samples.caption(2) == "tabby cat"
    assert samples.meta(1) == {"label": "tabby cat"} and samples.caption(1, "label") == "tabby cat"
    assert samples.image_bytes(0) == b"dog/a.b.jpeg" and samples.problems == [] and samples.text_fields() == []
    assert samples.shard_stamp(0) == samples.shard_stamp(0)
    with pytest.raises(DataError, match="no column 'long'"):
        samples.captions(0, "long")


def test_captions_are_embedded_from_folders(tmp_path):
    source = open_source(names(tmp_path / "c", "cat/1.jpg", "dog/2.jpg"))
    assert source.read(0) == (["cat/1", "dog/2"], ["cat", "dog"], {}) and "from the names of their folders" in str(
        source
    )
    files = names(tmp_path / "f", "a.jpg", "a.cls", "b.jpg", "b.cls", "c.jpg")
    with pytest.raises(BadText, match="sample 'c' has no caption"):
        open_source(files, options=DataOptions(text_suffix="cls")).read(0)
    source = open_source(files, options=DataOptions(text_suffix="cls", skip_bad=True))
    keys, captions, bad = source.read(0)
    assert (keys, captions) == (["a", "b", "c"], ["a.cls", "b.cls", None]) and list(bad) == [2]
    assert "captions from their .cls" in str(source)


def test_class_folders_with_other_files(tmp_path):
    files = ("cat/1.jpg", "dog/1.jpg", "dog/1.png", "dog/notes.txt", "readme.txt", "logo.png", "dog/more/2.jpg")
    samples = LooseFiles(names(tmp_path, *files, "cat/info.json"))
    assert keys(samples) == ["cat/1", "dog/1"] and samples.image_bytes(1) == b"dog/1.png"
    assert sum(unused(samples).values()) == 5
    told = " ".join(unused(samples))
    assert all(name in told for name in ("dog/1.jpg", "dog/notes.txt", "readme.txt", "logo.png", "dog/more/2.jpg"))


@pytest.mark.parametrize(
    "files",
    [
        ["a.jpg", "b.jpg"],
        ["pictures/a.jpg", "pictures/b.jpg"],
        ["train/a.jpg", "test/b.jpg", "val/c.jpg"],
        ["train/cat/a.jpg", "train/dog/b.jpg", "test/cat/c.jpg"],
        ["train-00000-of-00002/a.jpg", "train-00001-of-00002/b.jpg"],
        ["cat/a.jpg", "dog/b.jpg", "dog/metadata.csv"],
        ["cat/a.jpg", "dog/b.jpg", "meta/0.parquet"],
        ["cat/a.jpg", "dog/b.jpg", "more/0.tar"],
    ],
)
def test_folders_that_are_no_classes_are_refused(tmp_path, files):
    """A folder's name becomes a caption only where the folders can be classes: a wrong caption would train."""
    with pytest.raises(DataError, match="holds images and"):
        LooseFiles(names(tmp_path, *files))


def test_a_folder_without_images(tmp_path):
    assert not holds_images(names(tmp_path, "a.txt", "b/c.json", ".d/e.jpg", "jpg", ".jpg"))
    with pytest.raises(DataError, match="holds no image file"):
        LooseFiles(tmp_path)
    assert holds_images(names(tmp_path, "b/x/y/e.JPG"))


def test_detection_looks_at_few_entries(tmp_path, monkeypatch):
    names(tmp_path, *(f"{folder}/{i}.txt" for folder in range(8) for i in range(100)))
    listed = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: listed.append(path) or scandir(path))
    monkeypatch.setattr("lift_fast.data.loose._LOOKED_AT", 250)
    assert not holds_images(tmp_path) and len(listed) == 4
    listed.clear()
    names(tmp_path, "a.jpg")
    assert holds_images(tmp_path) and len(listed) == 1


# both


SUFFIXES = ["jpg", "JPG", "png", "tiff", "txt", "json", "cls", "md", ""]


@settings(deadline=None, max_examples=60)
@given(
    st.sets(
        st.tuples(
            st.sampled_from(["", "a/", "b/", "a/c/"]), st.sampled_from(["1", "1.5", "x"]), st.sampled_from(SUFFIXES)
        ),
        min_size=1,
    ),
    st.sampled_from([DataOptions(), DataOptions(image_suffix="5.png", text_suffix="md")]),
)
def test_no_file_is_lost(tmp_path_factory, files, options):
    """Every file that looks like an image or a caption is read by a sample, or counted."""
    folder = tmp_path_factory.mktemp("d")
    picture = encoded(scene(random.Random(0), 8, 8), "PNG")
    files = [f"{where}{stem}.{suffix}".rstrip(".") for where, stem, suffix in files]
    for name in files:
        is_text = name.endswith(("txt", "json", "cls", "md"))
        write(
            folder, {name: ('{"name": "x"}' if name.endswith("json") else name) if is_text else picture + name.encode()}
        )
    try:
        samples = LooseFiles(folder, options)
    except DataError as error:
        assert "holds no image file" in str(error) or "holds images and" in str(error)
        return
    read = set()
    for i, key in enumerate(keys(samples)):
        for part in range(3):
            path = samples._path(i, part)
            if path is not None:
                name = str(path.relative_to(folder))
                assert name in files and name.startswith(f"{key}.") and name not in read
                read.add(name)
    looks = {name for name in files if name.lower().endswith(("jpg", "png", "tiff", ".txt", ".cls"))}
    if options.text_suffix:
        looks |= {name for name in files if name.endswith(".md")}
    lost = looks - read
    beside = {name for name in lost if name.endswith(".cls")}  # not counted next to a caption
    counted = sum(problem.count for problem in samples.problems)
    jsons = {name for name in files if name.endswith("json")} - read
    assert len(lost - beside) <= counted <= len(lost | jsons)


def test_images_alone(tmp_path):
    """images_only: every image of a plain folder is a sample, and files of captions change nothing elsewhere."""
    files = ("b.jpg", "c/1.png", "c/d/e/2.webp", "d/3.jpg", "e.txt")
    samples = open_data(names(tmp_path / "plain", *files), images_only=True)
    assert keys(samples) == ["b", "c/1", "c/d/e/2", "d/3"]
    assert [samples.image_file(i) for i in range(4)] == [
        tmp_path / "plain" / name for name in ("b.jpg", "c/1.png", "c/d/e/2.webp", "d/3.jpg")
    ]
    assert unused(samples) == {"captions without an image: e.txt": 1} and samples.meta(1) == {}
    assert isinstance(samples.captions(0)[0], BadText)
    captioned = names(tmp_path / "captioned", "a.jpg", "a.txt", "b.txt", "c.jpg")
    assert keys(open_data(captioned, images_only=True)) == keys(open_data(captioned)) == ["a", "b", "c"]
    with pytest.raises(BadSample, match="has no image"):
        open_data(captioned).image_file(1)
    classes = names(tmp_path / "classes", "cat/1.jpg", "dog/2.jpg")
    assert keys(open_data(classes, images_only=True)) == keys(open_data(classes))
    with pytest.raises(DataError, match="no data set"):
        open_data(names(tmp_path / "none", "a.txt"), images_only=True)
