"""Composition and zero-shot classification against plain Python on exact numbers: sums that are rounded once, and
fractions."""

import math
from collections import Counter, defaultdict
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from lift_fast.eval import composition as composing
from lift_fast.eval import zero_shot as classifying
from lift_fast.eval.composition import Rows, composition
from lift_fast.eval.zero_shot import zero_shot

RANDOM = np.random.default_rng()  # other inputs with each run; a failure prints its seed


@pytest.fixture(params=range(10))
def rng(request):
    seed = int(RANDOM.integers(1 << 32))
    print("seed", seed)
    return np.random.default_rng(seed)


@pytest.fixture(params=[1, 3, 4096])
def chunk(request, monkeypatch):
    monkeypatch.setattr(composing, "_CHUNK", request.param)
    monkeypatch.setattr(classifying, "_CHUNK", request.param)


def unit(rng, *shape):
    return F.normalize(torch.tensor(rng.normal(size=shape)).float(), dim=-1)


def dot(x, y):
    return math.fsum(a * b for a, b in zip(x, y, strict=True))


def random_choices(rng, images, texts, count, tasks="abc"):
    """Choices of any texts, one caption or two; of one text twice as well."""
    return [
        Rows(
            str(rng.choice(list(tasks))),
            int(rng.integers(images)),
            tuple(rng.integers(0, texts, rng.integers(1, 3)).tolist()),
            int(rng.integers(texts)),
        )
        for _ in range(count)
    ]


def judged(image, text, choices):
    """task -> Counter of the choices: all, right, ties, and the chances that a random order has."""
    found = defaultdict(Counter)
    for choice in choices:
        foil = dot(image[choice.image], text[choice.foil])
        captions = [dot(image[choice.image], text[caption]) for caption in choice.captions]
        found[choice.task] += Counter(
            all=1,
            right=int(all(caption > foil for caption in captions)),
            ties=int(foil in captions and not any(caption < foil for caption in captions)),
        )
        found[choice.task]["chance"] += Fraction(1, 1 + len(captions))
    return found


def shares(found, key):
    each = {task: float(Fraction(counts[key]) / counts["all"]) for task, counts in found.items()}
    return {task: pytest.approx(share) for task, share in (each | {"mean": sum(each.values()) / len(each)}).items()}


def as_expected(image, text, choices):
    found = judged(image.double().tolist(), text.double().tolist(), choices)
    mean = [math.fsum(column) / len(column) for column in image.double().T.tolist()]
    blind = judged([mean] * len(image), text.double().tolist(), choices)
    return shares(found, "right") | {
        "n": len(choices),
        "ties": {task: counts["ties"] for task, counts in found.items()},
        "counts": {task: counts["all"] for task, counts in found.items()},
        "chance": shares(found, "chance"),
        "blind": shares(blind, "right"),
    }


