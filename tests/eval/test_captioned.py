"""eval/layouts/captioned.py: COCO, Karpathy's splits and Flickr30K, each from its own files."""

import json
import random

import pytest
import torch
from support.scorers import Scorer
from support.tiny_benchmarks import coco, karpathy, uniform, write_flickr_table, write_images, write_json, write_tar
from support.tiny_sets import keys_of

from lift_fast.data.options import DataOptions
from lift_fast.data.samples import SeveralCaptions
from lift_fast.errors import DataError
from lift_fast.eval.labels import classes_of
from lift_fast.eval.layouts import open_benchmark
from lift_fast.eval.run import evaluate
from lift_fast.eval.sets import open_set

CAPTIONS = {
    "b.jpg": ["a cat on a mat", "one cat", 'a "cat", sitting', "a  cat ", "a cat on a mat"],
    "a.jpg": ["two dogs"],
    "c.jpg": ["nothing, really", "zilch", "nil"],
}
STRIPPED = [[caption.strip() for caption in several] for several in CAPTIONS.values()]


def write_coco(folder, names):
    write_json(folder / "annotations" / "captions_val2017.json", coco(CAPTIONS))
    write_json(folder / "annotations" / "instances_val2017.json", {"images": [], "annotations": []})
    write_json(folder / "annotations" / "captions_train2017.json", {"images": [], "annotations": []})
    write_images(folder / "val2017", names)
    return folder


def write_karpathy_coco(folder, names):
    write_images(folder / "val2014", names)
    return write_json(folder / "dataset_coco.json", karpathy(CAPTIONS, filepath="val2014"))


def write_karpathy_flickr(folder, names):
    write_images(folder / "flickr30k-images", names)
    return write_json(folder / "dataset_flickr30k.json", karpathy(CAPTIONS))


def write_table(folder, names):
    write_images(folder / "flickr30k-images", names)
    return write_flickr_table(folder / "flickr_annotations_30k.csv", CAPTIONS)


def write_lines(folder, names):
    write_images(folder / "flickr30k_images", names)
    lines = [f"{name},{caption}" for name, several in CAPTIONS.items() for caption in several]
    path = folder / "flickr30k_test_karpathy.txt"
    path.write_text("\n".join(["image,caption", *lines, ""]))
    return path


def write_token(folder, names):
    write_images(folder, names)
    lines = [f"{name}#{i}\t{caption}" for name, several in CAPTIONS.items() for i, caption in enumerate(several)]
    path = folder / "results_20130124.token"
    path.write_bytes("\r\n".join(lines).encode())
    return path


def write_clip_benchmark(folder, names):
    (folder / "test").mkdir(parents=True)
    files = []
    for number, several in enumerate(CAPTIONS.values()):
        files += [(f"s{number}.jpg", uniform(number)), (f"s{number}.txt", "\n".join(several).encode())]
    write_tar(folder / "test" / "0.tar", files)
    (folder / "dataset_type.txt").write_text("retrieval\n")
    return folder


WRITERS = [
    write_coco,
    write_karpathy_coco,
    write_karpathy_flickr,
    write_table,
    write_lines,
    write_token,
    write_clip_benchmark,
]


@pytest.mark.parametrize("write", WRITERS)
def test_all_captions_of_each_image_in_order(tmp_path, write):
    path = write(tmp_path / "set", CAPTIONS)
    for place in (path, path.parent if path.is_file() else path):
        found = open_set(place)
        assert list(found.questions.captions.values()) == STRIPPED
        assert found.questions.choices == [] and found.questions.classes is None and found.benchmark is None
        assert [found.data.image_bytes(i) for i in range(3)] == [uniform(i) for i in range(3)]
        assert found.data.problems == [] and found.questions.left_out == {}


