"""eval/labels.py and eval/layouts/class_sets.py: class folders, .cls members, and labels in metadata."""

import hashlib
import json
import os
import tarfile
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from support.scorers import Scorer
from support.tiny_benchmarks import uniform, write_class_tar, write_images, write_tar

from lift_fast.data.loose import LooseFiles
from lift_fast.data.options import DataOptions
from lift_fast.errors import DataError
from lift_fast.eval import labels as labels_module
from lift_fast.eval.layouts import class_sets, open_benchmark
from lift_fast.eval.run import evaluate
from lift_fast.eval.sets import open_set
from lift_fast.eval.templates import AUTHORS, USUAL, imagenet_classes, imagenet_templates, read_classnames

SKIPPING = DataOptions(skip_bad=True)


def classes_in(path, **more):
    found = open_set(path, **more)
    assert found.questions.captions == {}
    return found.questions.classes


def label_names(classes):
    """Name of the class of each sample, in order."""
    return [classes.names[label] for _, label in sorted(classes.labels.items())]


def test_class_folders(tmp_path):
    write_images(tmp_path, ["Golden_Retriever/2.JPEG", "Golden_Retriever/1.jpg", "Food & Drink/x.png"])
    classes = classes_in(tmp_path)
    assert classes.names == ["food and drink", "golden retriever"] and classes.labels == {0: 0, 1: 1, 2: 1}
    assert classes.templates == list(USUAL) and classes.alone == "{}"
    assert isinstance(open_set(tmp_path).data, LooseFiles)
    classes = classes_in(tmp_path, templates=["one {}", "two {}"])
    assert classes.templates == ["one {}", "two {}"] and classes.alone == "one {}"


def test_empty_class_folders_come_first(tmp_path, monkeypatch):
    """As a set that was unpacked in part; the order of a folder's entries is the file system's."""
    for name in "abcd":
        (tmp_path / name).mkdir()
    write_images(tmp_path, ["e/1.jpg", "f/2.jpg"])
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: nullcontext(iter(sorted(scandir(path), key=lambda e: e.name))))
    assert class_sets._first_suffixes(tmp_path) == ({"jpg"}, True)
    monkeypatch.undo()
    assert classes_in(tmp_path).names == ["e", "f"]


@pytest.mark.parametrize(
    ("classnames", "names", "labels"),
    [
        (["food", "dog"], ["food", "dog"], ["food", "dog", "dog"]),  # in the folders' order
        (
            ["cat", "Golden retriever", "food and drink"],
            None,
            ["food and drink", "Golden retriever", "Golden retriever"],
        ),
        ({"Golden_Retriever": "dog", "x": "X", "Food & Drink": "food"}, ["dog", "X", "food"], ["food", "dog", "dog"]),
    ],
)
def test_names_of_class_folders(tmp_path, classnames, names, labels):
    write_images(tmp_path, ["Golden_Retriever/2.jpg", "Golden_Retriever/1.jpg", "Food & Drink/x.jpg"])
    classes = classes_in(tmp_path, classnames=classnames)
    assert classes.names == (names or classnames) and label_names(classes) == labels


def test_names_that_do_not_fit(tmp_path):
    write_images(tmp_path, ["a/1.jpg", "b/1.jpg", "b/2.jpg"])
    with pytest.raises(DataError, match="has 2 classes, such as 'a', and --classnames has 3 names, not these"):
        open_set(tmp_path, classnames=["x", "y", "z"])
    with pytest.raises(DataError, match="sample 'a/1' is of the class 'a', and there is no name for it"):
        open_set(tmp_path, classnames={"b": "B", "c": "C"})
    questions = open_set(tmp_path, classnames={"b": "B", "c": "C"}, options=SKIPPING).questions
    assert questions.left_out == {0: "no class"} and questions.classes.labels == {1: 0, 2: 0}


def write_imagenet(folder, each=1, count=1000):
    image = uniform(0)
    for synset in list(imagenet_classes())[:count]:
        (folder / synset).mkdir(parents=True)
        for i in range(each):
            (folder / synset / f"ILSVRC2012_val_{i:08d}.JPEG").write_bytes(image)


def test_imagenet_by_its_folders(tmp_path):
    write_imagenet(tmp_path)
    found = open_set(tmp_path)
    classes = found.questions.classes
    assert classes.names == list(imagenet_classes().values()) and classes.labels == {i: i for i in range(1000)}
    assert classes.templates == list(imagenet_templates()) and len(classes.templates) == 80
    assert classes.alone == AUTHORS and len(set(classes.prompts([classes.alone]))) == 998
    assert found.benchmark is None  # 50 images of each class are ImageNet's
    assert found.questions.notes == ["several classes are called missile, sunglasses: no name tells them apart"]
    assert open_set(tmp_path, templates=["a {}"]).questions.classes.alone == "a {}"


