"""Metadata, labels and annotations of other types than they should have: a typed error, or counted."""

import io
import json
import random
import tarfile

import pytest
from support.hostile import encoded, scene
from support.judged import judged, judged_command

from lift_fast.data.samples import BadText
from lift_fast.errors import DataError
from lift_fast.eval.sets import open_set
from lift_fast.sugarcrepe import TASKS

IMAGE = encoded(scene(random.Random(0)), "PNG")
FIRST, *_, LAST = TASKS
GOOD = {task: {"caption": "x", "foil": "y"} for task in TASKS}
ODD = (None, True, 5, -1, 1.5, float("nan"), 1 << 70, "", "\ud800", [], ["x"], {}, {"x": 1}, [[]])


def write(folder, metas):
    folder.mkdir(exist_ok=True)
    with tarfile.open(folder / "0.tar", "w") as tar:
        for number, meta in enumerate(metas):
            for suffix, data in ("png", IMAGE), ("txt", b"a caption %d" % number), ("json", json.dumps(meta).encode()):
                info = tarfile.TarInfo(f"k{number}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return folder


@pytest.mark.parametrize("value", ODD, ids=repr)
def test_compositions(tmp_path, value):
    """`composition: 5` was a traceback."""
    with pytest.raises(DataError, match="sample 0 has no caption and foil for the composition task"):
        open_set(write(tmp_path / "a", [{"composition": value}, {"composition": GOOD}]))
    with pytest.raises(DataError, match="sample 1.* composition task"):
        open_set(write(tmp_path / "b", [{"composition": GOOD}, {"composition": {**GOOD, LAST: value}}]))
    for name in ("caption", "foil"):
        pair = {"caption": "x", "foil": "y", name: value}
        if isinstance(value, str) and value.strip() and value.isascii():
            continue
        with pytest.raises(DataError, match=f"sample 0, composition task .*{name}"):
            open_set(write(tmp_path / "c", [{"composition": {**GOOD, FIRST: pair}}]))


@pytest.mark.parametrize("field", ["group", "label", "cls"])
def test_labels(tmp_path, field):
    labels = ["cat", "dog", *ODD]
    found = open_set(write(tmp_path / "a", [{field: label} for label in labels]))
    classes = found.questions.classes
    assert classes.names == ["cat", "dog"] and set(classes.labels) == {0, 1}
    assert any("of 16 samples name no class" in note for note in found.questions.notes)
    for text in found.questions.texts():
        text.encode()


def test_captions(tmp_path):
    folder = write(tmp_path / "a", [{"long": value} for value in ("x", *ODD)])
    found = open_set(folder, fields=["long"], skip_bad=True)
    assert found.questions.captions[0] == ["x"]
    assert set(found.questions.left_out.values()) == {"no caption", "not text", "not UTF-8"}
    assert len(found.questions.captions) + len(found.questions.left_out) == 1 + len(ODD)
    with pytest.raises(BadText):
        open_set(folder, fields=["long"])
    assert judged_command(["data", "check", folder, "--field", "long"]).value.status == 1


ANNOTATIONS = {
    "captions_val2017.json": {
        "images": [{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "b.png"}],
        "annotations": [{"id": 1, "image_id": 1, "caption": "x"}, {"id": 2, "image_id": 2, "caption": "y"}],
    },
    "dataset_coco.json": {
        "dataset": "coco",
        "images": [{"split": "test", "filepath": "", "filename": "a.png", "sentences": [{"raw": "x"}]}],
    },
    "add_att.json": {"0": {"filename": "a.png", "caption": "x", "negative_caption": "y"}},
    "replace_rel.json": [{"id": 1, "filename": "a.png", "caption": "x", "caption2": "z", "negative_caption": "y"}],
}


def places(value, path=()):
    """Every place in a JSON value."""
    yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(inner, (*path, key))


def replaced(value, path, new):
    if not path:
        return new
    value = value.copy()
    value[path[0]] = replaced(value[path[0]], path[1:], new)
    return value


@pytest.mark.attack
@pytest.mark.parametrize("name", ANNOTATIONS)
def test_annotations(tmp_path, name):
    for image in "ab":
        (tmp_path / f"{image}.png").write_bytes(IMAGE)
    changes = [(path, value) for path in places(ANNOTATIONS[name]) for value in ODD]

    def run():
        errors = 0
        for path, value in changes:
            (tmp_path / name).write_text(json.dumps(replaced(ANNOTATIONS[name], path, value)))
            for skip in (False, True):
                try:
                    found = open_set(tmp_path / name, skip_bad=skip)
                    found.data.shard_keys(0)
                    for text in found.questions.texts():
                        text.encode()
                except DataError:
                    errors += 1
        return errors

    found = judged(run)
    assert found.value > len(changes) / 2