@pytest.mark.parametrize("write", WRITERS[:-1])
def test_the_images_may_lie_elsewhere(tmp_path, write):
    path = write(tmp_path / "set", [])
    write_images(tmp_path / "elsewhere" / "deep", CAPTIONS)
    with pytest.raises(DataError, match="names 3 images, such as .*b.jpg', and none of them lies in .*--pictures"):
        open_set(path)
    with pytest.raises(DataError, match="none of them lies in .*elsewhere"):
        open_set(path, tmp_path / "elsewhere")
    found = open_set(path, tmp_path / "elsewhere" / "deep")
    assert found.data.image_bytes(1) == uniform(1)
    (tmp_path / "elsewhere" / "deep").rename(tmp_path / "elsewhere" / "images")
    assert open_set(path, tmp_path / "elsewhere").data.image_bytes(1) == uniform(1)


def test_the_samples_of_a_file(tmp_path):
    data = open_set(write_coco(tmp_path, CAPTIONS)).data
    assert len(data) == 3 and data.shard_sizes == [3] and keys_of(data) == list(CAPTIONS)
    assert data.caption(1) == "two dogs" and data.image_file(1) == tmp_path / "val2017" / "a.jpg"
    with pytest.raises(SeveralCaptions) as several:
        data.caption(2)
    assert several.value.captions == CAPTIONS["c.jpg"]
    assert data.captions(0)[1] == "two dogs" and data.meta(1) == {"file_name": "a.jpg", "caption": "two dogs"}
    assert "captions_val2017.json: image 'c.jpg'" in data.where(2)
    assert data.shard_hashes(0).shape == (3,) and data.bad_keys(0) == {}
    before = data.shard_stamp(0)
    write_json(tmp_path / "annotations" / "captions_val2017.json", coco(CAPTIONS | {"d.jpg": ["x"]}))
    assert open_set(tmp_path).data.shard_stamp(0) != before
    with pytest.raises(IndexError):
        data.image_bytes(3)


@pytest.mark.parametrize(
    ("images", "captions", "name"),
    [(5000, 25_014, "coco-val2017"), (5000, 25_010, "coco-karpathy"), (1000, 5000, "flickr30k"), (999, 5000, None)],
)
def test_a_benchmark_is_known_by_its_counts(tmp_path, images, captions, name):
    several = {f"{i}.jpg": [f"{i}"] * 5 for i in range(images)}
    several["0.jpg"] = several["0.jpg"] + ["more"] * (captions - 5 * images)
    write_images(tmp_path, ["7.jpg"])
    path = write_json(tmp_path / "dataset_flickr30k.json", karpathy(several))
    assert open_set(path).benchmark == name


@pytest.mark.parametrize("write", WRITERS)
def test_a_perfect_model_scores_all(tmp_path, write):
    """Captions repeat within an image and between images; the first captions of two images are equal."""
    repeated = CAPTIONS | {"c.jpg": ["a cat on a mat", "zilch", "one cat"]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CAPTIONS, "c.jpg", repeated["c.jpg"])
        path = write(tmp_path / "set", CAPTIONS)
    right: dict[str, list[int]] = {}
    for number, several in enumerate(repeated.values()):
        for caption in several:
            right.setdefault(caption.strip(), []).append(number)
    one = torch.eye(3)
    perfect = Scorer(lambda i: one[i], lambda text: one[sorted(set(right[text]))].sum(dim=0))
    result = evaluate(perfect.subject(), {"set": open_set(path)})
    for part, captions, repeats in (("retrieval", 9, 3), ("first_caption", 3, 1)):
        scores = result[part]["set"]
        assert (scores["n"], scores["captions"], scores["repeats"]) == (3, captions, repeats)
        assert all(scores[way][k] == 1 for way in ("i2t", "t2i") for k in ("r1", "r5", "r10"))
    assert result["composition"] == result["zero_shot"] == {}


def test_an_image_without_captions_stays(tmp_path):
    write_coco(tmp_path, [*CAPTIONS, "d.jpg"])
    write_json(tmp_path / "annotations" / "captions_val2017.json", coco(CAPTIONS | {"d.jpg": []}))
    found = open_set(tmp_path)
    assert len(found.data) == 4 and list(found.questions.captions) == [0, 1, 2]
    assert found.data.image_bytes(3) == uniform(3)