AUTHORS_PROMPTS = "4186863f7cfe1005e11d76ffd467b870cd3c8f511536d62e942444a2f9dbe2a1"  # SHA-256, of their code


@pytest.mark.parametrize("by_number", [False, True])
def test_the_authors_prompts_for_imagenet(tmp_path, by_number):
    if by_number:
        write_class_tar(tmp_path / "0.tar", ["0", "999"])
    else:
        write_imagenet(tmp_path)
    names = read_classnames(Path("imagenet-authors"))
    keras = tmp_path.with_suffix(".json")
    keras.write_text(json.dumps({str(i): [id_, name.replace(" ", "_")] for i, (id_, name) in enumerate(names.items())}))
    for classnames in (names, read_classnames(keras)):
        classes = classes_in(tmp_path, classnames=classnames)
        prompts = "\n".join(classes.prompts([classes.alone]))
        assert hashlib.sha256(prompts.encode()).hexdigest() == AUTHORS_PROMPTS
        assert classes.templates == list(imagenet_templates())
        assert label_names(classes)[0] == "tench" and label_names(classes)[-1] == "toilet tissue"


def test_a_part_of_imagenet(tmp_path):
    write_imagenet(tmp_path, 2, 3)
    found = open_set(tmp_path)
    assert found.questions.classes.names == ["tench", "goldfish", "great white shark"] and found.benchmark is None
    assert label_names(found.questions.classes) == 2 * ["tench"] + 2 * ["goldfish"] + 2 * ["great white shark"]


@pytest.mark.parametrize("change", ["none", "templates", "some names", "names", "one more", "one less"])
def test_imagenet_is_a_benchmark_when_it_is_the_validation_set(tmp_path, change, monkeypatch):
    """50 images of each class, here 2; as a tar with numbers, and the files of clip_benchmark."""
    assert labels_module._IMAGENET == (1000, 50)
    monkeypatch.setattr(labels_module, "_IMAGENET", (1000, 2))
    labels = [str(label) for label in range(1000) for _ in range(2)]
    if change == "one more":
        labels.append("7")
    if change == "one less":
        labels[0] = "1"
    names = list(imagenet_classes().values())
    templates = [template.replace("{}", "{c}") for template in imagenet_templates()]
    if change == "names":
        names.reverse()
    if change == "some names":  # lists of CLIP's names differ in a few
        names[::11] = ["another name"] * len(names[::11])
    if change == "templates":
        templates.pop()
    image = uniform(0)
    files = [
        (f"s{i:07d}.{suffix}", data)
        for i, label in enumerate(labels)
        for suffix, data in (("jpg", image), ("cls", label.encode()))
    ]
    write_tar(tmp_path / "test" / "0.tar", files)
    (tmp_path / "classnames.txt").write_text("\n".join(names) + "\n")
    (tmp_path / "zeroshot_classification_templates.txt").write_text("\n".join(reversed(templates)) + "\n")
    found = open_set(tmp_path)
    assert found.benchmark == (None if change in ("names", "one more", "one less") else "imagenet")
    assert found.questions.classes.alone == (templates[-1].replace("{c}", "{}") if change == "names" else AUTHORS)


def test_tars_with_cls(tmp_path):
    write_class_tar(tmp_path / "wds" / "test" / "0.tar", ["2", "0\n"])
    write_class_tar(tmp_path / "wds" / "test" / "1.tar", ["1", "2"], 2)
    with pytest.raises(DataError, match="has no captions, and its classes are numbers, .* give --classnames"):
        open_set(tmp_path / "wds")
    (tmp_path / "wds" / "classnames.txt").write_text("cat\nred panda\nred  fox\n")
    classes = classes_in(tmp_path / "wds")
    assert label_names(classes) == ["red  fox", "cat", "red panda", "red  fox"] and classes.templates == list(USUAL)
    assert classes_in(tmp_path / "wds" / "test") == classes
    assert label_names(classes_in(tmp_path / "wds", classnames=["a", "b", "c"])) == ["c", "a", "b", "c"]
    (tmp_path / "wds" / "zeroshot_classification_templates.txt").write_text("a {c}, a {c}\n\n")
    assert classes_in(tmp_path / "wds").prompts() == [
        "a cat, a cat",
        "a red panda, a red panda",
        "a red  fox, a red  fox",
    ]
    with pytest.raises(DataError, match="sample 's0000000' is of the class '2', and there is no name for it"):
        open_set(tmp_path / "wds", classnames=["a", "b"])
    found = open_set(tmp_path / "wds", classnames=["a", "b"], options=SKIPPING)
    assert found.questions.left_out == {0: "no class", 3: "no class"}


