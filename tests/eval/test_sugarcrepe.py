"""eval/layouts/sugarcrepe.py: the seven published files, scored by models whose scores are known; other files."""

import hashlib
import json

import numpy as np
import pytest
import torch
from support.scorers import Scorer
from support.tiny_benchmarks import choice, real_sugarcrepe, uniform, write_images, write_json

from lift_fast.data.options import DataOptions
from lift_fast.data.samples import BadSample
from lift_fast.errors import DataError
from lift_fast.eval.run import evaluate
from lift_fast.eval.sets import open_set

COUNTS = {
    "swap_att": 666,
    "swap_obj": 245,
    "add_att": 692,
    "add_obj": 2062,
    "replace_att": 788,
    "replace_obj": 1652,
    "replace_rel": 1406,
}


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The seven files, their entries, and an image of its own colour for each name."""
    folder = tmp_path_factory.mktemp("sugarcrepe")
    entries = real_sugarcrepe(folder)
    names = sorted({entry["filename"] for task in entries.values() for entry in task.values()})
    write_images(folder / "val2017", names)
    return folder, entries, names


def oracle(entries, names, sign=1):
    """A feature for each image, and for a text the sum of those that it is true of; sign -1: the opposite."""
    number = {name: i for i, name in enumerate(names)}
    one = torch.eye(len(names) + 1)
    true: dict[str, set[int]] = {}
    for task in entries.values():
        for entry in task.values():
            true.setdefault(entry["caption"].strip(), set()).add(number[entry["filename"]])
    return Scorer(lambda i: sign * one[i], lambda text: one[sorted(true.get(text, {len(names)}))].sum(dim=0))


def hashed(text, dim=32):
    seed = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(dim)).float()


def scores_of(published, scorer):
    folder, _, _ = published
    result = evaluate(scorer.subject(), {"sugarcrepe": open_set(folder)})
    assert result["benchmarks"] == {"sugarcrepe": "sugarcrepe"} and result["skipped"] == {"sugarcrepe": 0}
    assert result["retrieval"] == result["zero_shot"] == {}
    scores = result["composition"]["sugarcrepe"]
    assert scores["counts"] == COUNTS and scores["n"] == sum(COUNTS.values()) == 7511
    return scores


def test_an_oracle_scores_all(published):
    scores = scores_of(published, oracle(*published[1:]))
    assert all(scores[task] == 1 for task in (*COUNTS, "mean"))
    assert not any(scores["ties"].values())


def test_an_inverted_oracle_scores_nothing(published):
    scores = scores_of(published, oracle(*published[1:], sign=-1))
    assert all(scores[task] == 0 for task in (*COUNTS, "mean"))
    assert not any(scores["ties"].values())


def test_a_constant_scores_nothing_and_every_pair_is_a_tie(published):
    same = torch.tensor([1.0, 2, 3])
    scores = scores_of(published, Scorer(lambda i: same, lambda text: same))
    assert all(scores[task] == 0 for task in (*COUNTS, "mean"))
    assert scores["ties"] == COUNTS
    assert scores["blind"]["mean"] == 0


@pytest.mark.parametrize("seed", [0, 1])
def test_random_features_score_half(published, seed):
    scorer = Scorer(lambda i: hashed(f"{seed} image {i}"), lambda text: hashed(f"{seed} {text}"))
    scores = scores_of(published, scorer)
    assert scores["mean"] == pytest.approx(0.5, abs=0.02)
    assert scores["blind"]["mean"] == pytest.approx(0.5, abs=0.02)
    assert not any(scores["ties"].values())
    folder, entries, names = published
    number = {name: i for i, name in enumerate(names)}
    for task, found in entries.items():  # in NumPy, from the files themselves
        right = 0
        for entry in found.values():
            image = hashed(f"{seed} image {number[entry['filename']]}").double().numpy()
            true, foil = (
                hashed(f"{seed} {entry[field].strip()}").double().numpy() for field in ("caption", "negative_caption")
            )
            right += image @ true / np.linalg.norm(true) > image @ foil / np.linalg.norm(foil)
        assert scores[task] == pytest.approx(right / len(found), abs=1e-12)


def test_any_of_the_files(published, tmp_path):
    folder, entries, _ = published
    alone = open_set(folder / "swap_obj.json")
    assert alone.benchmark is None and {choice.task for choice in alone.questions.choices} == {"swap_obj"}
    assert len(alone.data) == len({entry["filename"] for entry in entries["swap_obj"].values()}) == 224
    for task in ("add_att", "swap_att"):
        write_json(tmp_path / "two" / f"{task}.json", entries[task])
    two = open_set(tmp_path / "two", folder / "val2017")
    assert two.benchmark is None and len(two.questions.choices) == 692 + 666
    some = {choice.sample: choice for choice in two.questions.choices}[17]
    assert two.data.image_file(17).is_file()
    assert {"filename": two.data.image_file(17).name, "caption": some.captions[0], "negative_caption": some.foil} in [
        {field: text.strip() for field, text in entry.items()} for entry in entries[some.task].values()
    ]


def test_two_true_captions(tmp_path):
    entries = [choice("a.jpg", "a cat", "a dog", caption2="one cat", id=3), choice("b.jpg", caption2=" x ", id=4)]
    write_json(tmp_path / "swap_obj.json", entries)
    write_images(tmp_path, ["a.jpg", "b.jpg"])
    found = open_set(tmp_path)
    assert [c.captions for c in found.questions.choices] == [("a cat", "one cat"), ("a cat", "x")]
    assert found.benchmark is None and found.questions.notes == []
    entries.append(choice("a.jpg", "a dog", "a dog", caption2="one dog", id=5))
    write_json(tmp_path / "swap_obj.json", entries)
    assert "in 1 of 3 choices the foil is equal to a true caption" in open_set(tmp_path).questions.notes[0]


@pytest.mark.parametrize("plus", [False, True])
def test_the_published_set_is_known_by_its_counts(tmp_path, plus):
    counts = {task: n for task, n in COUNTS.items() if not (plus and task.startswith("add"))}
    more = {"caption2": "one cat"} if plus else {}
    for task, n in counts.items():
        write_json(tmp_path / f"{task}.json", {str(i): choice("a.jpg", f"cat {i}", **more) for i in range(n)})
    write_images(tmp_path, ["a.jpg"])
    assert open_set(tmp_path).benchmark == ("sugarcrepe++" if plus else "sugarcrepe")
    write_json(tmp_path / "swap_obj.json", {"0": choice("a.jpg", **more)})
    assert open_set(tmp_path).benchmark is None


def test_missing_images_are_bad_samples_unless_all_are(tmp_path):
    write_json(tmp_path / "swap_obj.json", {str(i): choice(f"{i}.jpg", f"cat {i}") for i in range(5)})
    with pytest.raises(DataError, match="names 5 images, such as '0.jpg', and none of them lies in .*--pictures"):
        open_set(tmp_path)
    (tmp_path / "val2017").mkdir()
    (tmp_path / "val2017" / "3.jpg").write_bytes(uniform(3))
    scorer = Scorer(lambda i: hashed(str(i)), hashed)
    result = evaluate(scorer.subject(), {"some": open_set(tmp_path)})
    assert result["skipped_causes"] == {"some": {"missing": 4}} and result["composition"]["some"]["n"] == 1
    (tmp_path / "swap_obj.json").write_text(json.dumps({"0": choice("../../3.jpg"), "1": choice("3.jpg")}))
    found = open_set(tmp_path)
    with pytest.raises(BadSample, match="leads out of"):
        found.data.image_bytes(0)
    assert found.data.image_bytes(1) == uniform(3)


BAD = {
    "not text": (choice("a.jpg", ["a cat"]), "entry '1': 'caption' is a list of 1, not text"),
    "no caption": (choice("a.jpg", "a cat", "  "), "entry '1' has no caption 'negative_caption'"),
    "not UTF-8": (choice("a.jpg", "half \ud800"), "entry '1': half a Unicode character"),
    "no key": (choice(7), "entry '1' names no image: its 'filename' is 7"),
    "does not parse": ([1, 2], "entry '1' is a list of 2, not an object"),
}


@pytest.mark.parametrize("cause", BAD)
def test_an_entry_that_cannot_be_used(tmp_path, cause):
    entry, message = BAD[cause]
    write_json(tmp_path / "swap_obj.json", {"0": choice("a.jpg"), "1": entry, "2": choice("a.jpg", "x")})
    write_images(tmp_path, ["a.jpg"])
    with pytest.raises(DataError, match=f"swap_obj.json: {message}"):
        open_set(tmp_path)
    found = open_set(tmp_path, options=DataOptions(skip_bad=True))
    assert len(found.questions.choices) == 2
    [problem] = found.data.problems
    assert (problem.cause, problem.count) == (cause, 1) and message in problem.reason


def test_entries_with_the_same_id(tmp_path):
    write_images(tmp_path, ["a.jpg"])
    (tmp_path / "swap_obj.json").write_text(f'{{"0": {json.dumps(choice("a.jpg"))}, "0": 1}}')
    with pytest.raises(DataError, match="swap_obj.json: the key '0' occurs twice"):
        open_set(tmp_path)
    found = open_set(tmp_path, options=DataOptions(skip_bad=True))
    assert len(found.questions.choices) == 1 and found.data.problems[0].cause == "repeated key"
    write_json(tmp_path / "swap_obj.json", [choice("a.jpg", id=1), choice("a.jpg", id=1)])
    with pytest.raises(DataError, match="entry 1 has the id 1 of another entry"):
        open_set(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[" * 100_000, '{"0": ' + "9" * 5000 + "}", "\udcff", "{}", "[]", "7"])
def test_files_that_are_not_such_files(tmp_path, content):
    path = tmp_path / "swap_obj.json"
    path.write_bytes(content.encode(errors="surrogateescape"))
    for options in (DataOptions(), DataOptions(skip_bad=True)):
        for place in (path, tmp_path):
            with pytest.raises(DataError, match="swap_obj.json (is no whole JSON|is not a file of|holds no choice)"):
                open_set(place, options=options)