def changed(number, **values):
    """Changes an annotation; number: which. None drops a field."""

    def change(content):
        entry = content["annotations"][number]
        entry.update(values)
        for name in [name for name, value in entry.items() if value is None]:
            del entry[name]

    return change


def repeated_image(content):
    content["images"].append(content["images"][0])


@pytest.mark.parametrize(
    ("change", "cause", "message"),
    [
        (changed(2, caption=["x"]), "not text", "annotation 2: 'caption' is a list of 1, not text"),
        (changed(2, caption="\udc00"), "not UTF-8", "annotation 2: half a Unicode character"),
        (changed(2, caption=None), "no caption", "annotation 2 has no caption 'caption'"),
        (changed(2, image_id=9), "no key", "annotation 2 is of the image 9, which 'images' does not have"),
        (changed(2, image_id=True), "no key", "annotation 2 has no 'image_id', a number or a text"),
        (changed(2, id=0), "repeated key", "annotation 2 has the id 0 of another annotation"),
        (repeated_image, "repeated key", "image 3, 'b.jpg', has the id or the name of another image"),
        (lambda content: content["images"].append("x"), "does not parse", "image 3 is 'x', not an object"),
        (lambda content: content["images"].append({"id": 7}), "no key", "image 3 names no image"),
    ],
)
def test_an_entry_of_coco_that_cannot_be_used(tmp_path, change, cause, message):
    write_coco(tmp_path, CAPTIONS)
    content = coco(CAPTIONS)
    change(content)
    write_json(tmp_path / "annotations" / "captions_val2017.json", content)
    with pytest.raises(DataError, match=message):
        open_set(tmp_path)
    found = open_set(tmp_path, options=DataOptions(skip_bad=True))
    [problem] = found.data.problems
    assert (problem.cause, problem.count) == (cause, 1) and message in problem.reason
    kept = [list(several) for several in STRIPPED]
    if "annotation" in message:
        kept[2].remove("nothing, really")  # the third: the first caption of the third image
    assert list(found.questions.captions.values()) == kept


def test_sentences_that_cannot_be_used(tmp_path):
    path = write_karpathy_flickr(tmp_path, CAPTIONS)
    content = karpathy(CAPTIONS)
    content["images"][1]["sentences"][1] = 3
    content["images"][2]["sentences"] = {"raw": "x"}
    content["images"].append({"filename": "c.jpg", "split": "test", "sentences": []})
    write_json(path, content)
    with pytest.raises(DataError, match="image 1: a sentence is 3, not an object"):
        open_set(path)
    found = open_set(path, options=DataOptions(skip_bad=True))
    assert list(found.questions.captions.values()) == [STRIPPED[0][:1] + STRIPPED[0][2:], STRIPPED[2]]
    assert {problem.cause: problem.count for problem in found.data.problems} == {"does not parse": 2, "repeated key": 1}
    write_json(path, karpathy(CAPTIONS, split="restval"))
    with pytest.raises(
        DataError, match="has no split 'test', which is the one that is read; it has 'restval', 'train'"
    ):
        open_set(path)