def test_cls_may_be_names_and_may_be_missing(tmp_path):
    files = [("a.cls", b"Red_Panda"), ("a.jpg", uniform(0)), ("b.jpg", uniform(1)), ("c.jpg", uniform(2))]
    write_tar(tmp_path / "0.tar", [*files, ("c.cls", "caf\u00e9".encode()), ("d.cls", b"of no image")])
    write_tar(tmp_path / "1.tar", [("e.jpg", uniform(0)), ("e.cls", b"\xff")])
    with pytest.raises(DataError, match="0.tar: sample 'b' has no caption 'cls'"):
        open_set(tmp_path)
    found = open_set(tmp_path, options=SKIPPING)
    assert found.questions.classes.names == ["red panda", "caf\u00e9", "of no image"]
    assert found.questions.classes.labels == {0: 0, 2: 1, 3: 2}
    assert found.questions.left_out == {1: "no caption", 4: "not UTF-8"}
    assert found.questions.notes == [] and found.data.problems == []


def test_a_damaged_tar_has_the_classes_before_the_damage(tmp_path):
    path = write_class_tar(tmp_path / "0.tar", ["cat", "dog", "cat"])
    with tarfile.open(path) as tar:
        last = tar.getmember("s0000002.jpg").offset
    path.write_bytes(path.read_bytes()[: last + 600])
    with pytest.raises(DataError, match="is not a whole tar"):
        open_set(tmp_path)
    found = open_set(tmp_path, options=SKIPPING)
    assert label_names(found.questions.classes) == ["cat", "dog"] and found.questions.left_out == {}
    assert [problem.cause for problem in found.data.problems] == ["damaged shard"]


def test_images_with_cls_next_to_them(tmp_path):
    write_images(tmp_path, ["a.jpg", "b.jpg", "c.jpg"])
    for name, label in (("a", "1"), ("b", "0"), ("c", "1")):
        (tmp_path / f"{name}.cls").write_text(f"{label}\n")
    classes = classes_in(tmp_path, classnames=["zero", "one"])
    assert label_names(classes) == ["one", "zero", "one"]


def test_labels_in_metadata_next_to_captions(tmp_path):
    files = []
    for i, meta in enumerate([{"label": 0}, {"label": "1"}, {"class_name": "Cat"}, {}]):
        files += [(f"{i}.jpg", uniform(i)), (f"{i}.txt", b"caption"), (f"{i}.json", json.dumps(meta).encode())]
    write_tar(tmp_path / "0.tar", files)
    found = open_set(tmp_path)
    assert len(found.questions.captions) == 4 and found.questions.classes is None  # one class alone
    write_tar(tmp_path / "0.tar", [file for file in files if file[0][0] in "013"])
    questions = open_set(tmp_path, classnames={"0": "cat", "1": "dog", "2": "fox"}).questions
    assert questions.classes.names == ["cat", "dog", "fox"] and questions.classes.labels == {0: 0, 1: 1}
    assert questions.notes == ["1 of 3 samples name no class, and count in no score of zero-shot classification"]
    assert "its classes are numbers" in open_set(tmp_path).questions.notes[0]
    # Numbers count the ids of names that are by WordNet's.
    questions = open_set(tmp_path, classnames=imagenet_classes()).questions
    assert label_names(questions.classes) == ["tench", "goldfish"] and questions.classes.alone == AUTHORS


def test_tars_with_captions_are_asked_for_both(tmp_path):
    files = [(f"{i}.{suffix}", data) for i in range(3) for suffix, data in (("jpg", uniform(i)), ("txt", b"x"))]
    write_tar(tmp_path / "0.tar", [*files, *((f"{i}.cls", b"cat" if i else b"dog") for i in range(3))])
    found = open_set(tmp_path)
    assert list(found.questions.captions) == [0, 1, 2] and label_names(found.questions.classes) == ["dog", "cat", "cat"]


def test_files_with_captions_and_cls(tmp_path):
    names = ["a/1", "a/22.05", "b"]
    write_images(tmp_path, [f"{name}.jpg" for name in names])
    for name in names:
        (tmp_path / f"{name}.txt").write_text("a caption")
    assert open_set(tmp_path).questions.classes is None
    for name, label in zip(names, ("Cat", "dog", "x"), strict=True):
        (tmp_path / f"{name}.cls").write_text(label)
    found = open_set(tmp_path)
    keys = [key for number in range(len(found.data.shard_sizes)) for key in found.data.shard_keys(number)]
    label = {"a/1": "cat", "a/22.05": "dog", "b": "x"}
    assert label_names(found.questions.classes) == [label[key] for key in keys] and len(found.questions.captions) == 3
    (tmp_path / "b.cls").write_bytes(b"\xff")
    with pytest.raises(DataError, match="b.cls: the .cls of the sample 'b' is neither a number nor a name"):
        open_set(tmp_path)
    assert len(open_set(tmp_path, options=SKIPPING).questions.classes.labels) == 2


