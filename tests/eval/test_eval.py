"""eval/: retrieval, composition and zero-shot by hand, and the evaluation of a model."""

import random

import pytest
import torch
from support.tiny_sets import make_set, png
from torch.nn import functional as F

from lift_fast.data.shards import Shards, ShardWriter
from lift_fast.errors import ConfigError
from lift_fast.eval.composition import captions_and_foils, composition
from lift_fast.eval.retrieval import ranks, recalls, retrieval
from lift_fast.eval.run import _require_first, evaluate_model
from lift_fast.eval.zero_shot import TEMPLATES, has_numbers, label_of, prompts, zero_shot
from lift_fast.nn import Lift, Preset, TextConfig, VitConfig
from lift_fast.sugarcrepe import TASKS


def test_ranks_by_hand():
    similarity = torch.tensor([[0.9, 0.1, 0.2], [0.8, 0.5, 0.6], [0.3, 0.2, 0.1]])
    assert ranks(similarity).tolist() == [0, 2, 2]
    assert recalls(similarity) == {"r1": pytest.approx(1 / 3), "r5": 1.0, "r10": 1.0}


def test_ranks_are_those_of_a_sort():
    similarity = torch.rand(200, 200, generator=torch.Generator().manual_seed(0))
    order = similarity.argsort(dim=1, descending=True)
    want = (order == torch.arange(200).unsqueeze(1)).int().argmax(dim=1)
    assert torch.equal(ranks(similarity), want)


def test_collapsed_features_score_nothing():
    same = F.normalize(torch.ones(50, 4), dim=1)
    assert retrieval(same, same)["i2t"]["r10"] == 0


def test_random_features_score_chance():
    torch.manual_seed(0)
    image, text = (F.normalize(torch.randn(2000, 64), dim=1) for _ in range(2))
    scores = retrieval(image, text)
    assert scores["n"] == 2000
    for way in ("i2t", "t2i"):
        assert scores[way]["r1"] < 0.004
        assert scores[way]["r10"] == pytest.approx(0.005, abs=0.005)


def test_perfect_features_score_all_and_both_ways_differ():
    image = F.normalize(torch.randn(30, 8), dim=1)
    assert retrieval(image, image)["t2i"]["r1"] == 1
    text = image.clone()
    text[1:] = text[0]  # every text says the same thing
    scores = retrieval(image, text)
    assert scores["t2i"]["r1"] == pytest.approx(1 / 30)
    assert scores["i2t"]["r1"] == 0  # ties


def test_features_that_are_not_finite_are_refused():
    bad = torch.full((3, 2), torch.nan)
    with pytest.raises(ValueError, match="finite"):
        retrieval(bad, bad)


def test_composition_counts_what_is_strictly_preferred():
    image = torch.eye(4)
    true = {"swap_obj": torch.eye(4), "swap_att": torch.eye(4)}
    foil = {"swap_obj": torch.zeros(4, 4), "swap_att": torch.eye(4)}
    assert composition(image, true, foil) == {"swap_obj": 1.0, "swap_att": 0.0, "mean": 0.5, "n": 8}


def test_pairs_reads_the_metadata():
    meta = {"composition": {task: {"caption": f"{task} yes", "foil": f"{task} no"} for task in TASKS}}
    captions, foils = captions_and_foils([meta, meta])
    assert captions["add_obj"] == ["add_obj yes"] * 2
    assert list(foils) == list(TASKS)
    assert len(TASKS) == 7


def test_zero_shot_by_hand():
    classes = torch.eye(3).unsqueeze(1).repeat(1, 2, 1)
    image = torch.eye(3)[[0, 0, 1, 1, 1, 0]]
    labels = torch.tensor([0, 0, 1, 1, 1, 1])
    scores = zero_shot(image, classes, labels)
    assert scores["top1"] == pytest.approx(5 / 6)
    assert scores["mean_per_class"] == pytest.approx((1 + 3 / 4) / 2)
    assert scores["majority"] == pytest.approx(4 / 6)
    assert scores["chance"] == pytest.approx(1 / 3)


def test_prompts_hold_the_class_name():
    assert len(prompts("Food & Drink")) == len(TEMPLATES)
    assert all("food and drink" in prompt for prompt in prompts("Food & Drink"))