def test_lines_and_rows_that_cannot_be_used(tmp_path):
    skipping = DataOptions(skip_bad=True)
    path = write_token(tmp_path / "token", CAPTIONS)
    path.write_bytes(path.read_bytes() + b"\r\nno tab\r\nb.jpg#9\t  \r\n")
    with pytest.raises(DataError, match="line 10 is not the name of an image and its caption"):
        open_set(path)
    found = open_set(path, options=skipping)
    assert list(found.questions.captions.values()) == STRIPPED
    assert {problem.cause: problem.count for problem in found.data.problems} == {"does not parse": 1, "no caption": 1}
    path.write_bytes(path.read_bytes() + b"c.jpg#3\t\xff")
    with pytest.raises(DataError, match="is not UTF-8"):
        open_set(path, options=skipping)
    path = write_table(tmp_path / "table", CAPTIONS)
    path.write_text(path.read_text() + '[,[0],test,d.jpg,9\n"[1, ""a""]",[0],test,e.jpg,9\n"{}",,test,e.jpg\n')
    with pytest.raises(DataError, match="row 5: its 'raw' is no JSON list"):
        open_set(path)
    found = open_set(path, options=skipping)
    assert list(found.questions.captions.values()) == [*STRIPPED, ["a"]]
    assert {problem.cause: problem.count for problem in found.data.problems} == {
        "does not parse": 1,
        "not text": 1,
        "repeated key": 1,
    }


@pytest.mark.parametrize(
    "content", [{"images": 3}, {"images": [], "annotations": "x"}, {"images": []}, {"a": 1}, [[1]], "x", [None], {}]
)
def test_json_of_another_shape(tmp_path, content):
    path = write_json(tmp_path / "captions_val2017.json", content)
    for options in (DataOptions(), DataOptions(skip_bad=True)):
        with pytest.raises(DataError, match="captions_val2017.json"):
            open_set(path, options=options)


def test_several_files_of_captions(tmp_path):
    write_karpathy_coco(tmp_path, CAPTIONS), write_karpathy_flickr(tmp_path, CAPTIONS)
    with pytest.raises(DataError, match=r"several files of captions \(dataset_coco.json, dataset_flickr30k.json\)"):
        open_set(tmp_path)


def test_names_that_lead_elsewhere(tmp_path):
    path = write_json(tmp_path / "set" / "dataset_coco.json", karpathy({"a.jpg": ["x"]}, filepath="../other"))
    write_images(tmp_path / "other", ["a.jpg"])
    with pytest.raises(DataError, match="none of them lies in"):
        open_set(path)
    assert open_set(path, options=DataOptions(absolute_paths=True)).data.image_bytes(0) == uniform(0)


def test_other_layouts_are_left_to_open_data(tmp_path):
    write_images(tmp_path / "pairs", ["a.jpg", "b.jpg"])
    for name in ("a", "b"):
        (tmp_path / "pairs" / f"{name}.txt").write_text(f"caption {name}")
        write_json(tmp_path / "pairs" / f"{name}.json", {"images": [], "label": name})
    write_tar(tmp_path / "tars" / "0.tar", [("a.jpg", uniform(0)), ("a.txt", b"x"), ("a.cls", b"3")])
    (tmp_path / "table").mkdir()
    (tmp_path / "table" / "metadata.csv").write_text("file_name,caption\na.jpg,x\n")
    (tmp_path / "notes.txt").write_text("a list\n")
    for place in ("pairs", "tars", "table", "table/metadata.csv", "notes.txt", "nothing"):
        assert open_benchmark(tmp_path / place) is None
    assert list(open_set(tmp_path / "pairs").questions.captions.values()) == [["caption a"], ["caption b"]]
    data = open_set(tmp_path / "tars").data
    assert classes_of(data, {0: {}}, classnames=["a", "b", "c", "d"]).classes.labels == {0: 3}


def test_any_bytes_are_a_data_error(tmp_path):
    """Files with one byte changed open, or say what is wrong."""
    rng = random.Random()
    path = write_coco(tmp_path, CAPTIONS) / "annotations" / "captions_val2017.json"
    whole = json.dumps(coco(CAPTIONS)).encode()
    for _ in range(300):
        content = bytearray(whole)
        content[rng.randrange(len(content))] = rng.randrange(256)
        path.write_bytes(content)
        for skip_bad in (False, True):
            try:
                found = open_set(tmp_path, options=DataOptions(skip_bad=skip_bad))
            except DataError as error:
                assert "captions_val2017.json" in str(error)
            else:
                assert all(found.questions.texts())
