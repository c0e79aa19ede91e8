"""eval/templates.py: files of templates and of class names, and those of ImageNet."""

import json
from pathlib import Path

import pytest

from lift_fast.errors import DataError
from lift_fast.eval.templates import AUTHORS, imagenet_classes, imagenet_templates, read_classnames, read_templates


def written(folder, content, suffix=".txt"):
    path = folder / f"file{suffix}"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_imagenet():
    classes, templates = imagenet_classes(), imagenet_templates()
    assert len(classes) == 1000 and list(classes) == sorted(classes)
    assert (classes["n01440764"], classes["n02123045"], classes["n15075141"]) == ("tench", "tabby cat", "toilet paper")
    assert classes["n02012849"] == "crane bird" and classes["n03126707"] == "construction crane"
    assert len(set(classes.values())) == 998
    assert len(set(templates)) == 80 and all(template.count("{}") == 1 for template in templates)
    assert {"a photo of a {}.", "itap of the {}.", "a tattoo of the {}."} <= set(templates)
    assert read_templates(Path("imagenet-authors")) == [AUTHORS] == ["It is a photo of a {}"]
    assert read_templates(Path("imagenet")) == list(templates) and read_classnames(Path("imagenet")) == classes


def test_a_file_of_that_name_goes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("imagenet").write_text("my {}\n")
    assert read_templates(Path("imagenet")) == ["my {}"]


def test_templates(tmp_path):
    assert read_templates(written(tmp_path, "# mine\na {c}.\r\n\n  {} and {} \n")) == ["a {}.", "{} and {}"]
    assert read_templates(written(tmp_path, '["a {}", "b {c}"]', ".json")) == ["a {}", "b {}"]


@pytest.mark.parametrize(
    ("content", "suffix", "message"),
    [
        ("a {}\na photo\n", ".txt", "line 2: 'a photo' has no {} where the name of the class goes"),
        ("\n# x\n", ".txt", "holds no template; write one a line, such as: It is a photo of a {}"),
        (b"a {}\n\xff\n", ".txt", "is not UTF-8"),
        ('["a {}", 3]', ".json", "entry 2 is no text"),
        ('["a {} \\ud800"]', ".json", "entry 1 is no text"),
        ('{"a": "b {}"}', ".json", "is no list of texts"),
        ("[", ".json", "is no whole JSON file"),
        ("[" * 100_000, ".json", "is no whole JSON file"),
    ],
)
def test_templates_that_cannot_be_used(tmp_path, content, suffix, message):
    with pytest.raises(DataError) as error:
        read_templates(written(tmp_path, content, suffix))
    assert message in str(error.value) and f"file{suffix}" in str(error.value)


@pytest.mark.parametrize(
    ("content", "suffix", "names"),
    [
        ("cat\nred  panda\n\n", ".txt", ["cat", "red  panda"]),
        ("\ufeff# names\ncat\r\ndog", ".txt", ["cat", "dog"]),
        ("7 up\ncola\n", ".txt", ["7 up", "cola"]),  # not every line begins with a number
        ("0 cat\n17 red panda\n", ".txt", {"0": "cat", "17": "red panda"}),
        ("b\tthe letter b\na\tA, or a\n", ".txt", {"b": "the letter b", "a": "A, or a"}),
        ("n01440764 tench, Tinca tinca\nn01443537 goldfish\n", ".txt", {"n01440764": "tench", "n01443537": "goldfish"}),
        ('["cat", "dog"]', ".json", ["cat", "dog"]),
        ('{"a b": "A, B", "c": "C"}', ".json", {"a b": "A, B", "c": "C"}),
        (
            '{"0": ["n01440764", "tench"], "1": ["n01443537", "gold_fish"]}',
            ".json",
            {"n01440764": "tench", "n01443537": "gold fish"},
        ),
    ],
)
def test_classnames(tmp_path, content, suffix, names):
    found = read_classnames(written(tmp_path, content, suffix))
    assert found == names and list(found) == list(names)


@pytest.mark.parametrize(
    ("content", "suffix", "message"),
    [
        ("cat\n\ndog\n", ".txt", "line 2 is blank"),
        ("cat\n", ".txt", "names fewer than two classes"),
        ("", ".txt", "names fewer than two classes"),
        ("a\tx\na\ty\n", ".txt", "line 2: the class 'a' occurs twice"),
        ("a\tx\nb\t \n", ".txt", "line 2 has no name of a class"),
        ("\tx\nb\ty\n", ".txt", "line 1 has no id of a class"),
        ('{"a": "x", "a": "y"}', ".json", "'a': the class 'a' occurs twice"),
        ('{"a": "x", "b": 3}', ".json", "'b' is no text"),
        ('{"a": "x", "b": {"c": "d"}}', ".json", "'b' is no text"),
        ('["x", null]', ".json", "entry 2 is no text"),
        ("3", ".json", "is no list of texts"),
        (b"\xff\n", ".txt", "is not UTF-8"),
    ],
)
def test_classnames_that_cannot_be_used(tmp_path, content, suffix, message):
    with pytest.raises(DataError) as error:
        read_classnames(written(tmp_path, content, suffix))
    assert message in str(error.value) and f"file{suffix}" in str(error.value)


@pytest.mark.parametrize("read", [read_templates, read_classnames])
def test_a_file_that_is_not_there(tmp_path, read):
    for path in (tmp_path / "none.txt", tmp_path):
        with pytest.raises(DataError, match=str(path)):
            read(path)


def test_comments_are_no_comments_in_json(tmp_path):
    assert read_classnames(written(tmp_path, json.dumps(["#1", "b"]), ".json")) == ["#1", "b"]
