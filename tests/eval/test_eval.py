"""eval/: retrieval, composition and zero-shot by hand, and the evaluation of a model."""

import pytest
import torch
from support.tiny_sets import make_set
from torch.nn import functional as F

from lift_fast.errors import ConfigError
from lift_fast.eval.composition import captions_and_foils, composition
from lift_fast.eval.retrieval import ranks, recalls, retrieval
from lift_fast.eval.run import _require_first, evaluate_model
from lift_fast.eval.zero_shot import TEMPLATES, prompts, zero_shot
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