def test_labels_next_to_captions_that_are_no_labels(tmp_path):
    files = [(f"{i}.{suffix}", data) for i in range(4) for suffix, data in (("jpg", uniform(i)), ("txt", b"x"))]
    write_tar(
        tmp_path / "0.tar", [*files, ("0.cls", b"cat"), ("1.cls", b"dog"), ("2.cls", b"\xff"), ("3.cls", 2000 * b"a")]
    )
    with pytest.raises(DataError, match="0.tar: the .cls of the sample '2' is neither a number nor a name"):
        open_set(tmp_path)
    questions = open_set(tmp_path, options=SKIPPING).questions
    assert questions.classes.labels == {0: 0, 1: 1} and len(questions.captions) == 4
    assert questions.notes == ["2 of 4 samples name no class, and count in no score of zero-shot classification"]


def test_tables_of_classes(tmp_path):
    write_images(tmp_path, ["a.jpg", "b.jpg", "c.jpg"])
    table = tmp_path / "metadata.csv"
    table.write_text("file_name,label\na.jpg,n01443537\nb.jpg,n01440764\nc.jpg,n01440764\n")
    assert label_names(classes_in(tmp_path)) == ["goldfish", "tench", "tench"]
    table.write_text("file_name,label\na.jpg,2\nb.jpg,0\nc.jpg,\n")
    with pytest.raises(DataError, match="has no captions, and its classes are numbers"):
        open_set(tmp_path)
    found = open_set(tmp_path, classnames=["zero", "one", "two"])
    assert label_names(found.questions.classes) == ["two", "zero"] and found.questions.captions == {}
    assert found.questions.notes == ["1 of 3 samples name no class, and count in no score of zero-shot classification"]
    table.write_text("file_name,label\na.jpg,cat\nb.jpg,cat\n")
    with pytest.raises(DataError, match="has no captions, and its samples are of fewer than two classes"):
        open_set(tmp_path)
    table.write_text("file_name,kind\na.jpg,cat\nb.jpg,dog\n")
    with pytest.raises(DataError, match="has no column of captions"):
        open_set(tmp_path)


def test_class_only_sets_whose_captions_are_asked_for(tmp_path):
    write_class_tar(tmp_path / "0.tar", ["cat", "dog"])
    assert open_benchmark(tmp_path) is not None
    assert open_benchmark(tmp_path, fields=["long"]) is None
    assert open_benchmark(tmp_path, options=DataOptions(text_suffix="cls")) is None


@pytest.mark.parametrize("caption", ["a caption", ["two", "captions"]])
def test_captions_of_the_run_in_tars_with_cls(tmp_path, caption):
    files = [
        (f"{i}.{suffix}", data) for i in range(2) for suffix, data in (("jpg", uniform(i)), ("cls", b"ab"[i : i + 1]))
    ]
    files += [(f"{i}.json", json.dumps({"long": caption}).encode()) for i in range(2)]
    write_tar(tmp_path / "0.tar", files)
    questions = open_set(tmp_path, wanted="long").questions
    assert len(questions.captions) == 2 and label_names(questions.classes) == ["a", "b"]
    assert open_set(tmp_path, wanted="other").questions.captions == {}
    assert label_names(classes_in(tmp_path)) == ["a", "b"]


def test_classes_are_scored(tmp_path):
    """A model that knows all but one image; n, chance and both figures by hand."""
    labels = ["cat", "dog", "cat", "fox", "cat"]
    write_class_tar(tmp_path / "0.tar", labels)
    of_class = {"cat": 0, "dog": 1, "fox": 2}
    knows = [of_class[label] for label in labels[:-1]] + [1]

    one = torch.eye(3)
    scorer = Scorer(lambda i: one[knows[i]], lambda text: one[of_class[text.split()[-1]]])
    result = evaluate(scorer.subject(), {"set": open_set(tmp_path)})
    scores = result["zero_shot"]["set"]
    assert (scores["n"], scores["classes"], scores["top1"], scores["top5"]) == (5, 3, 4 / 5, 1)
    assert scores["mean_per_class"] == pytest.approx((2 / 3 + 1 + 1) / 3)
    assert scores["majority"] == pytest.approx(3 / 5)
    assert result["retrieval"] == {} and result["benchmarks"] == {"set": None}
