"""eval/: composition and zero-shot by hand, reading what a set asks, and the evaluation of a model."""

import random

import pytest
import torch
from support.tiny_sets import make_set, png
from torch.nn import functional as F

from lift_fast.data.open import open_data
from lift_fast.data.options import DataOptions
from lift_fast.data.samples import BadText
from lift_fast.data.shards import ShardWriter
from lift_fast.errors import DataError, TrainingError
from lift_fast.eval.composition import Rows, composition
from lift_fast.eval.images import ImageFeatures, Pixels
from lift_fast.eval.labels import label_of, readable
from lift_fast.eval.questions import Choice, Classes, Questions
from lift_fast.eval.run import evaluate, score_set
from lift_fast.eval.sets import open_set, read_questions
from lift_fast.eval.subject import Subject
from lift_fast.eval.templates import USUAL
from lift_fast.eval.texts import Texts
from lift_fast.eval.zero_shot import zero_shot
from lift_fast.nn import Lift, Preset, TextConfig, VitConfig
from lift_fast.sugarcrepe import TASKS

CPU = torch.device("cpu")


def test_composition_counts_what_is_strictly_preferred():
    image, text = torch.eye(4), torch.cat([torch.eye(4), torch.zeros(1, 4)])
    choices = [Rows("swap_obj", i, (i,), 4) for i in range(4)] + [Rows("swap_att", i, (i,), i) for i in range(4)]
    scores = composition(image, text, choices)
    assert {task: scores[task] for task in ("swap_obj", "swap_att", "mean", "n")} == {
        "swap_obj": 1.0, "swap_att": 0.0, "mean": 0.5, "n": 8
    }  # fmt: skip
    assert scores["ties"] == {"swap_obj": 0, "swap_att": 4} and scores["counts"] == {"swap_obj": 4, "swap_att": 4}
    assert scores["blind"] == {"swap_obj": 1.0, "swap_att": 0.0, "mean": 0.5}
    assert scores["chance"] == {"swap_obj": 0.5, "swap_att": 0.5, "mean": 0.5}


def test_every_true_caption_must_beat_the_foil():
    """As in SugarCrepe++."""
    image, text = torch.eye(3), F.normalize(torch.tensor([[1.0, 0, 0], [1, 1, 0], [1, 2, 0], [0, 0, 1]]), dim=1)
    both = [Rows("a", 0, (0, 1), 2), Rows("a", 0, (0, 2), 1), Rows("a", 0, (2, 0), 1), Rows("b", 0, (0,), 1)]
    scores = composition(image, text, both)
    assert (scores["a"], scores["b"], scores["mean"]) == (pytest.approx(1 / 3), 1.0, pytest.approx(2 / 3))
    assert scores["chance"] == {"a": pytest.approx(1 / 3), "b": 0.5, "mean": pytest.approx(5 / 12)}
    assert composition(image, text, [Rows("a", 0, (0, 1), 1)])["ties"] == {"a": 1}


def test_what_the_text_alone_decides():
    """Images on both sides of a mean that prefers the first text."""
    image = F.normalize(torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), dim=1)
    text = torch.eye(2)
    choices = [Rows("a", 0, (0,), 1), Rows("a", 1, (0,), 1), Rows("a", 2, (1,), 0)]
    scores = composition(image, text, choices)
    assert scores["a"] == 1.0 and scores["blind"]["a"] == pytest.approx(2 / 3)


def test_zero_shot_by_hand():
    classes = torch.eye(3).unsqueeze(1).repeat(1, 2, 1)
    image = torch.eye(3)[[0, 0, 1, 1, 1, 0]]
    labels = torch.tensor([0, 0, 1, 1, 1, 1])
    scores = zero_shot(image, classes, labels)
    assert scores["top1"] == pytest.approx(5 / 6)
    assert scores["mean_per_class"] == pytest.approx((1 + 3 / 4) / 2)
    assert scores["majority"] == pytest.approx(4 / 6)
    assert scores["chance"] == pytest.approx(1 / 3)
    assert scores["top5"] == 1 and (scores["classes"], scores["templates"], scores["n"]) == (3, 2, 6)
    assert scores["one_template"] == {"top1": scores["top1"], "top5": 1.0}
    assert zero_shot(image, classes[:, :1], labels)["one_template"] is None


def test_classes_that_tie_go_before_the_right_one():
    same = torch.ones(7, 1, 4) / 2
    scores = zero_shot(torch.ones(5, 4) / 2, same, torch.arange(5))
    assert scores["top1"] == scores["top5"] == 0


def test_the_first_template_alone():
    """It is right, and the mean of both is wrong."""
    classes = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.8, 0.6], [0.8, -0.6]]])
    scores = zero_shot(torch.tensor([[0.6, 0.8]]), classes, torch.tensor([1]))
    assert scores["one_template"]["top1"] == 1 and scores["top1"] == 0