def test_composition_of_random_features(rng, chunk):
    """Some texts are equal, and some texts' features."""
    images, texts, dim = (int(n) for n in rng.integers(1, 40, 3))
    image, text = unit(rng, images, dim), unit(rng, 1 + texts // 2, dim)
    text = text[rng.integers(0, len(text), texts)]
    choices = random_choices(rng, images, texts, int(rng.integers(1, 120)))
    assert composition(image, text, choices) == as_expected(image, text, choices)


def test_composition_of_integers(rng, chunk):
    """With many ties of texts that differ."""
    dim, texts = int(rng.integers(1, 3)), int(rng.integers(8, 30))  # few dims, so that there are ties for any seed
    image, text = (torch.tensor(rng.integers(-2, 3, (n, dim))).float() for n in (7, texts))
    choices = random_choices(rng, 7, texts, 300)
    got, want = composition(image, text, choices), as_expected(image, text, choices)
    got.pop("blind"), want.pop("blind")  # of means that are rounded
    assert got == want
    assert sum(got["ties"].values()) > 5


def test_two_true_captions_are_both_needed(rng):
    image, text = unit(rng, 300, 16), unit(rng, 900, 16)
    choices = [Rows("both", i, (i, 300 + i), 600 + i) for i in range(300)]
    either = [Rows("first", i, (i,), 600 + i) for i in range(300)]
    scores = composition(image, text, choices + either)
    assert scores == as_expected(image, text, choices + either)
    assert scores["chance"] == {"both": pytest.approx(1 / 3), "first": 0.5, "mean": pytest.approx(5 / 12)}
    assert scores["both"] == pytest.approx(1 / 3, abs=0.12) and scores["first"] == pytest.approx(1 / 2, abs=0.13)


def test_a_mean_over_tasks_of_other_sizes():
    image, text = torch.eye(2), torch.eye(2)
    choices = [Rows("many", 0, (0,), 1)] * 9 + [Rows("one", 0, (1,), 0)]
    assert composition(image, text, choices)["mean"] == 0.5


@pytest.mark.parametrize("sign, want", [(1, 1.0), (-1, 0.0)])
def test_a_perfect_and_an_inverted_model(rng, sign, want):
    """The true captions, two of a choice, are the image's own vector and one near to it, and foils any others."""
    image = unit(rng, 50, 32)
    text = torch.cat([image, F.normalize(image + 0.1 * unit(rng, 50, 32), dim=1), unit(rng, 50, 32)])
    choices = [Rows("ab"[i % 2], i, (i, 50 + i), 100 + i) for i in range(50)]
    scores = composition(sign * image, text, choices)
    assert (scores["a"], scores["b"], scores["mean"]) == (want, want, want)
    assert scores["ties"] == {"a": 0, "b": 0}


@pytest.mark.parametrize("dim", [1, 5, 31, 512])
@pytest.mark.parametrize("images", [1, 2, 37])
def test_collapsed_features_choose_nothing(rng, images, dim):
    image, text = unit(rng, 1, dim).expand(images, dim), unit(rng, 1, dim).expand(3, dim)
    choices = [Rows("one", i, (0,), 1) for i in range(images)] + [Rows("two", i, (0, 1), 2) for i in range(images)]
    scores = composition(image, text, choices)
    assert [scores[task] for task in ("one", "two", "mean")] == [0, 0, 0]
    assert scores["ties"] == scores["counts"] == {"one": images, "two": images}
    assert scores["blind"] == {"one": 0, "two": 0, "mean": 0}


def test_the_blind_score_is_that_of_one_image_for_all(rng):
    """Foils that are unlike all images; images of which each prefers another caption."""
    common, own = unit(rng, 1, 768), unit(rng, 40, 768)
    image = F.normalize(common + own, dim=1)
    text = torch.cat([F.normalize(common + 0.5 * own, dim=1), -common])
    easy = [Rows("easy", i, (i,), 40) for i in range(40)]
    hard = [Rows("hard", i, (i,), j) for i in range(40) for j in range(40) if i != j]
    scores = composition(image, text, easy + hard)
    assert scores["easy"] == scores["blind"]["easy"] == 1
    assert scores["hard"] > 0.99 and scores["blind"]["hard"] == 0.5  # of each two images, one has the nearer caption


def classified(image, classes, labels, names):
    """The rank of each image's class, of integers: classes ahead or level, in exact numbers.

    The cosine of an image and a class, the sum s of its templates: compared by its sign and square over |s|^2.
    """
    sums = classes.sum(axis=1).tolist()
    ranks = []
    for x, label in zip(image.tolist(), labels.tolist(), strict=True):
        cosines = []
        for weight in sums:
            product, square = sum(a * b for a, b in zip(x, weight, strict=True)), sum(a * a for a in weight)
            cosines.append(Fraction(product * abs(product), square) if square else Fraction(0))
        ranks.append(
            sum(cosine >= cosines[label] for cosine, name in zip(cosines, names, strict=True) if name != names[label])
        )
    return np.array(ranks)


def tops(ranks):
    return {f"top{k}": pytest.approx(np.mean(ranks < k)) for k in (1, 5)}


def test_zero_shot_of_integers(rng, chunk):
    """Many ties; classes that occur in no label; classes whose templates cancel; sometimes of size 1."""
    n, count, templates, dim = (int(rng.choice([1, 2, int(rng.integers(3, 15))])) for _ in range(4))
    image, classes = rng.integers(-2, 3, (n, dim)), rng.integers(-2, 3, (count, templates, dim))
    labels, names = rng.integers(0, count, n), [str(i) for i in range(count)]
    scores = zero_shot(torch.tensor(image) / 8, torch.tensor(classes).float(), torch.tensor(labels))  # of length < 1
    ranks = classified(image, classes, labels, names)
    by_class = defaultdict(list)
    for label, rank in zip(labels.tolist(), ranks.tolist(), strict=True):
        by_class[label].append(rank < 1)
    one = tops(classified(image, classes[:, :1], labels, names)) if templates > 1 else None
    assert scores == tops(ranks) | {
        "mean_per_class": pytest.approx(np.mean([np.mean(hits) for hits in by_class.values()]), rel=1e-12),
        "classes": count,
        "templates": templates,
        "n": n,
        "chance": pytest.approx(1 / count),
        "majority": pytest.approx(max(map(len, by_class.values())) / n),
        "one_template": one,
    }


def test_classes_of_one_name(rng, chunk):
    image, classes = rng.integers(-2, 3, (40, 3)), rng.integers(-2, 3, (12, 2, 3))
    labels, names = rng.integers(0, 12, 40), rng.choice(list("abcdef"), 12).tolist()
    alone = rng.integers(-2, 3, (12, 3))
    features = torch.tensor(image) / 8, torch.tensor(classes).float()
    scores = zero_shot(*features, torch.tensor(labels), names, torch.tensor(alone).float())
    want = tops(classified(image, classes, labels, names))
    assert {key: scores[key] for key in want} == want
    assert scores["one_template"] == tops(classified(image, alone[:, None], labels, names))
    own = [names[label] for label in labels]
    assert scores["chance"] == pytest.approx(np.mean([names.count(name) for name in own]) / 12)
    assert scores["majority"] == max(Counter(own).values()) / 40


def test_zero_shot_of_random_features(rng):
    """In float64, with the templates' mean."""
    image, classes = unit(rng, 700, 48), unit(rng, 60, 7, 48)
    labels = torch.tensor(rng.integers(0, 60, 700))
    image += 0.8 * classes.mean(dim=1)[labels]
    weights = classes.double().numpy().mean(axis=1)
    weights /= np.linalg.norm(weights, axis=1, keepdims=True)
    order = np.argsort(-(image.double().numpy() @ weights.T), axis=1)
    want = tops(np.argmax(order == labels.numpy()[:, None], axis=1))
    scores = zero_shot(image, classes, labels)
    assert {key: scores[key] for key in want} == want
    assert 1 / 60 < scores["top1"] < scores["top5"] < 1


@pytest.mark.parametrize("dim", [1, 5, 31, 512])
def test_collapsed_features_are_of_no_class(rng, dim):
    same, one = unit(rng, 1, dim), unit(rng, 1, dim)
    for image, classes in ((same.expand(13, dim), one.expand(6, dim)), (unit(rng, 13, dim), one.expand(6, dim))):
        scores = zero_shot(image, classes[:, None].expand(6, 3, dim), torch.arange(13) % 6)
        assert [scores[key] for key in ("top1", "top5", "mean_per_class")] == [0, 0, 0]
        assert scores["one_template"] == {"top1": 0, "top5": 0}


def test_a_perfect_classifier(rng, chunk):
    classes = unit(rng, 31, 4, 32)
    labels = torch.tensor(rng.integers(0, 31, 100))
    scores = zero_shot(F.normalize(classes.mean(dim=1), dim=1)[labels], classes, labels)
    assert [scores[key] for key in ("top1", "top5", "mean_per_class")] == [1, 1, 1]