def test_a_model_is_evaluated_on_the_images_that_decode(tmp_path):
    torch.manual_seed(0)
    preset = Preset(VitConfig(16, 8, 32, 2, 2), TextConfig(width=16, layers=1, heads=2), embed_dim=16, text_dim=24)
    model, sets = (
        Lift(preset).eval(),
        {"whole": make_set(tmp_path / "a"), "broken": make_set(tmp_path / "b", broken={0})},
    )
    asked = []

    def encode_text(captions):
        asked.append(list(captions))
        return F.normalize(torch.randn(len(captions), 24), dim=1)

    result = evaluate_model(model, encode_text, sets, torch.device("cpu"), examples=3)
    assert list(result)[:5] == ["retrieval", "composition", "zero_shot", "pictures", "skipped"]
    assert {name: scores["n"] for name, scores in result["retrieval"].items()} == {"whole": 10, "broken": 9}
    assert result["skipped"] == {"whole": 0, "broken": 1}
    assert result["skipped_causes"] == {"whole": {}, "broken": {"not a picture": 1}}
    assert result["notes"] == {"whole": [], "broken": []}
    assert result["composition"] is None and result["zero_shot"] is None
    assert [example["caption"] for example in result["pictures"]] == [f"caption {i}" for i in (0, 1, 2, 1, 2, 3)]
    assert asked == [[f"caption {i}" for i in range(10)], [f"caption {i}" for i in range(1, 10)]]


def test_a_score_belongs_to_one_set():
    result = {"composition": None}
    _require_first(result, "composition", "one")
    result["composition"] = {"mean": 1.0}
    with pytest.raises(ConfigError, match="two is the second set for composition"):
        _require_first(result, "composition", "two")


def perfect(caption_of):
    """Features of a perfect model: an image is nearest to its own caption, and near its group's images."""
    torch.manual_seed(0)
    text = F.normalize(torch.randn(len(set(caption_of)), 64), dim=1)
    image = F.normalize(text[list(caption_of)] + 0.01 * torch.randn(len(caption_of), 64), dim=1)
    return image, text


@pytest.mark.parametrize(
    "caption_of", [[0, 1, 2, 3], [0, 0, 1, 2, 2, 2], [0] * 12 + [1] * 7 + [2] * 6 + [3, 4, 5, 5], [0, 0]]
)
def test_a_perfect_model_scores_the_ceiling(caption_of):
    """Line 6 of the issue: with equal captions it scored 73 %, and nothing said so."""
    image, text = perfect(caption_of)
    scores = retrieval(image, text, caption_of)
    for way in ("i2t", "t2i"):
        assert scores[way] == pytest.approx(scores["ceiling"][way])
    assert scores["repeats"] == len(caption_of) - len(set(caption_of))
    distinct = len(set(caption_of)) == len(caption_of)
    assert (scores["ceiling"]["t2i"]["r1"] == scores["ceiling"]["i2t"]["r1"] == 1) == distinct


def test_no_model_exceeds_the_ceiling():
    torch.manual_seed(1)
    for trial in range(50):
        caption_of = torch.randint(0, 4, (9,)).unique(return_inverse=True)[1].tolist()
        image = F.normalize(torch.randn(9, 3), dim=1)
        text = F.normalize(torch.randn(max(caption_of) + 1, 3), dim=1)
        if trial % 2:
            image, text = perfect(caption_of)
        scores = retrieval(image, text, caption_of)
        for way in ("i2t", "t2i"):
            assert all(scores[way][k] <= scores["ceiling"][way][k] + 1e-6 for k in scores[way])


def test_equal_captions_are_encoded_once_and_tie_to_the_bit(tmp_path):
    torch.manual_seed(0)
    preset = Preset(VitConfig(16, 8, 32, 2, 2), TextConfig(width=16, layers=1, heads=2), embed_dim=16, text_dim=24)
    with ShardWriter(tmp_path / "data") as writer:
        for i in range(12):
            writer.write(f"k{i}", png(random.Random(i)), f"caption {i // 4}", {})
    asked = []

    def encode_text(captions):
        asked.append(list(captions))
        return F.normalize(torch.randn(len(captions), 24), dim=1)

    data = {"set": Shards(tmp_path / "data")}
    result = evaluate_model(Lift(preset).eval(), encode_text, data, torch.device("cpu"))
    assert asked == [["caption 0", "caption 1", "caption 2"]]
    scores = result["retrieval"]["set"]
    assert scores["i2t"]["r1"] == 0 and scores["ceiling"]["i2t"] == {"r1": 0, "r5": 1, "r10": 1}
    assert [example["caption"] for example in result["pictures"]] == [f"caption {i // 4}" for i in range(8)]


def test_the_class_of_a_sample():
    assert label_of({"label": "cat", "n": 3}) == label_of({"group": "cat", "label": "dog"}) == "cat"
    assert label_of({"label": 3, "class_name": " tabby cat "}) == "tabby cat"
    for nothing in ({}, {"label": 3}, {"label": "7"}, {"label": ""}, {"label": ["cat"]}, {"cls": None}):
        assert label_of(nothing) is None
    assert has_numbers([{"label": 3}]) and has_numbers([{}, {"cls": "7"}]) and not has_numbers([{"label": "cat"}, {}])