def test_classes_of_one_name_are_right_for_each_other():
    classes = torch.eye(3)[[0, 1, 0]].unsqueeze(1)
    image, labels = torch.eye(3)[[0, 0, 1]], torch.tensor([0, 2, 1])
    assert zero_shot(image, classes, labels, ["crane", "cat", "crane"])["top1"] == 1
    assert zero_shot(image, classes, labels)["top1"] == pytest.approx(1 / 3)


def test_prompts_hold_the_class_name():
    prompts = Classes([readable("Food & Drink"), "{}"], list(USUAL), {}).prompts()
    assert len(prompts) == 2 * len(USUAL) and prompts[1] == "a drawing of food and drink"
    assert prompts[len(USUAL) + 1] == "a drawing of {}"


def small_lift():
    torch.manual_seed(0)
    preset = Preset(VitConfig(16, 8, 32, 2, 2), TextConfig(width=16, layers=1, heads=2), embed_dim=16, text_dim=24)
    return Lift(preset).eval()


def subject(model, asked=None):
    def encode_text(captions):
        if asked is not None:
            asked.append(list(captions))
        return F.normalize(torch.randn(len(captions), 24), dim=1)

    return Subject(model.encode_image, encode_text, Pixels.of_size(16), CPU)


def test_a_model_is_evaluated_on_the_images_that_decode(tmp_path):
    make_set(tmp_path / "a"), make_set(tmp_path / "b", broken={0})
    sets = {"whole": open_set(tmp_path / "a"), "broken": open_set(tmp_path / "b")}
    asked = []
    result = evaluate(subject(small_lift(), asked), sets, examples=3)
    assert result["format"] == 2
    assert {name: scores["n"] for name, scores in result["retrieval"].items()} == {"whole": 10, "broken": 9}
    assert result["skipped"] == {"whole": 0, "broken": 1}
    assert result["skipped_causes"] == {"whole": {}, "broken": {"not a picture": 1}}
    assert result["notes"] == {"whole": [], "broken": []} and result["benchmarks"] == {"whole": None, "broken": None}
    assert result["composition"] == result["zero_shot"] == result["first_caption"] == {}
    shown = result["examples"]["broken"]
    assert [example["caption"] for example in shown["images"]] == ["caption 1", "caption 2", "caption 3"]
    assert [example["caption"] for example in shown["texts"]] == ["caption 1", "caption 2", "caption 3"]
    assert all(len(example["images"]) == len(example["right"]) == 3 for example in shown["texts"])
    ranks = [example["rank"] for example in shown["worst"]]
    assert ranks == sorted(ranks, reverse=True) and ranks[-1] > 0
    assert asked == 2 * [[f"caption {i}" for i in range(10)]]


def test_several_sets_may_have_foils_and_classes(tmp_path):
    for name in ("one", "two"):
        with ShardWriter(tmp_path / name) as writer:
            for i in range(6):
                foils = {task: {"caption": f"{task} {i}", "foil": f"no {task} {i}"} for task in TASKS}
                writer.write(
                    f"{i}", png(random.Random(i)), f"caption {i}", {"composition": foils, "label": "ab"[i % 2]}
                )
    result = evaluate(subject(small_lift()), {name: open_set(tmp_path / name) for name in ("one", "two")})
    for task in ("retrieval", "composition", "zero_shot", "examples"):
        assert list(result[task]) == ["one", "two"]
    assert result["composition"]["one"]["n"] == 6 * 7 and list(result["composition"]["one"]["counts"]) == list(TASKS)


def test_a_sample_without_foils_in_a_set_that_has_them(tmp_path):
    with ShardWriter(tmp_path / "data") as writer:
        for i in range(3):
            foils = {task: {"caption": "yes", "foil": "no"} for task in TASKS}
            if i == 2:
                del foils["swap_att"]
            writer.write(f"{i}", png(random.Random(i)), f"caption {i}", {"composition": foils})
    with pytest.raises(DataError, match="sample 2 has no caption and foil for the composition task 'swap_att'"):
        open_set(tmp_path / "data")


def test_equal_captions_are_encoded_once_and_all_right(tmp_path):
    with ShardWriter(tmp_path / "data") as writer:
        for i in range(12):
            writer.write(f"k{i}", png(random.Random(i)), f"caption {i // 4}", {})
    asked = []
    result = evaluate(subject(small_lift(), asked), {"set": open_set(tmp_path / "data")})
    assert asked == [["caption 0", "caption 1", "caption 2"]]
    scores = result["retrieval"]["set"]
    assert (scores["n"], scores["captions"], scores["repeats"]) == (12, 12, 9)
    assert scores["chance"]["i2t"]["r1"] == pytest.approx(4 / 12) and scores["chance"]["t2i"]["r10"] == 1
    assert [example["caption"] for example in result["examples"]["set"]["images"]] == [
        f"caption {i // 4}" for i in range(8)
    ]
    assert [example["caption"] for example in result["examples"]["set"]["texts"]] == [f"caption {i}" for i in range(3)]
    assert "9 of 12 captions repeat an earlier one" in result["notes"]["set"][0]


def scored(questions, image, texts, vectors, causes=()):
    from collections import Counter

    return score_set(ImageFeatures(image, list(range(len(image))), Counter(causes)), questions, Texts(texts, vectors))


def test_a_perfect_model_scores_all_with_repeated_captions():
    torch.manual_seed(0)
    for groups in ([0, 1, 2, 3], [0, 0, 1, 2, 2, 2], [0] * 12 + [1] * 7 + [2] * 6 + [3, 4, 5, 5], [0, 0], [0]):
        vectors = F.normalize(torch.randn(len(set(groups)), 64), dim=1)
        image = F.normalize(vectors[groups] + 0.01 * torch.randn(len(groups), 64), dim=1)
        texts = [f"caption {i}" for i in range(len(vectors))]
        found = scored(Questions({i: [texts[g]] for i, g in enumerate(groups)}), image, texts, vectors)
        for way in ("i2t", "t2i"):
            assert found["retrieval"][way] == {"r1": 1.0, "r5": 1.0, "r10": 1.0}


def test_the_first_caption_alone():
    """Its second caption is what finds image 0."""
    vectors = torch.eye(4)
    image = torch.eye(4)[[1, 2]]
    texts = ["a", "b", "c", "d"]
    found = scored(Questions({0: ["a", "b"], 1: ["c", "d"]}), image, texts, vectors)
    assert found["retrieval"]["i2t"]["r1"] == 1 and found["first_caption"]["i2t"]["r1"] == 0.5
    assert (found["retrieval"]["n"], found["retrieval"]["captions"]) == (2, 4)
    assert (found["first_caption"]["n"], found["first_caption"]["captions"]) == (2, 2)
    assert scored(Questions({0: ["b"], 1: ["c"]}), image, texts, vectors)["first_caption"] is None


def test_choices_and_classes_without_their_image_or_text_are_left_out():
    vectors = torch.cat([torch.eye(3), torch.zeros(1, 3)])
    texts = ["a", "b", "c", "..."]
    choices = [Choice("t", 0, ("a",), "b"), Choice("t", 9, ("a",), "b"), Choice("t", 1, ("...",), "b")]
    classes = Classes(["a", "b"], ["{}"], {0: 0, 1: 1, 9: 1})
    found = scored(Questions({}, choices, classes, {2: "no caption"}), torch.eye(3), texts, vectors, {"missing": 1})
    assert found["composition"]["n"] == 1 and found["composition"]["t"] == 1
    assert found["zero_shot"]["n"] == 2 and found["zero_shot"]["top1"] == 1
    assert found["retrieval"] is None and found["skipped_causes"] == {"missing": 1, "no caption": 1}
    assert found["notes"] == ["2 of 3 choices are left out: their image or a text cannot be used"]


def test_features_that_are_not_finite_are_refused():
    with pytest.raises(TrainingError, match="diverged"):
        scored(Questions({0: ["a"]}), torch.full((1, 2), torch.nan), ["a"], torch.eye(2)[:1])


def test_fields_and_lists_are_several_captions(tmp_path):
    make_set(tmp_path / "tars", 3)
    questions = read_questions(open_data(tmp_path / "tars"), ["txt", "long"])
    assert questions.captions[2] == ["caption 2", "long caption 2"]
    folder = tmp_path / "list"
    folder.mkdir()
    lines = []
    for i, several in enumerate(['["a", "b"]', '["c"]', '["d", " "]', "[3]", "[]"]):
        (folder / f"{i}.png").write_bytes(png(random.Random(i)))
        lines.append(f'{{"file_name": "{i}.png", "caption": {several}}}')
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    with pytest.raises(BadText, match="has no caption"):
        open_set(folder)
    questions = open_set(folder, options=DataOptions(skip_bad=True)).questions
    assert questions.captions == {0: ["a", "b"], 1: ["c"]}
    assert questions.left_out == {2: "no caption", 3: "not text", 4: "not text"}


def test_the_class_of_a_sample():
    assert label_of({"label": "cat", "n": 3}) == label_of({"group": "cat", "label": "dog"}) == "cat"
    assert label_of({"label": 3, "class_name": " tabby cat "}) == "tabby cat"
    assert label_of({"label": 3, "cls": "4"}) == "3" and label_of({"label": " 7 "}) == "7"
    nothings = ({}, {"label": -1}, {"label": True}, {"label": 0.5}, {"label": " "}, {"label": ["cat"]}, {"cls": None})
    assert not any(map(label_of, nothings))
